"""Checks the arguments of AdaBound and derives values from them."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

__all__ = ["check_range", "decayed_weights", "final_to_base"]


def check_range(expected: str, in_range: Callable[[float], bool], **hyperparams: ArrayLike) -> None:
    """Raises a ValueError for a Python number that is out of range. Arrays are not checked: they may be traced."""
    for name, value in hyperparams.items():
        if isinstance(value, int | float) and not in_range(value):
            raise ValueError(f"{name} must be {expected}, got {value}")


def final_to_base(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: ArrayLike | None,
    base_lr: ArrayLike | None,
    final_lr_ratio: ArrayLike | None,
) -> Any:
    """Returns final_lr / base_lr from the arguments that are given; see `jax_resnet.adabound.adabound`.

    Raises:
      ValueError: the arguments give the ratio twice or not at all, or a rate is out of range.
    """
    if final_lr_ratio is not None:
        if final_lr is not None or base_lr is not None:
            raise ValueError("final_lr_ratio is final_lr / base_lr: pass it instead of both, not with one of them")
        return final_lr_ratio
    if final_lr is not None:
        check_range(">= 0", lambda x: x >= 0, final_lr=final_lr)
    rate: Any = learning_rate if base_lr is None else base_lr
    if callable(rate):
        with jax.ensure_compile_time_eval():  # a number even if the optimizer is made inside jit
            rate = rate(0)
        rate = rate if isinstance(rate, jax.core.Tracer) else float(rate)
    is_number = isinstance(rate, int | float)
    if (is_number and not rate > 0) or (base_lr is None and not is_number):
        raise ValueError(
            f"base_lr must be a number > 0, {'but learning_rate starts as' if base_lr is None else 'got'} {rate!r}: "
            "pass base_lr, the learning rate that final_lr belongs to (the peak of a warm-up, the first value of an "
            "injected learning rate), for example base_lr=1e-3, or instead of final_lr pass final_lr_ratio, "
            "final_lr / base_lr, for example final_lr_ratio=100.0"
        )
    return (0.1 if final_lr is None else final_lr) / rate


def decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: optax.Params | Callable | None
) -> optax.GradientTransformation:
    """Returns `optax.add_decayed_weights`, or for weight_decay 0 the identity, whose update needs no parameters."""
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)
