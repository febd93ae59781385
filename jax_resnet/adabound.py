"""AdaBound (Luo et al., ICLR 2019): Adam with step sizes clipped to bounds that close around the step size of SGD."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from jax_resnet.adabound_options import check_range, decayed_weights, final_to_base
from jax_resnet.precision import at_least_float32, chain_in_float32, one_minus_power, wide_dtype

__all__ = ["AdaBoundState", "adabound", "adaboundw", "amsbound", "scale_by_adabound"]

_map = functools.partial(jax.tree.map, is_leaf=lambda x: x is None)  # None is a missing gradient


class AdaBoundState(NamedTuple):
    """State of :func:`scale_by_adabound`; mu, nu and nu_max are trees like the parameters."""

    count: jax.Array  # type: ignore[assignment]  # int32 scalar, the number of updates done
    mu: optax.Updates  # first moment, in mu_dtype or the parameters' dtype
    nu: optax.Updates  # second moment, in at least float32
    nu_max: optax.Updates | None  # largest second moment so far; None without AMSBound


def scale_by_adabound(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    gamma: ArrayLike = 1e-3,
    final_lr_ratio: ArrayLike = 100.0,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    amsbound: bool = False,
) -> optax.GradientTransformation:
    """Multiply the first moment by a clipped Adam step size. See :func:`adabound` for more details.

    Args:
      b1, b2: Decay rates of the first and of the second moment, in [0, 1).
      eps, eps_root: Added outside and inside the root of the second moment. eps_root > 0 keeps derivatives finite.
      gamma: How fast the bounds close, > 0; at t = 1 / gamma they are a factor of 2 from their limit.
      final_lr_ratio: The limit of both bounds, final_lr / base_lr.
      mu_dtype: dtype of the stored first moment; None takes the parameters' dtype.
      amsbound: Whether to use the largest second moment so far.

    Returns:
      A :class:`optax.GradientTransformation`. Its updates may overflow in float16; updates of `adabound` do not.
    """
    check_range("in [0, 1)", lambda x: 0 <= x < 1, b1=b1, b2=b2)
    check_range("> 0", lambda x: x > 0, gamma=gamma)
    check_range(">= 0", lambda x: x >= 0, eps=eps, final_lr_ratio=final_lr_ratio, eps_root=eps_root)

    def init_fn(params):
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.result_type(mu_dtype or p)), params)
        nu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params)
        nu_max = optax.tree.zeros_like(nu) if amsbound else None  # a new tree, because a buffer cannot be donated twice
        return AdaBoundState(jnp.zeros([], jnp.int32), mu, nu, nu_max)

    def update_fn(updates, state, params=None):
        del params
        grads = at_least_float32(updates)
        mu = _map(lambda g, m: m if g is None else b1 * m + (1 - b1) * g, grads, at_least_float32(state.mu))
        nu = _map(lambda g, v: v if g is None else b2 * v + (1 - b2) * g**2, grads, state.nu)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu) if amsbound else None
        count = optax.safe_increment(state.count)
        t = jnp.asarray(count, jnp.result_type(float))  # float64 under x64
        width = 1 + 1 / (gamma * t)  # (gamma·t + 1) / (gamma·t) without overflow to inf / inf
        correction = jnp.sqrt(one_minus_power(b2, t)) / one_minus_power(b1, t)
        lower, upper = final_lr_ratio / width, final_lr_ratio * width

        def rule(g, m, v):
            if g is None:
                return None
            step = correction.astype(v.dtype) / (jnp.sqrt(v + eps_root) + eps)
            return (jnp.clip(step, lower, upper) * m).astype(g.dtype)

        new_state = optax.tree.cast_like(AdaBoundState(count, mu, nu, nu_max), state)
        return _map(rule, updates, mu, nu_max if amsbound else nu), new_state

    return optax.GradientTransformation(init_fn, update_fn)


def adabound(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: ArrayLike | None = None,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    gamma: ArrayLike = 1e-3,
    *,
    base_lr: ArrayLike | None = None,
    final_lr_ratio: ArrayLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: optax.Params | Callable | None = None,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    amsbound: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaBound: starts as Adam with learning_rate, ends as SGD with momentum and final_lr.

    Each entry of a parameter, with gradient g, is updated as follows. The update number t starts at 1.

    .. math::

      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
      s_t &= \sqrt{1 - \beta_2^t} / (1 - \beta_1^t) / (\sqrt{v_t + \bar\varepsilon} + \varepsilon) \\
      u_t &= -\alpha_t \, \mathrm{clip}(s_t, r \tfrac{\gamma t}{\gamma t + 1}, r \tfrac{\gamma t + 1}{\gamma t}) \, m_t

    Here r is final_lr / base_lr. The learning rate :math:`\alpha_t` is a separate factor, so the bounds follow any
    schedule. The update is computed in at least float32 and rounded once, to the gradients' dtype. For bfloat16
    parameters pass ``hyperparam_dtype=jnp.float32`` to ``optax.inject_hyperparams``, which otherwise rounds b2 to 1.

    Args:
      learning_rate: A number, or a schedule from the number of updates done (0 at first) to a number.
      final_lr: Sets the learning rate of SGD at the end, final_lr · learning_rate / base_lr; None is 0.1.
        Momentum here averages gradients: 0.1 with b1 = 0.9 equals SGD with rate 0.01 whose momentum sums gradients.
      b1, b2: Decay rates of the first and of the second moment, in [0, 1).
      eps, eps_root: Added outside and inside the root of the second moment. eps_root > 0 keeps derivatives finite.
      gamma: How fast the bounds close, > 0; at t = 1 / gamma they are a factor of 2 from their limit.
      base_lr: The learning_rate that final_lr belongs to; None takes learning_rate, or the schedule's value at 0. Pass
        base_lr or final_lr_ratio if a schedule starts at 0 or learning_rate is an array, as in inject_hyperparams.
      final_lr_ratio: final_lr / base_lr, instead of both. The final rate then scales with an injected learning_rate.
      weight_decay: Strength of an L2 penalty: weight_decay · params is added to the gradient. May be a schedule.
      mask: Where to apply the decay: a tree of bools, or a function from the parameters to such a tree.
      mu_dtype: dtype of the stored first moment; None takes the parameters' dtype.
      amsbound: Whether to use the largest second moment so far.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; update needs the parameters if weight_decay is injected or > 0.

    Examples:
      >>> optimizer = adabound(learning_rate=0.1, final_lr=0.5)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
      >>> print(updates.round(3))
      [-0.1  0.1]

    References:
      Luo et al., `Adaptive Gradient Methods with Dynamic Bound of Learning Rate <https://arxiv.org/abs/1902.09843>`_

    .. note::
      This computes what the authors' code does (https://github.com/Luolc/AdaBound), with the defaults of its optimizer.
      Their CIFAR-10 script has weight_decay=5e-4 and divides the learning rate by 10 after 150 of 200 epochs. The
      paper's Algorithm 2 has no bias correction, divides the learning rate by the root of t, and uses 1 - b2 as gamma.
    """
    ratio = final_to_base(learning_rate, final_lr, base_lr, final_lr_ratio)
    return chain_in_float32(
        decayed_weights(weight_decay, mask),
        scale_by_adabound(b1, b2, eps, gamma, ratio, eps_root, mu_dtype, amsbound=amsbound),
        optax.scale_by_learning_rate(learning_rate),
    )


def amsbound(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: ArrayLike | None = None,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    gamma: ArrayLike = 1e-3,
    *,
    base_lr: ArrayLike | None = None,
    final_lr_ratio: ArrayLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: optax.Params | Callable | None = None,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AMSBound: :func:`adabound` with the largest second moment so far instead of the current one.

    Args:
      learning_rate: A number, or a schedule from the number of updates done (0 at first) to a number.
      final_lr: Sets the learning rate of SGD at the end, final_lr · learning_rate / base_lr; None is 0.1.
      b1, b2: Decay rates of the first and of the second moment, in [0, 1).
      eps, eps_root: Added outside and inside the root of the largest second moment.
      gamma: How fast the bounds close, > 0; at t = 1 / gamma they are a factor of 2 from their limit.
      base_lr: The learning_rate that final_lr belongs to; None takes learning_rate, or the schedule's value at 0.
      final_lr_ratio: final_lr / base_lr, instead of both.
      weight_decay: Strength of an L2 penalty: weight_decay · params is added to the gradient. May be a schedule.
      mask: Where to apply the decay: a tree of bools, or a function from the parameters to such a tree.
      mu_dtype: dtype of the stored first moment; None takes the parameters' dtype.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its update needs the parameters if weight_decay is not 0.

    Examples:
      >>> optimizer = amsbound(learning_rate=0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
      >>> print(updates.round(3))
      [-0.1  0.1]
    """
    rest = dict(weight_decay=weight_decay, mask=mask, eps_root=eps_root, mu_dtype=mu_dtype, amsbound=True)
    return adabound(learning_rate, final_lr, b1, b2, eps, gamma, base_lr=base_lr, final_lr_ratio=final_lr_ratio, **rest)


def adaboundw(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: ArrayLike | None = None,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    gamma: ArrayLike = 1e-3,
    *,
    base_lr: ArrayLike | None = None,
    final_lr_ratio: ArrayLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: optax.Params | Callable | None = None,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    amsbound: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdaBound with decoupled weight decay (https://arxiv.org/abs/1711.05101): the decay does not enter the moments.

    Subtracts learning_rate · weight_decay · params from the update of :func:`adabound`, as :func:`optax.adamw` does.
    The authors' AdaBoundW does not multiply by learning_rate: divide a weight_decay tuned there by learning_rate.

    Args:
      learning_rate: A number, or a schedule from the number of updates done (0 at first) to a number.
      final_lr: Sets the learning rate of SGD at the end, final_lr · learning_rate / base_lr; None is 0.1.
      b1, b2: Decay rates of the first and of the second moment, in [0, 1).
      eps, eps_root: Added outside and inside the root of the second moment.
      gamma: How fast the bounds close, > 0; at t = 1 / gamma they are a factor of 2 from their limit.
      base_lr: The learning_rate that final_lr belongs to; None takes learning_rate, or the schedule's value at 0.
      final_lr_ratio: final_lr / base_lr, instead of both.
      weight_decay: Strength of the decay. May be a schedule.
      mask: Where to apply the decay: a tree of bools, or a function from the parameters to such a tree.
      mu_dtype: dtype of the stored first moment; None takes the parameters' dtype.
      amsbound: Whether to use the largest second moment so far.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its update needs the parameters if weight_decay is not 0.

    Examples:
      >>> optimizer = adaboundw(learning_rate=0.1, weight_decay=0.5)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(2 * params, optimizer.init(params), params)
      >>> print(updates.round(3))
      [-0.15  0.2 ]
    """
    ratio = final_to_base(learning_rate, final_lr, base_lr, final_lr_ratio)
    return chain_in_float32(
        scale_by_adabound(b1, b2, eps, gamma, ratio, eps_root, mu_dtype, amsbound=amsbound),
        decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
