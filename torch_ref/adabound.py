r"""AdaBound and AMSBound (Luo et al., ICLR 2019, https://openreview.net/forum?id=Bkg3g2R9FX) for PyTorch.

With t counted from 1 for each parameter, for every entry, whose gradient (plus weight_decay · parameter) is g:

.. math::

  m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
  s_t &= \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{1}{\sqrt{v_t} + \varepsilon} \\
  u_t &= -\alpha_t \cdot \mathrm{clip}\left(s_t, r \tfrac{\gamma t}{\gamma t + 1}, r \tfrac{\gamma t + 1}{\gamma t}
         \right) \cdot m_t, \qquad r = \text{final\_lr} / \text{base\_lr}

AMSBound has the largest v so far in the place of v. :math:`\alpha_t` is the group's learning rate at that step, which a
scheduler may change; base_lr is the one with which the group was added. These are the rules of the authors' code
(https://github.com/Luolc/AdaBound), except that base_lr is kept in the group: theirs is lost with groups that are added
later and is not in the state_dict.
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
    """Starts as Adam with learning rate lr, ends as SGD with momentum and learning rate final_lr.

    Moments are kept and steps computed in at least float32, whatever the parameters' dtype (in bfloat16 a decay of
    0.999 is none at all).

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
        """Takes what torch's optimizers take.

        Args:
          params: parameters, named parameters, or dicts of them with options of their own: any argument below but
            foreach, and base_lr, the learning rate that final_lr belongs to (by default the group's lr; to be passed
            where that is 0).
          lr: the learning rate.
          betas: the decay rates of the two moments, in [0, 1).
          final_lr: the learning rate of the SGD at the end, as long as lr is base_lr; else in proportion.
          gamma: how fast the bounds close, > 0; at t = 1 / gamma they are a factor of 2 from their limit.
          eps: added to the root of the second moment.
          weight_decay: strength of an L2 penalty: weight_decay · parameter is added to the gradient.
          amsbound: whether to use the largest second moment so far, as AMSBound does.
          foreach: whether one kernel updates many parameters, which takes more memory. By default on CUDA only: there
            the time goes into launching kernels; on a CPU, where it goes into memory, parameter by parameter is faster.

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
        """Adds parameters with options of their own; what is not given is as the optimizer was made with.

        Raises:
          ValueError: an option is out of range.
        """
        group = {**self.defaults, **param_group}
        group.setdefault("base_lr", float(group["lr"]))  # a copy: schedulers change a learning rate's tensor in place
        _check_options(group)
        super().add_param_group(group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from the state of an optimizer with the same groups, bit for bit.

        Raises:
          ValueError: the groups differ in number or size, or lack options, as those of other optimizers do.
        """
        for number, group in enumerate(state_dict["param_groups"]):
            missing = [option for option in GROUP_OPTIONS if option not in group]
            if missing:
                raise ValueError(
                    f"the state_dict's param_groups[{number}] must have AdaBound's options, there is no "
                    f"{', '.join(missing)}: if it is of another AdaBound, add base_lr, the lr it began with"
                )
        super().load_state_dict(state_dict)
        # torch rounds the moments to the parameters' dtype, and shares those that it need not round.
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
          TypeError: a gradient is sparse or complex; then no parameter is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for group in self.param_groups:
            alike = defaultdict(list)  # one list: the same number of updates so far, and what foreach needs to be fast
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
    """AdaBound with the largest second moment so far in the place of the present one; its arguments."""

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
    """Update number t of these parameters, one after the other."""
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
    """`_update` for parameters of one device and dtype, operation after operation."""
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
    """The correction of the moments' bias, and limits of the denominator.

    With correction c and denominator d, clip(c / d, lower, upper) · m is c · m / clip(d, c / upper, c / lower), which
    passes fewer times over memory.
    """
    beta1, beta2 = group["betas"]
    correction = math.sqrt(_one_minus_power(beta2, t)) / _one_minus_power(beta1, t)
    limit = group["final_lr"] / group["base_lr"]
    width = 1 + 1 / (group["gamma"] * t)
    lower, upper = limit / width, limit * width
    return correction, correction / upper, min(correction / lower, torch.finfo(dtype).max)


def _one_minus_power(beta: float, t: int) -> float:
    """1 - beta**t with all its digits."""
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
            f"base_lr must be > 0, got {group['base_lr']}: it is the learning rate that final_lr belongs to, by "
            'default lr; pass it in a group, {"params": ..., "lr": 0.0, "base_lr": 1e-3}'
        )
