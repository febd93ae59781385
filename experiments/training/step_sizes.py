"""The step size of each weight, layer by layer: where AdaBound's bounds act, on a scale that optimizers share.

Adam, AdaBound and SGD all move a weight by -step · m, where m averages its gradients. Adam's step is
learning_rate / sqrt(v); AdaBound clips that; SGD with learning rate a and momentum b has a / (1 - b) everywhere, since
its momentum adds up gradients instead of averaging them. In this unit, the three can be compared.

Both functions take the moments of any optimizer but SGD after at least one update, the peak learning rate base_lr, and
AdaBound's settings; for an optimizer without bounds, they return the bounds that AdaBound would have. All steps and
bounds are those at base_lr, wherever the schedule is; steps are those before clipping unless stated otherwise.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jax_resnet.adabound import AdaBoundState
from jax_resnet.step_sizes import StepSizes, step_sizes

MOST_SAMPLED = 4096
# Jitted as a whole; otherwise XLA compiles some six operations for each shape of a kernel.
_step_sizes = jax.jit(step_sizes, static_argnames=("b1", "gamma", "final_lr_ratio"))


def layer_steps(moments: AdaBoundState, *, base_lr: float, **settings: float) -> dict[str, Any]:
    """The step sizes of the latest update.

    Returns:
      "update" (the count of updates), "lower" and "upper" (the bounds), and "layers": for each kernel its "name", the
      5th, 50th and 95th percentile of the step ("low", "median", "high"), and the shares of its entries that are at the
      bounds ("at_lower", "at_upper").
    """
    sizes, by_name = _by_name(moments, base_lr, **settings)
    layers = []
    for name, (step, at_lower, at_upper) in by_name.items():
        if step.ndim > 1:
            low, median, high = np.percentile(np.asarray(step), [5, 50, 95]) * base_lr
            layers.append({"name": name, "low": low, "median": median, "high": high})
            layers[-1] |= {"at_lower": float(at_lower), "at_upper": float(at_upper)}
    bounds = {"lower": float(sizes.lower) * base_lr, "upper": float(sizes.upper) * base_lr}
    return {"update": int(moments.count)} | bounds | {"layers": layers}


def summarize_steps(moments: AdaBoundState, *, base_lr: float, bounded: bool, **settings: float) -> dict[str, float]:
    """Summarizes the step sizes of the latest update, for the row of an epoch.

    Args:
      bounded: whether the optimizer clips its steps.

    Returns:
      "step_lower" and "step_upper" (the bounds), "at_lower" and "at_upper" (the shares of all weights whose step is at
      or beyond them), and "step/NAME" for each kernel: the median over up to MOST_SAMPLED of its entries, evenly
      spread, clipped if bounded.
    """
    sizes, by_name = _by_name(moments, base_lr, **settings)
    entries = sum(step.size for step, *_ in by_name.values())
    lower, upper = float(sizes.lower), float(sizes.upper)
    summary = {"step_lower": lower * base_lr, "step_upper": upper * base_lr}
    for place, name in enumerate(("at_lower", "at_upper"), 1):
        summary[name] = sum(float(found[place]) * found[0].size for found in by_name.values()) / entries
    for name, (step, *_) in by_name.items():
        if step.ndim > 1:
            median = float(np.median(np.asarray(step).reshape(-1)[:: -(-step.size // MOST_SAMPLED)]))
            clipped = np.clip(median, lower, upper) if bounded else median
            summary[f"step/{name.removesuffix('.weight')}"] = base_lr * clipped
    return {name: float(f"{value:.5g}") for name, value in summary.items()}


def _by_name(
    moments: AdaBoundState, base_lr: float, final_lr: float, **settings: float
) -> tuple[StepSizes, dict[str, tuple[Any, Any, Any]]]:
    """The step sizes, and {parameter: (steps, share at lower bound, share at upper bound)} in network order."""
    sizes = _step_sizes(moments, final_lr_ratio=final_lr / base_lr, **settings)
    steps, at_lower, at_upper = (flatten_dict(t, sep=".") for t in (sizes.step, sizes.at_lower, sizes.at_upper))
    return sizes, {name: (steps[name], at_lower[name], at_upper[name]) for name in sorted(steps, key=_place)}


def _place(name: str) -> list[int | str]:
    """A sort key for network order: the stem, the stages, their blocks by number, the dense layer."""
    part = 0 if name.startswith("conv1") else 2 if name.startswith("fc") else 1
    return [part, *(int(word) if word.isdigit() else word for word in name.split(".")[:-1])]
