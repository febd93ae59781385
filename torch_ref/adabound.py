r"""AdaBound and AMSBound (Luo et al., ICLR 2019, https://openreview.net/forum?id=Bkg3g2R9FX) for PyTorch.

Each entry of a parameter changes by u. g is the entry's gradient plus weight_decay times the entry, and t counts the
parameter's updates from 1:

.. math::

  m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
  s_t &= \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{1}{\sqrt{v_t} + \varepsilon} \\
  u_t &= -\alpha_t \cdot \mathrm{clip}\left(s_t, r \tfrac{\gamma t}{\gamma t + 1}, r \tfrac{\gamma t + 1}{\gamma t}
         \right) \cdot m_t, \qquad r = \text{final\_lr} / \text{base\_lr}

AMSBound uses the largest v so far instead of v. :math:`\alpha_t` is the current learning rate of the group, which a
scheduler may change. base_lr is by default the learning rate with which the group was added. The formulas are those of
the authors' code (https://github.com/Luolc/AdaBound). This module keeps base_lr in the group. The authors' code has no
base_lr for groups that are added later and does not save base_lr in the state_dict.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

GROUP_OPTIONS = ("lr", "base_lr", "betas", "final_lr", "gamma", "eps", "weight_decay", "amsbound")


class AdaBound(Optimizer):
    """Starts as Adam with learning rate lr and ends as SGD with momentum and learning rate final_lr.

    Moments and steps use at least float32 for all parameter dtypes, because a decay of 0.999 rounds to 1 in bfloat16.

    Examples:
      >>> weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
      >>> optimizer = AdaBound([weight], lr=0.1, final_lr=0.5)
      >>> for _ in range(3):
      ...     optimizer.zero_grad()
      ...     loss = (weight**2).sum()
      ...     loss.backward()
      ...     optimizer.step()
      ...     print(f"{loss:.2f}")
      14.00
      12.83
      11.72
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        final_lr: float = 0.1,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsbound: bool = False,
        *,
        foreach: bool | None = None,
    ):
        """Creates the optimizer.

        Args:
          params: parameters, named parameters, or groups: dicts of parameters with their own options. A group may set
            base_lr, the learning rate that final_lr belongs to, and every argument below except foreach. The default
            of base_lr is the group's lr. Pass base_lr if lr is 0.
          lr: the learning rate.
          betas: the decay rates of the two moments, in [0, 1).
          final_lr: the learning rate of SGD at the end if lr equals base_lr. It scales with lr.
          gamma: how fast the bounds converge, > 0. At t = 1 / gamma they are a factor of 2 from their limit.
          eps: added to the root of the second moment.
          weight_decay: strength of an L2 penalty: weight_decay · parameter is added to the gradient.
          amsbound: whether to use the largest second moment so far, as AMSBound does.
          foreach: whether one kernel updates many parameters, which needs more memory. None means only on CUDA, where
            kernel launches take most of the time. On a CPU, memory access dominates, so separate updates are faster.

        Raises:
          ValueError: an option is out of range.
        """
        defaults = dict(
            lr=lr,
            betas=betas,
            final_lr=final_lr,
            gamma=gamma,
            eps=eps,
            weight_decay=weight_decay,
            amsbound=amsbound,
            foreach=foreach,
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Adds parameters with their own options. The optimizer's defaults replace missing options.

        Raises:
          ValueError: an option is out of range.
        """
        group = {**self.defaults, **param_group}
        group.setdefault("base_lr", float(group["lr"]))  # float copies: schedulers change lr tensors in place
        _check_options(group)
        super().add_param_group(group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the state of an optimizer with the same groups, to continue bit for bit.

        Raises:
          ValueError: the groups differ in number or size, or a group lacks one of AdaBound's options.
        """
        for number, group in enumerate(state_dict["param_groups"]):
            missing = [option for option in GROUP_OPTIONS if option not in group]
            if missing:
                hint = "is this the state_dict of another optimizer?"
                if missing == ["base_lr"]:
                    hint = "for the authors' AdaBound, add base_lr, the initial lr of the group"
                raise ValueError(
                    f"param_groups[{number}] of the state_dict must have {', '.join(GROUP_OPTIONS)}, but lacks "
                    f"{', '.join(missing)}: {hint}"
                )
        super().load_state_dict(state_dict)
        # torch casts the moments to the parameters' dtype and shares moments that already have it: copy the originals.
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if name != "step":
                    self.state[param][name] = value.to(param.device, _wide_dtype(param), copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
          closure: clears the gradients, computes the loss and its gradients, and returns the loss.

        Returns:
          What the closure returned, or None.

        Raises:
          TypeError: a gradient is sparse or complex. In this case step changes no parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for group in self.param_groups:
            alike = defaultdict(list)  # by number of updates, and by device and dtype for foreach
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param] or self._first_state(param, group)
                    state["step"] += 1
                    alike[state["step"], param.device, param.dtype].append(param)
            for (t, device, _), params in alike.items():
                foreach = self.defaults["foreach"]
                update = _update_together if foreach or (foreach is None and device.type == "cuda") else _update
                update(params, [self.state[param] for param in params], group, t)
        return loss

    def _first_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        moments = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsbound"]  # torch.optim.Adam's names
        state = {name: torch.zeros_like(param, dtype=_wide_dtype(param)) for name in moments}
        self.state[param] = {"step": 0} | state
        return self.state[param]

    def _check_gradients(self) -> None:
        for param in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                raise TypeError(
                    f"AdaBound takes dense gradients, got {param.grad.layout} for a parameter {tuple(param.shape)}: "
                    "use sparse=False in nn.Embedding"
                )
            if param.grad.is_complex():
                raise TypeError(
                    f"AdaBound takes real gradients, got {param.grad.dtype} for a parameter {tuple(param.shape)}"
                )


class AMSBound(AdaBound):
    """AdaBound with the largest second moment so far. Takes AdaBound's arguments except amsbound."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        final_lr: float = 0.1,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
    ):
        super().__init__(params, lr, betas, final_lr, gamma, eps, weight_decay, amsbound=True, foreach=foreach)


def _update(params: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any], t: int) -> None:
    """Applies update number t to these parameters, one after the other."""
    (beta1, beta2), eps = group["betas"], group["eps"]
    dtype = _wide_dtype(params[0])
    correction, least, most = _correction_and_limits(group, t, dtype)
    for param, state in zip(params, states, strict=True):
        m, v = state["exp_avg"], state["exp_avg_sq"]
        grad = param.grad.to(dtype)
        if group["weight_decay"]:
            grad = grad.add(param, alpha=group["weight_decay"])
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if group["amsbound"]:
            v = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
        denominator = v.sqrt().add_(eps).clamp_(least, most)
        param.addcdiv_(m, denominator, value=-float(group["lr"]) * correction)


def _update_together(params: list[Tensor], states: list[dict[str, Any]], group: Mapping[str, Any], t: int) -> None:
    """`_update` with one call per operation for all parameters, which must have the same device and dtype."""
    (beta1, beta2), eps = group["betas"], group["eps"]
    dtype = _wide_dtype(params[0])
    correction, least, most = _correction_and_limits(group, t, dtype)
    m, v = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    grads = [param.grad.to(dtype) for param in params]
    if group["weight_decay"]:
        grads = torch._foreach_add(grads, [param.to(dtype) for param in params], alpha=group["weight_decay"])
    torch._foreach_mul_(m, beta1)
    torch._foreach_add_(m, grads, alpha=1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
    if group["amsbound"]:
        largest = [state["max_exp_avg_sq"] for state in states]
        torch._foreach_maximum_(largest, v)
        v = largest
    denominators = torch._foreach_sqrt(v)
    torch._foreach_add_(denominators, eps)
    torch._foreach_clamp_min_(denominators, least)
    torch._foreach_clamp_max_(denominators, most)
    torch._foreach_addcdiv_(params, m, denominators, value=-float(group["lr"]) * correction)


def _correction_and_limits(group: Mapping[str, Any], t: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Returns the bias correction of the moments and the limits of the denominator.

    For correction c and denominator d, clip(c / d, lower, upper) · m equals c · m / clip(d, c / upper, c / lower). The
    second form makes fewer passes over memory.
    """
    beta1, beta2 = group["betas"]
    correction = math.sqrt(_one_minus_power(beta2, t)) / _one_minus_power(beta1, t)
    limit = group["final_lr"] / group["base_lr"]
    width = 1 + 1 / (group["gamma"] * t)
    lower, upper = limit / width, limit * width
    return correction, correction / upper, min(correction / lower, torch.finfo(dtype).max)


def _one_minus_power(beta: float, t: int) -> float:
    """1 - beta**t without cancellation."""
    return -math.expm1(t * math.log(beta)) if beta else 1.0


def _wide_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _check_options(group: Mapping[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for name, value, is_valid, expected in (
        ("lr", group["lr"], group["lr"] >= 0, ">= 0"),
        ("betas[0]", beta1, 0 <= beta1 < 1, "in [0, 1)"),
        ("betas[1]", beta2, 0 <= beta2 < 1, "in [0, 1)"),
        ("final_lr", group["final_lr"], group["final_lr"] > 0, "> 0"),
        ("gamma", group["gamma"], group["gamma"] > 0, "> 0"),
        ("eps", group["eps"], group["eps"] >= 0, ">= 0"),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, ">= 0"),
    ):
        if not is_valid:
            raise ValueError(f"{name} must be {expected}, got {value}")
    if not group["base_lr"] > 0:
        raise ValueError(
            f"base_lr, by default lr, must be > 0, got {group['base_lr']}: pass the learning rate that final_lr "
            'belongs to as base_lr in a group, {"params": ..., "lr": 0.0, "base_lr": 1e-3}'
        )
