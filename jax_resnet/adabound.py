r"""AdaBound: Adam whose step sizes are clipped into bounds that close around the step size of SGD.

With t counted from 1, for every entry of a parameter, whose gradient is g:

.. math::

  m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
  s_t &= \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{1}{\sqrt{v_t + \bar\varepsilon} + \varepsilon} \\
  u_t &= -\alpha_t \cdot \mathrm{clip}\left(s_t, r \tfrac{\gamma t}{\gamma t + 1}, r \tfrac{\gamma t + 1}{\gamma t}
         \right) \cdot m_t, \qquad r = \text{final\_lr} / \text{base\_lr}

AMSBound takes the largest v so far in place of v. Since clip(a·s, a·l, a·u) = a·clip(s, l, u), the learning rate
:math:`\alpha_t` is a factor of its own, and the bounds follow any schedule.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

__all__ = ["AdaBoundState", "adabound", "adaboundw", "amsbound", "scale_by_adabound"]


class AdaBoundState(NamedTuple):
    """State of :func:`scale_by_adabound`; mu, nu and nu_max are trees like the parameters."""

    count: jax.Array  # type: ignore[assignment]  # int32 scalar, the number of updates made
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

    Moments and steps are computed in at least float32, since 0.999 is 1 in bfloat16; updates have the gradients' dtype.
    For float16 gradients prefer :func:`adabound`: before the learning rate is applied, updates may overflow.

    Args:
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the root of the second moment.
      gamma: How fast the bounds close, > 0; at t = 1 / gamma they are a factor of 2 from their limit.
      final_lr_ratio: The limit of both bounds, final_lr / base_lr.
      eps_root: Added to the second moment under the root; a positive value lets gradients flow through the update.
      mu_dtype: dtype of the stored first moment; that of the parameters if None.
      amsbound: Whether to use the largest second moment so far.

    Returns:
      A :class:`optax.GradientTransformation`.
    """
    for name, value, in_range, expected in (
        ("b1", b1, lambda x: 0 <= x < 1, "in [0, 1)"),
        ("b2", b2, lambda x: 0 <= x < 1, "in [0, 1)"),
        ("eps", eps, lambda x: x >= 0, ">= 0"),
        ("gamma", gamma, lambda x: x > 0, "> 0"),
        ("final_lr_ratio", final_lr_ratio, lambda x: x >= 0, ">= 0"),
        ("eps_root", eps_root, lambda x: x >= 0, ">= 0"),
    ):
        if isinstance(value, int | float) and not in_range(value):  # an array may be traced
            raise ValueError(f"{name} must be {expected}, got {value}")

    def init_fn(params):
        _refuse_complex(params)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.result_type(mu_dtype or p)), params)
        nu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide_dtype(p)), params)
        nu_max = optax.tree.zeros_like(nu) if amsbound else None  # not nu itself: a buffer is donated once
        return AdaBoundState(jnp.zeros([], jnp.int32), mu, nu, nu_max)

    def update_fn(updates, state, params=None):
        del params
        _refuse_complex(updates)
        grads = _widen(updates)
        mu = _tree_map(lambda g, m: m if g is None else b1 * m + (1 - b1) * g, grads, _widen(state.mu))
        nu = _tree_map(lambda g, v: v if g is None else b2 * v + (1 - b2) * g**2, grads, state.nu)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu) if amsbound else None
        count = optax.safe_increment(state.count)
        correction, lower, upper = _correction_and_bounds(count, b1, b2, gamma, final_lr_ratio)

        def rule(g, m, v):
            if g is None:
                return None
            step = correction.astype(v.dtype) / (jnp.sqrt(v + eps_root) + eps)
            return (jnp.clip(step, lower, upper) * m).astype(g.dtype)

        new_state = optax.tree.cast_like(AdaBoundState(count, mu, nu, nu_max), state)
        return _tree_map(rule, updates, mu, nu_max if amsbound else nu), new_state

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
    """AdaBound: starts as Adam with learning_rate, ends as SGD with momentum and final_lr.

    Everything is computed in at least float32 and rounded once, to the gradients' dtype. With bfloat16 parameters pass
    ``hyperparam_dtype=jnp.float32`` to ``optax.inject_hyperparams``, which would round b2 to 1.

    Args:
      learning_rate: A number, or a schedule from the number of updates made (0 at first) to a number.
      final_lr: The learning rate of SGD at the end, while learning_rate is base_lr, else in proportion; 0.1 if None.
        Its momentum averages gradients: 0.1 with b1 = 0.9 is SGD at 0.01 where momentum adds them up.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the root of the second moment.
      gamma: How fast the bounds close, > 0; at t = 1 / gamma they are a factor of 2 from their limit.
      base_lr: The learning rate that final_lr belongs to; learning_rate, or the schedule at 0, if None. For a schedule
        that starts at 0 or a learning_rate that is an array, as inject_hyperparams passes it, give this or the ratio.
      final_lr_ratio: final_lr / base_lr, in place of both. A new injected learning_rate then scales the final one too.
      weight_decay: Strength of an L2 penalty: weight_decay · params is added to the gradient. May be a schedule.
      mask: A tree of bools, or a function from the parameters to one: where to apply the decay.
      eps_root: Added to the second moment under the root; a positive value lets gradients flow through the update.
      mu_dtype: dtype of the stored first moment; that of the parameters if None.
      amsbound: Whether to use the largest second moment so far.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its update needs the parameters if weight_decay is not 0.

    Examples:
      >>> optimizer = adabound(learning_rate=0.1, final_lr=0.5)
      >>> params = jnp.array([1.0, 2.0, 3.0])
      >>> state = optimizer.init(params)
      >>> for _ in range(3):
      ...     loss, grads = jax.value_and_grad(lambda x: jnp.sum(x**2))(params)
      ...     updates, state = optimizer.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{loss:.2f}")
      14.00
      12.83
      11.72

    References:
      Luo et al., `Adaptive Gradient Methods with Dynamic Bound of Learning Rate
      <https://openreview.net/forum?id=Bkg3g2R9FX>`_, ICLR 2019

    .. note::
      This is the authors' code (https://github.com/Luolc/AdaBound), and so are the defaults. The paper's Algorithm 2
      does not correct the moments' bias, divides the learning rate by the root of t, and has 1 - b2 for gamma. The
      authors' CIFAR-10 script adds weight_decay=5e-4 and divides the learning rate by 10 after 150 of 200 epochs.
    """
    ratio = _final_lr_ratio(learning_rate, final_lr, base_lr, final_lr_ratio)
    return _chain_in_float32(
        _decayed_weights(weight_decay, mask),
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
    """AMSBound: :func:`adabound` with the largest second moment so far in place of the present one.

    Args:
      learning_rate: A number, or a schedule from the number of updates made (0 at first) to a number.
      final_lr: The learning rate of SGD at the end, while learning_rate is base_lr, else in proportion; 0.1 if None.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the root of the largest second moment.
      gamma: How fast the bounds close, > 0; at t = 1 / gamma they are a factor of 2 from their limit.
      base_lr: The learning rate that final_lr belongs to; learning_rate, or the schedule at 0, if None.
      final_lr_ratio: final_lr / base_lr, in place of both.
      weight_decay: Strength of an L2 penalty: weight_decay · params is added to the gradient. May be a schedule.
      mask: A tree of bools, or a function from the parameters to one: where to apply the decay.
      eps_root: Added to the second moment under the root; a positive value lets gradients flow through the update.
      mu_dtype: dtype of the stored first moment; that of the parameters if None.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its update needs the parameters if weight_decay is not 0.

    Examples:
      >>> optimizer = amsbound(learning_rate=0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
      >>> print(updates.round(3))
      [-0.1  0.1]
    """
    options = dict(weight_decay=weight_decay, mask=mask, eps_root=eps_root, mu_dtype=mu_dtype, amsbound=True)
    rates = dict(learning_rate=learning_rate, final_lr=final_lr, base_lr=base_lr, final_lr_ratio=final_lr_ratio)
    return adabound(**rates, b1=b1, b2=b2, eps=eps, gamma=gamma, **options)


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
    """AdaBound with decoupled weight decay: the decay does not enter the moments.

    The update is that of :func:`adabound` minus learning_rate · weight_decay · params, as in :func:`optax.adamw`. The
    authors' AdaBoundW does not scale the decay: divide a value that was tuned with it by the learning rate.

    Args:
      learning_rate: A number, or a schedule from the number of updates made (0 at first) to a number.
      final_lr: The learning rate of SGD at the end, while learning_rate is base_lr, else in proportion; 0.1 if None.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the root of the second moment.
      gamma: How fast the bounds close, > 0; at t = 1 / gamma they are a factor of 2 from their limit.
      base_lr: The learning rate that final_lr belongs to; learning_rate, or the schedule at 0, if None.
      final_lr_ratio: final_lr / base_lr, in place of both.
      weight_decay: Strength of the decay. May be a schedule.
      mask: A tree of bools, or a function from the parameters to one: where to apply the decay.
      eps_root: Added to the second moment under the root; a positive value lets gradients flow through the update.
      mu_dtype: dtype of the stored first moment; that of the parameters if None.
      amsbound: Whether to use the largest second moment so far.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its update needs the parameters if weight_decay is not 0.

    Examples:
      >>> optimizer = adaboundw(learning_rate=0.1, weight_decay=0.5)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(2 * params, optimizer.init(params), params)
      >>> print(updates.round(3))
      [-0.15  0.2 ]

    References:
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, ICLR 2019
    """
    ratio = _final_lr_ratio(learning_rate, final_lr, base_lr, final_lr_ratio)
    return _chain_in_float32(
        scale_by_adabound(b1, b2, eps, gamma, ratio, eps_root, mu_dtype, amsbound=amsbound),
        _decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _correction_and_bounds(count, b1, b2, gamma, final_lr_ratio):
    """The correction of the moments' bias after so many updates, and the bounds: three scalars."""
    t = jnp.asarray(count, jnp.result_type(float))  # float64 under x64
    width = 1 + 1 / (gamma * t)  # (gamma·t + 1) / (gamma·t), whose terms may overflow to inf / inf
    return jnp.sqrt(_one_minus_power(b2, t)) / _one_minus_power(b1, t), final_lr_ratio / width, final_lr_ratio * width


def _one_minus_power(b, t):
    """1 - b**t without optax's cancellation, which costs half of float32's digits."""
    if isinstance(b, int | float):
        return -jnp.expm1(t * (math.log(b) if b else -math.inf))
    return -jnp.expm1(t * jnp.log(jnp.asarray(b, t.dtype)))


def _final_lr_ratio(learning_rate, final_lr, base_lr, final_lr_ratio):
    if final_lr_ratio is not None:
        if final_lr is not None or base_lr is not None:
            raise ValueError("final_lr_ratio is final_lr / base_lr: pass it in place of both, not with one of them")
        return final_lr_ratio
    rate = learning_rate if base_lr is None else base_lr
    if callable(rate):
        with jax.ensure_compile_time_eval():  # a number also where the optimizer is made inside jit
            rate = rate(0)
        rate = rate if isinstance(rate, jax.core.Tracer) else float(rate)
    is_number = isinstance(rate, int | float)
    if (is_number and not rate > 0) or (base_lr is None and not is_number):
        raise ValueError(
            f"base_lr must be a number > 0, {'the learning rate starts as' if base_lr is None else 'got'} {rate!r}: "
            "pass base_lr, the learning rate that final_lr belongs to (of a warm-up its peak, of an injected learning "
            "rate its first value), for example base_lr=1e-3, or in place of final_lr pass final_lr_ratio, "
            "final_lr / base_lr, for example final_lr_ratio=100.0"
        )
    return (0.1 if final_lr is None else final_lr) / rate


def _decayed_weights(weight_decay, mask):
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()  # update needs no params then
    return optax.add_decayed_weights(weight_decay, mask)


def _chain_in_float32(*transforms):
    """Chain that computes in at least float32: float16 may hold learning_rate · 100 · g, but not 100 · g."""
    chain = optax.chain(*transforms)

    def update_fn(updates, state, params=None, **extra_args):
        wide_updates, state = chain.update(_widen(updates), state, _widen(params), **extra_args)
        return optax.tree.cast_like(wide_updates, updates), state

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def _tree_map(function, *trees):
    """jax.tree.map that hands None, a missing gradient, to the function."""
    return jax.tree.map(function, *trees, is_leaf=lambda x: x is None)


def _widen(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, _wide_dtype(x)), tree)


def _wide_dtype(x):
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _refuse_complex(tree):
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(f"AdaBound takes real parameters and gradients, got {jnp.result_type(leaf)}")
