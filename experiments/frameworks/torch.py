"""torch_ref and torchvision in the experiments: networks, weights in and out, optimizers, trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import jax_resnet.weights
import torch_ref.resnet
from experiments.frameworks.common import Array, Arrays, Network, Recipe, ResNet, Training
from experiments.frameworks.schedules import as_numbers
from experiments.machine import torch_device
from jax_resnet.adabound import AdaBoundState
from torch_ref import train
from torch_ref.adabound import AdaBound, AMSBound


def device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_resnet(network: ResNet, framework: str = "torch") -> nn.Module:
    """The module of torch_ref ("torch") or torchvision, with its own initial weights.

    Raises:
      ValueError: if torchvision has no such network.
    """
    if framework == "torch":
        return getattr(torch_ref.resnet, network.arch)(**network.options)
    if why_not := network.why_not_torchvision:
        raise ValueError(f"torchvision has no {network}: {why_not}")
    import torchvision

    model = getattr(torchvision.models, network.arch)(num_classes=network.num_classes)
    if network.in_channels != 3:  # torchvision's networks take only colour
        model.conv1 = nn.Conv2d(network.in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return model


def to_tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Tensors that share memory with the arrays, except with those that PyTorch must not write to, such as JAX's."""
    return {name: torch.from_numpy(a if a.flags.writeable else a.copy()) for name, a in arrays.items()}


def to_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """NumPy arrays, which on a CPU share memory with the tensors."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def channels_first(images: Any) -> Tensor:
    """(N, H, W, C) -> a new tensor (N, C, H, W)."""
    return torch.from_numpy(np.moveaxis(np.asarray(images), -1, 1).copy())


def load_weights(model: nn.Module, arrays: Arrays) -> nn.Module:
    """Copies every weight into the module, which keeps its own counts of batches; returns the module."""
    counts = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict(counts | to_tensors(arrays))
    return model


def make_logits(network: ResNet, arrays: Arrays) -> Callable[[Array], Array]:
    """A function from images (N, H, W, C) to logits, in evaluation; arrays as in a weight file."""
    model = load_weights(make_resnet(network), arrays).eval()

    def logits(images: Array) -> Array:
        with torch.inference_mode():
            return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    return logits


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe for the parameters of a module that are not frozen.

    The learning rate is the experiment's until the training step changes it in the groups.
    """
    experiment = recipe.experiment
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": experiment.weight_decay},
        {"params": [param for param in params if param.ndim <= 1], "weight_decay": 0.0},
    ]
    rate, betas = experiment.learning_rate, (experiment.momentum, 0.999)
    if experiment.opt == "sgd":
        return torch.optim.SGD(groups, rate, experiment.momentum)
    if experiment.opt in ("adam", "adamw"):
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[experiment.opt](groups, rate, betas)
    bounded = {"adabound": AdaBound, "amsbound": AMSBound}[experiment.opt]
    return bounded(groups, rate, betas, final_lr=experiment.final_lr, gamma=experiment.gamma)


def moments_of(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> AdaBoundState:
    """The moments of any optimizer of `make_optimizer` but SGD."""
    found = {name: optimizer.state[param] for name, param in params.items() if param in optimizer.state}
    trees = []
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        of_all = {name: kept[key] for name, kept in found.items() if key in kept}
        trees.append(jax_resnet.weights.from_torch(of_all)[0] or None)
    return AdaBoundState(int(next(iter(found.values()))["step"]), *trees)


def make_training(network: Network, recipe: Recipe) -> Training:
    """See `experiments.frameworks.common.make_training`."""
    experiment = recipe.experiment
    model = load_weights(network.torch(experiment.framework), network.to_torch(network.params, network.batch_stats))
    model.to(device(), getattr(torch, experiment.precision))
    if recipe.freeze_backbone:
        train.freeze_backbone(model)
    optimizer = make_optimizer(recipe, model)

    def to_labels(labels: Array) -> Tensor:
        return torch.from_numpy(labels.astype(np.int64)).to(device())

    step = train.make_train_step(
        model,
        optimizer,
        learning_rate=as_numbers(recipe.schedule, recipe.steps),
        label_smoothing=experiment.label_smoothing,
        preprocess=lambda images, number: channels_first(recipe.preprocess_train(images, number)).to(device()),
    )
    test = train.make_eval_step(
        model, preprocess=lambda images: channels_first(recipe.preprocess_test(images)).to(device())
    )

    def train_step(state: Any, images: Array, labels: Array) -> tuple[Any, dict[str, Array]]:
        state, metrics = step(state, images, to_labels(labels))
        return state, to_arrays(metrics)

    def eval_step(params: Any, batch_stats: Any, images: Array, labels: Array) -> dict[str, Array]:
        return to_arrays(test(params, batch_stats, images, to_labels(labels)))

    return Training(
        experiment.framework,
        train.create_train_state(model, optimizer),
        train_step,
        eval_step,
        torch_device(),
        lambda params, batch_stats: to_arrays(params | batch_stats),
        lambda state: moments_of(optimizer, state.params),
    )
