"""The step size that each weight gets, layer by layer: where AdaBound's bounds act, and against which scale.

Adam, AdaBound and SGD all move a weight by -step · m, m the moving average of its gradients. Adam's step is
learning_rate / sqrt(v); AdaBound clips that; SGD with learning rate a and momentum b has a / (1 - b) everywhere, since
its momentum adds up gradients instead of averaging them. In this unit the three can be compared.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jax_resnet.adabound import AdaBoundState
from jax_resnet.step_sizes import StepSizes, step_sizes

MOST_SAMPLED = 4096
# As one program: operation by operation it is compiled some six times for each shape of a kernel.
_step_sizes = jax.jit(step_sizes, static_argnames=("b1", "gamma", "final_lr_ratio"))


def layer_steps(moments: AdaBoundState, *, base_lr: float, final_lr: float, gamma: float, b1: float) -> dict[str, Any]:
    """The step sizes of the latest update of any optimizer but SGD.

    Args:
      moments: after at least one update (`experiments.frameworks.jax.moments_of`).
      base_lr: the peak learning rate, which all steps are given for, wherever the schedule is.
      final_lr, gamma, b1: AdaBound's settings; for one without bounds they give those it would have had.

    Returns:
      "update" (the count of updates), "lower" and "upper" (the bounds), and "layers": for each kernel its "name", the
      5th, 50th and 95th percentile of the step before clipping ("low", "median", "high"), and the shares of its
      entries that are at the bounds ("at_lower", "at_upper"). All steps and bounds include base_lr.
    """
    sizes, steps, at_lower, at_upper = _by_name(moments, base_lr, final_lr, gamma, b1)
    layers = []
    for name, step in steps.items():
        if step.ndim > 1:
            low, median, high = np.percentile(np.asarray(step), [5, 50, 95]) * base_lr
            shares = {"at_lower": float(at_lower[name]), "at_upper": float(at_upper[name])}
            layers.append({"name": name, "low": low, "median": median, "high": high} | shares)
    return {
        "update": int(moments.count),
        "lower": float(sizes.lower) * base_lr,
        "upper": float(sizes.upper) * base_lr,
        "layers": layers,
    }


def summarize_steps(
    moments: AdaBoundState, *, base_lr: float, final_lr: float, gamma: float, b1: float, bounded: bool
) -> dict[str, float]:
    """The steps of the latest update in some numbers, for the row of an epoch.

    Args:
      moments, base_lr, final_lr, gamma, b1: as for `layer_steps`.
      bounded: whether the optimizer clips its steps.

    Returns:
      "step_lower" and "step_upper" (the bounds), "at_lower" and "at_upper" (the shares of all weights whose step
      before clipping is at or beyond them), and "step/NAME" for each kernel: the median over up to MOST_SAMPLED of its
      entries, evenly spread, clipped if bounded. Steps and bounds include base_lr, wherever the schedule is; of an
      optimizer without bounds they are those that AdaBound would have.
    """
    sizes, steps, at_lower, at_upper = _by_name(moments, base_lr, final_lr, gamma, b1)
    entries = sum(step.size for step in steps.values())
    lower, upper = float(sizes.lower), float(sizes.upper)
    summary = {
        "step_lower": lower * base_lr,
        "step_upper": upper * base_lr,
        "at_lower": sum(float(at_lower[name]) * step.size for name, step in steps.items()) / entries,
        "at_upper": sum(float(at_upper[name]) * step.size for name, step in steps.items()) / entries,
    }
    for name, step in steps.items():
        if step.ndim > 1:
            median = float(np.median(np.asarray(step).reshape(-1)[:: -(-step.size // MOST_SAMPLED)]))
            summary[f"step/{name.removesuffix('.weight')}"] = base_lr * (
                np.clip(median, lower, upper) if bounded else median
            )
    return {name: float(f"{value:.5g}") for name, value in summary.items()}


def _by_name(
    moments: AdaBoundState, base_lr: float, final_lr: float, gamma: float, b1: float
) -> tuple[StepSizes, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The step sizes; and their steps and shares at the bounds by parameter, in the order of the network."""
    sizes = _step_sizes(moments, b1=b1, gamma=gamma, final_lr_ratio=final_lr / base_lr)
    steps, at_lower, at_upper = (flatten_dict(t, sep=".") for t in (sizes.step, sizes.at_lower, sizes.at_upper))
    names = sorted(steps, key=lambda name: [int(p) if p.isdigit() else p for p in _parts(name)])
    return sizes, {name: steps[name] for name in names}, at_lower, at_upper


def _parts(name: str) -> list[str]:
    """In the order of the network: the stem, the stages, the blocks by number, the dense layer."""
    return (["0"] if name.startswith("conv1") else ["2"] if name.startswith("fc") else ["1"]) + name.split(".")[:-1]
