r"""SGD, Adam, AdamW, AdaBound and AMSBound, one formula each, on nested dicts of arrays.

An optimizer is a pair of pure functions, as in optax. `init` returns a state of zeros for the parameters. `update`
turns gradients and a state into updates and the next state. No function changes its arguments:

>>> import numpy as np
>>> from numpy_ref import optim
>>> optimizer = optim.adam(learning_rate=0.1)
>>> params = {"fc": {"weight": np.array([1.0, -2.0])}}
>>> state = optimizer.init(params)
>>> for _ in range(3):
...     grads = {"fc": {"weight": 2 * params["fc"]["weight"]}}
...     updates, state = optimizer.update(grads, state, params)
...     params = optim.apply_updates(params, updates)
>>> print(params["fc"]["weight"].round(3))
[ 0.702 -1.701]

In the formulas, g is the gradient, p the parameter and t the number of the update, starting at 1. The learning rate α
is a number or a schedule. A schedule is called with the number of updates made so far, t - 1. Moments and formulas use
at least float32, because g² of a small g underflows in float16. Updates have the gradients' dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Tree = Mapping[str, Any]  # a nested dict whose leaves are arrays
Schedule = Callable[[int], float]


class GradientTransformation(NamedTuple):
    """An optimizer. :func:`apply_updates` adds its updates to the parameters."""

    init: Callable[[Tree], Any]  # params -> state
    update: Callable[..., tuple[Tree, Any]]  # (grads, state, params=None) -> (updates, state)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Returns params + updates as new arrays with the parameters' dtypes."""
    return _tree_map(lambda p, u: np.asarray(p + u, np.asarray(p).dtype), params, updates)


def add_decayed_weights(
    optimizer: GradientTransformation, weight_decay: float, mask: Tree | Callable[[Tree], Tree] | None = None
) -> GradientTransformation:
    """Adds an L2 penalty: the returned optimizer passes g + weight_decay · p instead of g to the given optimizer.

    Args:
      optimizer: Any optimizer of this module. Its state has the same form as before.
      weight_decay: Strength of the penalty. Unless it is 0, update needs params.
      mask: Which parameters decay: a nested dict of bools like params, or a function from params to such a dict.
    """

    def update(grads, state, params=None):
        decayed = _decayed(grads, params, weight_decay, mask)
        grads = _tree_map(lambda g, p: np.asarray(g + weight_decay * p, np.asarray(g).dtype), grads, decayed)
        return optimizer.update(grads, state, params)

    return GradientTransformation(optimizer.init, update)


# SGD.


class SgdState(NamedTuple):
    """count: the number of updates made. trace: the momentum buffer, a tree like the parameters."""

    count: int
    trace: Tree


def sgd(
    learning_rate: float | Schedule, momentum: float = 0.0, nesterov: bool = False, dampening: float = 0.0
) -> GradientTransformation:
    r"""Stochastic gradient descent with a momentum buffer that starts at 0.

    .. math::

      b_t &= \text{momentum} \cdot b_{t-1} + (1 - \text{dampening}) \, g_t \\
      u_t &= -\alpha_t b_t \qquad \text{with Nesterov's momentum} \quad -\alpha_t (g_t + \text{momentum} \cdot b_t)

    If dampening equals momentum, the buffer is the moving average of the gradients. AdaBound converges to this SGD.
    In torch the first update differs: the first gradient enters the buffer without dampening.

    Raises:
      ValueError: momentum is negative, or nesterov is used without momentum or with dampening (torch raises this too).
    """
    _check_ranges(momentum=momentum)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov needs a momentum > 0 and no dampening, got momentum {momentum} and dampening {dampening}"
        )

    def init(params):
        return SgdState(0, _zeros_like(params))

    def update(grads, state, params=None):
        rate = _learning_rate(learning_rate, state.count)

        def rule(g, b):
            b = momentum * b + (1 - dampening) * g
            return -rate * (g + momentum * b if nesterov else b), b

        updates, trace = _elementwise(rule, (grads,), (state.trace,))
        return updates, SgdState(state.count + 1, trace)

    return GradientTransformation(init, update)


# Adam and AdamW.


class AdamState(NamedTuple):
    """count: the number of updates made. mu, nu: the first and second moments, trees like the parameters."""

    count: int
    mu: Tree
    nu: Tree


def adam(
    learning_rate: float | Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_root: float = 0.0
) -> GradientTransformation:
    r"""Adam: the moving average of g divided by the root of the moving average of g², both corrected for starting at 0.

    .. math::

      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
      u_t &= -\alpha_t \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t) + \bar\varepsilon} + \varepsilon}

    Args:
      learning_rate: α, a number or a schedule.
      b1, b2: β₁ and β₂, the decay rates of the moments, in [0, 1).
      eps, eps_root: ε and, under the root, ε̄. Both are >= 0.

    Raises:
      ValueError: b1, b2, eps or eps_root is out of range.

    References:
      Kingma and Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, ICLR 2015
    """
    return adamw(learning_rate, b1, b2, eps, eps_root, weight_decay=0.0)


def adamw(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    *,
    weight_decay: float = 1e-4,
    mask: Tree | Callable[[Tree], Tree] | None = None,
) -> GradientTransformation:
    """Adam with decoupled weight decay: :func:`adam`'s update minus α · weight_decay · p.

    Args:
      learning_rate, b1, b2, eps, eps_root: As for :func:`adam`.
      weight_decay: Strength of the decay. Unless it is 0, update needs params.
      mask: Which parameters decay: a nested dict of bools like params, or a function from params to such a dict.

    Raises:
      ValueError: As for :func:`adam`.

    References:
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, ICLR 2019
    """
    _check_ranges(b1=b1, b2=b2, eps=eps, eps_root=eps_root)

    def init(params):
        return AdamState(0, _zeros_like(params), _zeros_like(params))

    def update(grads, state, params=None):
        t = state.count + 1
        rate = _learning_rate(learning_rate, state.count)
        m_correction, v_correction = _one_minus_power(b1, t), _one_minus_power(b2, t)

        def rule(g, p, m, v):
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            step = (m / m_correction) / (np.sqrt(v / v_correction + eps_root) + eps)
            return -rate * (step + weight_decay * p), m, v

        decayed = _decayed(grads, params, weight_decay, mask)
        updates, mu, nu = _elementwise(rule, (grads, decayed), (state.mu, state.nu))
        return updates, AdamState(t, mu, nu)

    return GradientTransformation(init, update)


# AdaBound and AMSBound.


class AdaBoundState(NamedTuple):
    """count: the number of updates made. mu, nu: the first and second moments. nu_max: AMSBound's largest nu so far."""

    count: int
    mu: Tree
    nu: Tree
    nu_max: Tree | None = None


def adabound(
    learning_rate: float | Schedule,
    final_lr: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    gamma: float = 1e-3,
    *,
    base_lr: float | None = None,
    weight_decay: float = 0.0,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    eps_root: float = 0.0,
    amsbound: bool = False,
) -> GradientTransformation:
    r"""AdaBound: Adam with step sizes clipped to bounds that converge to the step size of SGD.

    .. math::

      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
      s_t &= \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{1}{\sqrt{v_t + \bar\varepsilon} + \varepsilon} \\
      u_t &= -\alpha_t \cdot \mathrm{clip}\left(s_t, r \tfrac{\gamma t}{\gamma t + 1}, r \tfrac{\gamma t + 1}{\gamma t}
             \right) \cdot m_t, \qquad r = \text{final\_lr} / \text{base\_lr}

    Args:
      learning_rate: α, a number or a schedule.
      final_lr: The learning rate of SGD at the end if learning_rate equals base_lr. It scales with learning_rate.
      b1, b2: β₁ and β₂, the decay rates of the moments, in [0, 1).
      eps, eps_root: ε and, under the root, ε̄. Both are >= 0.
      gamma: γ, how fast the bounds converge, > 0. At t = 1 / γ they are a factor of 2 from their limit.
      base_lr: The learning rate that final_lr belongs to, by default learning_rate or the schedule's value at 0. Pass
        it if this default is 0 (for a warm-up, pass the peak) or if learning_rate is an array.
      weight_decay: Strength of an L2 penalty: weight_decay · p is added to g. Unless it is 0, update needs params.
      mask: Which parameters decay: a nested dict of bools like params, or a function from params to such a dict.
      amsbound: Whether to use the largest v so far instead of v.

    Raises:
      ValueError: base_lr is required and missing, or a number is out of range.

    References:
      Luo et al., `Adaptive Gradient Methods with Dynamic Bound of Learning Rate
      <https://openreview.net/forum?id=Bkg3g2R9FX>`_, ICLR 2019, as the authors' code computes it
    """
    _check_ranges(b1=b1, b2=b2, eps=eps, eps_root=eps_root, gamma=gamma, final_lr=final_lr)
    ratio = final_lr / _base_lr(learning_rate, base_lr)

    def init(params):
        return AdaBoundState(0, *(_zeros_like(params) for _ in range(3 if amsbound else 2)))

    def update(grads, state, params=None):
        t = state.count + 1
        rate = _learning_rate(learning_rate, state.count)
        correction = math.sqrt(_one_minus_power(b2, t)) / _one_minus_power(b1, t)
        width = 1 + 1 / (gamma * t)  # (γt + 1) / γt, without its ∞ / ∞ for an infinite γ
        lower, upper = ratio / width, ratio * width

        def rule(g, p, m, v, v_max=None):
            g = g + weight_decay * p
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            v_max = np.maximum(v_max, v) if amsbound else v
            with np.errstate(divide="ignore"):  # v = ε = 0 gives an infinite step; clip bounds it
                step = correction / (np.sqrt(v_max + eps_root) + eps)
            return -rate * np.clip(step, lower, upper) * m, m, v, v_max

        decayed = _decayed(grads, params, weight_decay, mask)
        moments = (state.mu, state.nu, state.nu_max) if amsbound else (state.mu, state.nu)
        updates, *moments = _elementwise(rule, (grads, decayed), moments)
        return updates, AdaBoundState(t, *moments)

    return GradientTransformation(init, update)


amsbound = functools.partial(adabound, amsbound=True)


# Shared by all optimizers.


def _check_ranges(**hyperparameters):
    for name, value in hyperparameters.items():
        if name in ("b1", "b2"):
            is_valid, expected = 0 <= value < 1, "in [0, 1)"
        elif name == "gamma":
            is_valid, expected = value > 0, "> 0"
        else:
            is_valid, expected = value >= 0, ">= 0"
        if not is_valid:
            raise ValueError(f"{name} must be {expected}, got {value}")


def _learning_rate(learning_rate, count):
    return float(learning_rate(count) if callable(learning_rate) else learning_rate)


def _base_lr(learning_rate, base_lr):
    """Returns the learning rate that final_lr belongs to. Refuses an array, because its value may change."""
    is_inferred = base_lr is None
    if is_inferred:
        base_lr = float(learning_rate(0)) if callable(learning_rate) else learning_rate
    if not isinstance(base_lr, (int, float)) or not base_lr > 0:
        raise ValueError(
            f"base_lr must be a number > 0, got {base_lr!r}{' from learning_rate' if is_inferred else ''}: "
            "pass base_lr, the learning rate that final_lr belongs to (for a warm-up, its peak), such as base_lr=1e-3"
        )
    return float(base_lr)


def _one_minus_power(b, t):
    """1 - b^t by expm1, because the subtraction 1 - 0.999 loses three digits."""
    return -math.expm1(t * math.log(b)) if b else 1.0


def _decayed(grads, params, weight_decay, mask):
    """Returns a tree like the gradients: the parameters that decay, and zeros for the other parameters."""

    def zeros(x):
        return np.broadcast_to(np.zeros((), np.asarray(x).dtype), np.shape(x))  # stores only one number

    if weight_decay == 0:
        return _tree_map(zeros, grads)
    if params is None:
        raise ValueError(f"weight_decay is {weight_decay}: pass the parameters too, as update(grads, state, params)")
    mask = mask(params) if callable(mask) else mask
    return params if mask is None else _tree_map(lambda p, decays: p if decays else zeros(p), params, mask)


def _zeros_like(params):
    return _tree_map(lambda p: np.zeros_like(_widened(p)), params)


def _widened(x):
    x = np.asarray(x)
    if np.iscomplexobj(x):
        raise TypeError(f"parameters and gradients must be real, got {x.dtype}")
    return x.astype(np.promote_types(x.dtype, np.float32), copy=False)


def _elementwise(rule, inputs, moments):
    """Applies rule(g, ..., *moments) -> (update, *new moments) to each parameter's arrays, in at least float32.

    Args:
      inputs: Trees; the first tree is the gradients.
      moments: Trees with the same names and shapes.

    Returns:
      [updates, *new moments]: trees with the gradients' dtypes and the moments' dtypes.
    """

    def apply(*arrays):
        shapes = [np.shape(array) for array in arrays]
        if len(set(shapes)) > 1:
            raise ValueError(f"a gradient, its parameter and its moments must have the same shape, got {shapes}")
        dtypes = [np.asarray(array).dtype for array in (arrays[0], *arrays[len(inputs) :])]
        results = rule(*map(_widened, arrays))
        return [np.asarray(result, dtype) for result, dtype in zip(results, dtypes, strict=False)]

    results = _tree_map(apply, *inputs, *moments)
    return [_tree_map(lambda arrays, i=i: arrays[i], results) for i in range(1 + len(moments))]


def _tree_map(function, *trees, path=()):
    """Applies function to the leaves of trees with the same structure. path has the keys that lead to these trees."""
    names = [sorted(tree) if isinstance(tree, Mapping) else "an array" for tree in trees]
    if any(other != names[0] for other in names):
        place, found = ".".join(map(str, path)) or "the root", " and ".join(map(str, names))
        raise ValueError(f"trees must have the same names, but at {place} they have {found}")
    if isinstance(trees[0], Mapping):
        return {name: _tree_map(function, *(tree[name] for tree in trees), path=(*path, name)) for name in trees[0]}
    return function(*trees)
