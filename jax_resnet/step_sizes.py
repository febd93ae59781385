"""The step sizes of an AdaBound update, and the share of each parameter's entries that are at a bound."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jax_resnet.adabound import AdaBoundState
from jax_resnet.precision import one_minus_power

__all__ = ["StepSizes", "step_sizes"]


class StepSizes(NamedTuple):
    """What :func:`step_sizes` returns. Multiply steps and bounds by the learning rate."""

    step: optax.Params  # tree like the parameters: each entry's step size before it is clipped
    lower: jax.Array  # scalar, the lower bound, which all parameters share
    upper: jax.Array  # scalar, the upper bound
    at_lower: optax.Params  # tree of scalars: the share of a parameter's entries with step <= lower
    at_upper: optax.Params  # tree of scalars: the share with step >= upper


def step_sizes(
    state: AdaBoundState,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    gamma: ArrayLike = 1e-3,
    final_lr_ratio: ArrayLike = 100.0,
    eps_root: ArrayLike = 0.0,
) -> StepSizes:
    """Compute the step sizes of the update that led to a state, for each parameter.

    The update was ``-learning_rate * clip(step, lower, upper) * mu``. For a schedule, learning_rate is its value at
    ``state.count - 1``.

    Args:
      state: The state after at least one update; without an update, steps are nan. For the state of :func:`adabound`, a
        chain or a wrapper, pass ``optax.tree.get(opt_state, "AdaBoundState")``.
      b1, b2, eps, gamma, eps_root: The optimizer's arguments. The state shows whether the optimizer is AMSBound.
      final_lr_ratio: final_lr / base_lr of the optimizer.

    Returns:
      A :class:`StepSizes`.

    Examples:
      >>> from jax_resnet.adabound import adabound
      >>> optimizer = adabound(learning_rate=1e-3, final_lr=0.1)
      >>> params = {"conv1": jnp.array([1.0, 2.0]), "fc": jnp.array([3e-6, 40.0])}
      >>> _, opt_state = optimizer.update(params, optimizer.init(params))
      >>> sizes = step_sizes(optax.tree.get(opt_state, "AdaBoundState"), final_lr_ratio=0.1 / 1e-3)
      >>> for name, step in sizes.step.items():
      ...     median = jnp.median(1e-3 * jnp.clip(step, sizes.lower, sizes.upper))
      ...     print(f"{name}: {median:.4f}, at the upper bound {sizes.at_upper[name]:.0%}")
      conv1: 0.0075, at the upper bound 0%
      fc: 50.0501, at the upper bound 50%
    """
    t = jnp.asarray(state.count, jnp.result_type(float))
    correction = jnp.sqrt(one_minus_power(b2, t)) / one_minus_power(b1, t)
    width = 1 + 1 / (gamma * t)
    lower, upper = jnp.asarray(final_lr_ratio / width), jnp.asarray(final_lr_ratio * width)
    nu = state.nu if state.nu_max is None else state.nu_max
    steps = jax.tree.map(lambda v: correction.astype(v.dtype) / (jnp.sqrt(v + eps_root) + eps), nu)
    at_lower = jax.tree.map(lambda s: jnp.mean(s <= lower), steps)
    at_upper = jax.tree.map(lambda s: jnp.mean(s >= upper), steps)
    return StepSizes(steps, lower, upper, at_lower, at_upper)
