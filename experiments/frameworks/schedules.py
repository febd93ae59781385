"""The learning rate schedules by name; each adapter builds the optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments.frameworks.experiment import ScheduleName

if TYPE_CHECKING:
    import optax


def make_schedule(name: ScheduleName, peak: float, steps: int, warmup_steps: int) -> optax.Schedule:
    """The learning rate by step.

    Args:
      name: "constant"; "cosine", down to 0 at the end; "step", a tenth after one half and again after three quarters
        of the steps; "onecycle", optax's cosine one-cycle with its own warm-up over the first 30%.
      peak: the largest learning rate.
      steps: of the whole training.
      warmup_steps: linear from 0 to the peak before the rest; not for "onecycle".

    Raises:
      ValueError: for a warm-up that is as long as the training, or with "onecycle".
    """
    import optax

    if warmup_steps and name == "onecycle":
        raise ValueError("onecycle has a warm-up of its own: leave --warmup-epochs at 0")
    if warmup_steps >= steps:
        raise ValueError(f"the warm-up of {warmup_steps} steps must be shorter than the training of {steps} steps")
    rest = steps - warmup_steps
    match name:
        case "constant":
            after = optax.constant_schedule(peak)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest)
        case "step":
            after = optax.piecewise_constant_schedule(peak, {max(1, rest // 2): 0.1, max(2, rest * 3 // 4): 0.1})
        case "onecycle":
            after = optax.cosine_onecycle_schedule(steps, peak)
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def as_numbers(schedule: optax.Schedule, steps: int) -> Callable[[int], float]:
    """The schedule's first `steps` values as a function step -> float, computed in advance, for NumPy and PyTorch."""
    import jax

    return jax.device_get(jax.lax.map(schedule, jax.numpy.arange(steps))).tolist().__getitem__
