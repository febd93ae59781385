"""The optimizers and learning rate schedules that the experiments offer by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.frameworks.experiment import CommonOptimizerName, OptimizerName, ScheduleName
from jax_resnet.adabound import AdaBoundState, adabound, adaboundw, amsbound
from jax_resnet.train import decay_mask
from numpy_ref import optim

if TYPE_CHECKING:
    import torch

ADAMS_B2 = 0.999  # everybody's default, which make_optimizer leaves as it is


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
    if warmup_steps and name == "onecycle":
        raise ValueError("onecycle has a warm-up of its own: leave --warmup-epochs at 0")
    if warmup_steps >= steps:
        raise ValueError(f"the warm-up of {warmup_steps} steps must be shorter than the training of {steps} steps")
    rest = steps - warmup_steps
    if name == "constant":
        after = optax.constant_schedule(peak)
    elif name == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    elif name == "step":
        after = optax.piecewise_constant_schedule(peak, {max(1, rest // 2): 0.1, max(2, rest * 3 // 4): 0.1})
    else:
        after = optax.cosine_onecycle_schedule(steps, peak)
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def make_optimizer(
    name: OptimizerName,
    learning_rate: optax.Schedule,
    *,
    base_lr: float,
    final_lr: float,
    gamma: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
) -> optax.GradientTransformation:
    """One of the optimizers; weight decay leaves biases and BatchNorm alone.

    Args:
      name: adabound, amsbound, adam, amsgrad and sgd add weight_decay · w to the gradient (L2); adaboundw and adamw
        decay the weights themselves, scaled by the learning rate.
      learning_rate: a schedule.
      base_lr: the peak of the schedule, which AdaBound's final_lr refers to.
      final_lr, gamma: AdaBound's final SGD rate and the speed at which its bounds close.
      momentum: SGD's, and b1 of all others.
      dampening: SGD's momentum buffer takes in (1 - dampening) · g; equal to momentum it is the moving average of the
        gradients, which AdaBound turns into. (torch takes in the first gradient undampened; this does not.)
      weight_decay: see name.
    """
    if name in ("adabound", "amsbound", "adaboundw"):
        alias = {"adabound": adabound, "amsbound": amsbound, "adaboundw": adaboundw}[name]
        return alias(
            learning_rate,
            final_lr,
            b1=momentum,
            gamma=gamma,
            base_lr=base_lr,
            weight_decay=weight_decay,
            mask=decay_mask,
        )
    if name == "adamw":
        return optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay, mask=decay_mask)
    l2 = optax.add_decayed_weights(weight_decay, decay_mask) if weight_decay else optax.identity()
    if name == "sgd":
        trace = optax.chain(optax.scale(1 - dampening), optax.trace(momentum))
        return optax.chain(l2, trace, optax.scale_by_learning_rate(learning_rate))
    alias = {"adam": optax.adam, "amsgrad": optax.amsgrad}[name]
    return optax.chain(l2, alias(learning_rate, b1=momentum))


def moments_of(opt_state: optax.OptState) -> AdaBoundState:
    """The moments in the state of any optimizer of `make_optimizer` but SGD, wherever they are inside it."""
    if (found := optax.tree.get(opt_state, "AdaBoundState")) is not None:
        return found
    if (adam := optax.tree.get(opt_state, "ScaleByAdamState")) is not None:
        return AdaBoundState(adam.count, adam.mu, adam.nu, None)
    amsgrad = optax.tree.get(opt_state, "ScaleByAmsgradState")
    # optax corrects nu for its start at 0 before it takes the largest, AdaBoundState's is corrected after.
    correction = -np.expm1(int(amsgrad.count) * np.log(ADAMS_B2))  # 1 - ADAMS_B2**count, in all digits
    nu_max = jax.tree.map(lambda v: v * float(correction), amsgrad.nu_max)
    return AdaBoundState(amsgrad.count, amsgrad.mu, amsgrad.nu, nu_max)


def as_numbers(schedule: optax.Schedule, steps: int) -> Callable[[int], float]:
    """The schedule's first steps as a function of plain numbers, for NumPy and PyTorch; computed beforehand."""
    return np.asarray(jax.lax.map(schedule, jnp.arange(steps))).tolist().__getitem__


def refuse_uncommon(framework: str, opt: OptimizerName, dampening: float) -> None:
    """Raises a ValueError for an optimizer that a framework other than JAX does not have, or not with these settings.

    The libraries' AMSGrad differ: optax corrects the second moment for its start at 0 before it takes the largest,
    torch after.
    """
    if opt not in get_args(CommonOptimizerName):
        raise ValueError(
            f"--opt {opt} is in JAX alone: --framework {framework} has {', '.join(get_args(CommonOptimizerName))}"
        )
    if dampening and framework in ("torch", "torchvision"):
        raise ValueError("--dampening is not in torch, whose SGD takes in the first gradient undampened")


def make_numpy_optimizer(
    name: CommonOptimizerName,
    learning_rate: Callable[[int], float],
    *,
    base_lr: float,
    final_lr: float,
    gamma: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
) -> optim.GradientTransformation:
    """One of numpy_ref's optimizers; arguments as for `make_optimizer`."""
    if name in ("adabound", "amsbound"):
        alias = {"adabound": optim.adabound, "amsbound": optim.amsbound}[name]
        bounds = dict(gamma=gamma, base_lr=base_lr)
        return alias(learning_rate, final_lr, b1=momentum, **bounds, weight_decay=weight_decay, mask=decay_mask)
    if name == "adamw":
        return optim.adamw(learning_rate, b1=momentum, weight_decay=weight_decay, mask=decay_mask)
    if name == "sgd":
        optimizer = optim.sgd(learning_rate, momentum, dampening=dampening)
    else:
        optimizer = optim.adam(learning_rate, b1=momentum)
    return optim.add_decayed_weights(optimizer, weight_decay, decay_mask)


def make_torch_optimizer(
    name: CommonOptimizerName,
    model: torch.nn.Module,
    *,
    base_lr: float,
    final_lr: float,
    gamma: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """One of PyTorch's optimizers or of torch_ref's for the parameters of a module that are not frozen.

    Arguments as for `make_optimizer`; the learning rate is base_lr until somebody changes it in the groups.
    """
    import torch

    from torch_ref.adabound import AdaBound, AMSBound

    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": weight_decay},
        {"params": [param for param in params if param.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (momentum, 0.999)
    if name in ("adabound", "amsbound"):
        bounded = {"adabound": AdaBound, "amsbound": AMSBound}[name]
        return bounded(groups, base_lr, betas, final_lr=final_lr, gamma=gamma)
    if name == "sgd":
        return torch.optim.SGD(groups, base_lr, momentum)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](groups, base_lr, betas)
