r"""AdaBound: Adam whose step sizes are clipped into bounds that close around the one of SGD.

With t counted from 1, for every entry of a parameter, whose gradient is g:

.. math::

  m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
  s_t &= \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{1}{\sqrt{v_t + \bar\varepsilon} + \varepsilon} \\
  u_t &= -\alpha_t \cdot \mathrm{clip}\left(s_t, r \tfrac{\gamma t}{\gamma t + 1}, r \tfrac{\gamma t + 1}{\gamma t}
         \right) \cdot m_t, \qquad r = \text{final\_lr} / \text{base\_lr}

Early on the bounds are wide and this is Adam; later both tend to r and it is SGD with momentum and learning rate
:math:`r \alpha_t`. AMSBound has the largest v so far in the place of v. These are the rules of the authors' code
(https://github.com/Luolc/AdaBound); the paper's Algorithm 2 does not correct the moments' bias, and decays the learning
rate by the root of t. As clip(a·s, a·l, a·u) = a·clip(s, l, u), bounds and learning rate are separate matters here.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

NUMBER = (int, float)  # the hyperparameters that are checked; arrays may be traced
_tree_map = functools.partial(jax.tree.map, is_leaf=lambda x: x is None)  # hands None to the function


class AdaBoundState(NamedTuple):
    """State of :func:`scale_by_adabound`; mu, nu and nu_max are trees like the parameters."""

    count: jax.Array  # int32 scalar, the number of updates made
    mu: optax.Updates  # first moment, in mu_dtype or the parameters' dtype
    nu: optax.Updates  # second moment, in at least float32
    nu_max: optax.Updates | None  # largest second moment so far; without AMSBound None, an empty tree


class StepSizes(NamedTuple):
    """What :func:`step_sizes` returns; multiply steps and bounds by the learning rate."""

    step: optax.Params  # tree like the parameters: each entry's step size before it is clipped
    lower: jax.Array  # scalar, the lower bound, which all parameters share
    upper: jax.Array  # scalar, the upper bound
    at_lower: optax.Params  # tree of scalars: the share of a parameter's entries with step <= lower
    at_upper: optax.Params  # tree of scalars: the share with step >= upper


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
    """Multiply the first moment by a clipped Adam step size; the mathematics of :func:`adabound`.

    Moments and steps are computed in at least float32 (in bfloat16 a decay of 0.999 is 1), updates have the gradients'
    dtype. For float16 prefer :func:`adabound`: before the learning rate, updates may be too large for it.

    Args:
      b1, b2, eps, gamma, eps_root, mu_dtype: As in :func:`adabound`.
      final_lr_ratio: The limit of both bounds, final_lr / base_lr.
      amsbound: Whether to use the largest second moment so far, before the correction of its bias.

    Returns:
      A :class:`optax.GradientTransformation` whose state is an :class:`AdaBoundState`.

    Raises:
      ValueError, TypeError: As in :func:`adabound`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jax_resnet.adabound import scale_by_adabound
      >>> optimizer = optax.chain(scale_by_adabound(), optax.scale_by_learning_rate(0.1))
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
      >>> print(updates.round(3))
      [-0.1  0.1]

    References:
      See :func:`adabound`.
    """
    for name, value, in_range, expected in (
        ("b1", b1, lambda x: 0 <= x < 1, "in [0, 1)"),
        ("b2", b2, lambda x: 0 <= x < 1, "in [0, 1)"),
        ("eps", eps, lambda x: x >= 0, ">= 0"),
        ("gamma", gamma, lambda x: x > 0, "> 0"),
        ("final_lr_ratio", final_lr_ratio, lambda x: x >= 0, ">= 0"),
        ("eps_root", eps_root, lambda x: x >= 0, ">= 0"),
    ):
        if isinstance(value, NUMBER) and not in_range(value):
            raise ValueError(f"{name} must be {expected}, got {value}")

    def init_fn(params):
        _refuse_complex(params)
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.result_type(mu_dtype or p)), params)
        nu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide_dtype(p)), params)
        nu_max = jax.tree.map(jnp.zeros_like, nu) if amsbound else None  # not nu itself: buffers are donated once
        return AdaBoundState(jnp.zeros([], jnp.int32), mu, nu, nu_max)

    def update_fn(updates, state, params=None):
        del params
        _refuse_complex(updates)
        grads = _widen(updates)
        mu = _update_moment(grads, _widen(state.mu), b1, 1)
        nu = _update_moment(grads, state.nu, b2, 2)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu) if amsbound else None
        new_state = AdaBoundState(optax.safe_increment(state.count), mu, nu, nu_max)
        steps, lower, upper = _steps_and_bounds(new_state, b1, b2, eps, gamma, final_lr_ratio, eps_root)

        def scale(g, m, s):
            return None if g is None else (jnp.clip(s, lower, upper) * m).astype(g.dtype)

        return _tree_map(scale, updates, mu, steps), optax.tree.cast_like(new_state, state)

    return optax.GradientTransformation(init_fn, update_fn)


def step_sizes(
    state: AdaBoundState,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    gamma: ArrayLike = 1e-3,
    final_lr_ratio: ArrayLike = 100.0,
    eps_root: ArrayLike = 0.0,
) -> StepSizes:
    """Look at the step sizes of the update that led to a state, parameter by parameter.

    That update was ``-learning_rate * clip(step, lower, upper) * mu``, learning_rate that of the update: a schedule's
    value at ``state.count - 1``.

    Args:
      state: After at least one update; before, steps are nan. ``optax.tree.get(opt_state, "AdaBoundState")`` finds it
        in the state of :func:`adabound`, of a chain or of a wrapper.
      b1, b2, eps, gamma, eps_root: As the optimizer has them. AMSBound is known from the state.
      final_lr_ratio: As :func:`scale_by_adabound` has it; final_lr / base_lr for :func:`adabound`.

    Returns:
      A :class:`StepSizes`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jax_resnet.adabound import adabound, step_sizes
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
    steps, lower, upper = _steps_and_bounds(state, b1, b2, eps, gamma, final_lr_ratio, eps_root)
    at_lower = jax.tree.map(lambda s: jnp.mean(s <= lower), steps)
    at_upper = jax.tree.map(lambda s: jnp.mean(s >= upper), steps)
    return StepSizes(steps, lower, upper, at_lower, at_upper)


def adabound(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: ArrayLike = 0.1,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    gamma: ArrayLike = 1e-3,
    *,
    base_lr: ArrayLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: optax.Params | Callable | None = None,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    amsbound: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdaBound: starts as Adam with learning_rate, ends as SGD with momentum and final_lr.

    The formulas are at the head of this module. Everything, decay and learning rate included, is computed in at least
    float32 and rounded once, to the gradients' dtype. Under ``optax.inject_hyperparams`` with bfloat16 parameters pass
    it ``hyperparam_dtype=jnp.float32``: it would round b2 to 1.

    Args:
      learning_rate: A number, or a schedule: a function from the count of updates made (at first 0) to a number.
      final_lr: The learning rate of the SGD at the end, as long as learning_rate is base_lr; else in proportion.
      b1: Decay rate of the first moment, in [0, 1).
      b2: Decay rate of the second moment, in [0, 1).
      eps: Added to the root of the second moment.
      gamma: How fast the bounds close, > 0; at t = 1 / gamma they are a factor of 2 from their limit.
      base_lr: The learning rate that final_lr belongs to; by default learning_rate, or the schedule's value at 0. To be
        passed when that is 0 (a warm-up: pass its peak) or when learning_rate is an array, which inject_hyperparams
        makes of it: final_lr / learning_rate with a new learning_rate each time would undo the decay of final_lr.
      weight_decay: Strength of an L2 penalty: weight_decay · params is added to the gradient. May be a schedule.
      mask: Tree of bools like (a prefix of) the parameters, or a function from them to it: where to apply the decay.
      eps_root: Added to the second moment under the root; a positive one lets gradients flow through the update.
      mu_dtype: dtype in which the first moment is kept; by default that of the parameters.
      amsbound: Whether to use the largest second moment so far, as :func:`amsbound` does.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its update needs the parameters if weight_decay is not 0.

    Raises:
      ValueError: base_lr is needed and missing, or a Python number is out of range.
      TypeError: From init and update, for complex parameters or gradients.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from jax_resnet.adabound import adabound
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
    """
    ratio = _final_lr_ratio(learning_rate, final_lr, base_lr)
    return _chain_in_float32(
        _decayed_weights(weight_decay, mask),
        scale_by_adabound(b1, b2, eps, gamma, ratio, eps_root, mu_dtype, amsbound=amsbound),
        optax.scale_by_learning_rate(learning_rate),
    )


def amsbound(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: ArrayLike = 0.1,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    gamma: ArrayLike = 1e-3,
    *,
    base_lr: ArrayLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: optax.Params | Callable | None = None,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AMSBound: :func:`adabound` with the largest second moment so far in the place of the present one.

    Args:
      learning_rate, final_lr, b1, b2, eps, gamma, base_lr, weight_decay, mask, eps_root, mu_dtype: As there.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_resnet.adabound import amsbound
      >>> optimizer = amsbound(learning_rate=0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(2 * params, optimizer.init(params))
      >>> print(updates.round(3))
      [-0.1  0.1]

    References:
      See :func:`adabound`.
    """
    ratio = _final_lr_ratio(learning_rate, final_lr, base_lr)
    return _chain_in_float32(
        _decayed_weights(weight_decay, mask),
        scale_by_adabound(b1, b2, eps, gamma, ratio, eps_root, mu_dtype, amsbound=True),
        optax.scale_by_learning_rate(learning_rate),
    )


def adaboundw(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: ArrayLike = 0.1,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    gamma: ArrayLike = 1e-3,
    *,
    base_lr: ArrayLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: optax.Params | Callable | None = None,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    amsbound: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdaBound with decoupled weight decay: the parameters shrink, the moments know nothing of it.

    The update is that of :func:`adabound` minus learning_rate · weight_decay · params. Like :func:`optax.adamw` this
    scales the decay by the learning rate; the authors' AdaBoundW does not, so divide a value that was tuned with it by
    the learning rate.

    Args:
      learning_rate, final_lr, b1, b2, eps, gamma: As in :func:`adabound`.
      weight_decay: Strength of the decay. May be a schedule.
      base_lr, mask, eps_root, mu_dtype, amsbound: As in :func:`adabound`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its update needs the parameters if weight_decay is not 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_resnet.adabound import adaboundw
      >>> optimizer = adaboundw(learning_rate=0.1, weight_decay=0.5)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(2 * params, optimizer.init(params), params)
      >>> print(updates.round(3))
      [-0.15  0.2 ]

    References:
      See :func:`adabound`, and Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, ICLR 2019
    """
    ratio = _final_lr_ratio(learning_rate, final_lr, base_lr)
    return _chain_in_float32(
        scale_by_adabound(b1, b2, eps, gamma, ratio, eps_root, mu_dtype, amsbound=amsbound),
        _decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _steps_and_bounds(state, b1, b2, eps, gamma, final_lr_ratio, eps_root):
    t = jnp.asarray(state.count, jnp.result_type(float))  # float64 under x64
    correction = jnp.sqrt(_one_minus_power(b2, t)) / _one_minus_power(b1, t)
    nu = state.nu if state.nu_max is None else state.nu_max
    steps = jax.tree.map(lambda v: correction.astype(v.dtype) / (jnp.sqrt(v + eps_root) + eps), nu)
    width = 1 + 1 / (gamma * t)  # (gamma·t + 1) / (gamma·t), without its overflow to inf / inf
    return steps, final_lr_ratio / width, final_lr_ratio * width


def _one_minus_power(b, t):
    """1 - b**t; by expm1, since subtracting 0.999**t from 1 costs half of float32's digits."""
    if isinstance(b, NUMBER):
        return -jnp.expm1(t * (math.log(b) if b else -math.inf))
    return -jnp.expm1(t * jnp.log(jnp.asarray(b, t.dtype)))


def _update_moment(grads, moments, decay, order):
    """Moving average of g**order. Where g is None the moment stays, so that the state keeps its structure."""
    return _tree_map(lambda g, m: m if g is None else decay * m + (1 - decay) * g**order, grads, moments)


def _final_lr_ratio(learning_rate, final_lr, base_lr):
    is_inferred = base_lr is None
    if is_inferred:
        base_lr = learning_rate
    if callable(base_lr):
        with jax.ensure_compile_time_eval():  # a number also where the optimizer is made inside jit
            base_lr = base_lr(0)
        base_lr = base_lr if isinstance(base_lr, jax.core.Tracer) else float(base_lr)
    is_number = isinstance(base_lr, NUMBER)
    if (is_number and not base_lr > 0) or (is_inferred and not is_number):
        raise ValueError(
            f"base_lr must be a number > 0, {'the learning rate starts as' if is_inferred else 'got'} {base_lr!r}: "
            "pass base_lr, the learning rate that final_lr belongs to (of a warm-up its peak, of an injected learning "
            "rate its first value), for example base_lr=1e-3"
        )
    return final_lr / base_lr


def _decayed_weights(weight_decay, mask):
    if isinstance(weight_decay, NUMBER) and weight_decay == 0:
        return optax.identity()  # update needs no params then
    return optax.add_decayed_weights(weight_decay, mask)


def _chain_in_float32(*transforms):
    """Chain that computes in at least float32: float16 may hold learning_rate · 100 · g, but not 100 · g."""
    chain = optax.chain(*transforms)

    def update_fn(updates, state, params=None, **extra_args):
        wide_updates, state = chain.update(_widen(updates), state, _widen(params), **extra_args)
        return optax.tree.cast_like(wide_updates, updates), state

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def _widen(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, _wide_dtype(x)), tree)


def _wide_dtype(x):
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _refuse_complex(tree):
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(f"AdaBound takes real parameters and gradients, got {jnp.result_type(leaf)}")
