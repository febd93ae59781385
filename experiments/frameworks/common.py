"""One training in JAX, NumPy or PyTorch: the same weights, pictures, losses and updates behind one pair of steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_resnet.resnet
import jax_resnet.train
import jax_resnet.weights
import numpy_ref.fast
import numpy_ref.train
import numpy_ref.weights
from experiments.frameworks.experiment import Experiment, FrameworkName, OptimizerName
from experiments.frameworks.optimizers import (
    as_numbers,
    make_numpy_optimizer,
    make_optimizer,
    make_torch_optimizer,
    moments_of,
    refuse_uncommon,
)
from experiments.machine import jax_device, numpy_device, torch_device
from jax_resnet.adabound import AdaBoundState

if TYPE_CHECKING:
    import torch

Array = np.ndarray


class Network(NamedTuple):
    """A network three times over, and the weights that it starts from.

    jax, numpy: the configuration and apply, as the frameworks' make_train_step take them.
    torch: makes the nn.Module.
    params, batch_stats: nested dicts of NumPy arrays, as jax and numpy take them.
    to_torch: (params, batch_stats) -> {name: array} as the module's state_dict has them.
    """

    jax: tuple[Any, Callable[..., Any]]
    numpy: tuple[Any, Callable[..., Any]]
    torch: Callable[[], torch.nn.Module]
    params: Mapping[str, Any]
    batch_stats: Mapping[str, Any]
    to_torch: Callable[[Any, Any], dict[str, Array]] = jax_resnet.weights.to_torch


def resnet_network(
    arch: str,
    params: Any,
    batch_stats: Any,
    *,
    num_classes: int,
    in_channels: int,
    batch_norm: bool = True,
    torchvision: bool = False,
) -> Network:
    """A ResNet; in PyTorch torch_ref's, or torchvision's, which has BatchNorm."""
    settings = dict(num_classes=num_classes, in_channels=in_channels, batch_norm=batch_norm)

    def make_module() -> torch.nn.Module:
        if not torchvision:
            import torch_ref.resnet

            return getattr(torch_ref.resnet, arch)(**settings)
        import torch
        import torchvision as library

        module = getattr(library.models, arch)(num_classes=num_classes)
        if in_channels != 3:  # torchvision's take colour alone
            module.conv1 = torch.nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        return module

    return Network(
        (getattr(jax_resnet.resnet, arch)(**settings), jax_resnet.resnet.apply),
        (getattr(numpy_ref.fast, arch)(**settings), numpy_ref.fast.apply),
        make_module,
        params,
        batch_stats,
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained, whatever computes it.

    experiment: with its learning_rate; clip_norm, loss_scale, accumulate, ema and remat are for JAX; float64 needs
      jax.enable_x64.
    schedule: the learning rate by step.
    steps: of the whole training.
    preprocess_train: (uint8 images (N, H, W, C), step) -> floats of this precision; traced into JAX's step, called by
      the others.
    preprocess_test: the same without a step.
    freeze_backbone: train the dense layer alone; the rest runs as in evaluation.
    skip_nonfinite: see `jax_resnet.train.make_train_step`; for JAX, as is
    devices: how many of JAX's devices share the batch; 1 leaves everything on the first.
    """

    experiment: Experiment
    schedule: optax.Schedule
    steps: int
    preprocess_train: Callable[[Any, Any], Any]
    preprocess_test: Callable[[Any], Any]
    freeze_backbone: bool = False
    skip_nonfinite: int = 0
    devices: int = 1


class Training(NamedTuple):
    """A training that can begin.

    framework: what computes; only JAX's training can be resumed, compiled ahead and searched.
    state, train_step, eval_step: as `experiments.training.loop.Loop` takes them.
    device: where it is computed, as plain JSON values.
    arrays: (params, batch_stats) -> {torchvision's name: array in torchvision's layout}.
    moments: state -> count, first and second moments of Adam's family, under JAX's names and layout.
    put: (images, labels) of this process -> the batch as the steps take it.
    place: a state of NumPy arrays -> the same where the steps take it; JAX's.
    averages: state -> params and batch_stats averaged over the steps, None without.
    search: see `jax_resnet.train.make_nonfinite_search`; JAX's.
    """

    framework: FrameworkName
    state: State
    train_step: Callable[..., tuple[State, dict[str, Any]]]
    eval_step: Callable[..., dict[str, Any]]
    device: dict[str, Any]
    arrays: Callable[[Any, Any], dict[str, Array]]
    moments: Callable[[State], AdaBoundState]
    put: Callable[[Array, Array], tuple[Any, Any]] = lambda images, labels: (images, labels)
    place: Callable[[State], State] = lambda state: state
    averages: Callable[[State], tuple[Any, Any] | None] = lambda state: None
    search: Callable[[State, Any, Any], list[str]] = lambda state, images, labels: []

    @property
    def in_jax(self) -> bool:
        return self.framework == "jax"


def check_available(framework: FrameworkName, opt: OptimizerName, dampening: float) -> None:
    """Raises a ValueError if the framework is missing, or has no such optimizer."""
    if framework != "jax":
        refuse_uncommon(framework, opt, dampening)
    if framework in ("torch", "torchvision"):
        try:
            import torch  # noqa: F401 (whether it can be)
        except ImportError as error:
            raise ValueError(
                f'--framework {framework} needs PyTorch, which is missing ({error}): pip install -e ".[torch]"'
            ) from error


def make_training(network: Network, recipe: Recipe) -> Training:
    """Everything for a training in the experiment's framework.

    Raises:
      ValueError: if the framework is missing, or has no such optimizer.
    """
    experiment = recipe.experiment
    check_available(experiment.framework, experiment.opt, experiment.dampening)
    adapters = {"jax": _in_jax, "numpy": _in_numpy, "torch": _in_torch, "torchvision": _in_torch}
    return adapters[experiment.framework](network, recipe)


def _in_jax(network: Network, recipe: Recipe) -> Training:
    train, (config, apply), experiment = jax_resnet.train, network.jax, recipe.experiment
    optimizer = make_optimizer(experiment.opt, recipe.schedule, **experiment.hyperparameters)
    if experiment.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(experiment.clip_norm), optimizer)
    if experiment.loss_scale != 1:
        optimizer = optax.chain(optax.scale(experiment.loss_scale), optimizer)
    params, batch_stats = jax.tree.map(
        lambda array: jnp.asarray(array, experiment.weights_dtype), (network.params, network.batch_stats)
    )
    state = train.create_train_state(
        params, batch_stats, optimizer, freeze_backbone=recipe.freeze_backbone, ema=experiment.ema is not None
    )
    many = recipe.devices > 1
    mesh = train.data_mesh(jax.devices()[: recipe.devices]) if many else None
    network_options = {"remat": True} if experiment.remat else {}
    if experiment.precision == "bfloat16":
        network_options["dtype"] = jnp.bfloat16
    options = dict(apply=apply, mesh=mesh, **network_options)
    step_options = dict(
        label_smoothing=experiment.label_smoothing,
        preprocess=recipe.preprocess_train,
        freeze_backbone=recipe.freeze_backbone,
        **options,
    )

    def place(state: State) -> State:
        return train.replicate(state, mesh) if many else jax.tree.map(jnp.asarray, state)

    def put(images: Array, labels: Array) -> tuple[Any, Any]:
        return train.shard_batch((images, labels), mesh) if many else (jnp.asarray(images), jnp.asarray(labels))

    return Training(
        experiment.framework,
        train.replicate(state, mesh) if many else state,
        train.make_train_step(
            config,
            optimizer,
            accumulate=experiment.accumulate,
            ema_decay=experiment.ema,
            skip_nonfinite=recipe.skip_nonfinite,
            **step_options,
        ),
        train.make_eval_step(config, preprocess=recipe.preprocess_test, **options),
        jax_device() | {"used": recipe.devices},
        network.to_torch,
        lambda state: moments_of(state.opt_state),
        put,
        place,
        lambda state: None if state.ema is None else (state.ema["params"], state.ema["batch_stats"]),
        train.make_nonfinite_search(config, **step_options),
    )


def _in_numpy(network: Network, recipe: Recipe) -> Training:
    train, (config, apply), experiment = numpy_ref.train, network.numpy, recipe.experiment
    learning_rate = as_numbers(recipe.schedule, recipe.steps)
    optimizer = make_numpy_optimizer(experiment.opt, learning_rate, **experiment.hyperparameters)
    params, batch_stats = jax.tree.map(
        lambda array: np.asarray(array, experiment.precision), (network.params, network.batch_stats)
    )

    def moments(state: State) -> AdaBoundState:
        found = state.opt_state
        return AdaBoundState(found.count, found.mu, found.nu, getattr(found, "nu_max", None))

    return Training(
        experiment.framework,
        train.create_train_state(params, batch_stats, optimizer, freeze_backbone=recipe.freeze_backbone),
        train.make_train_step(
            config,
            optimizer,
            label_smoothing=experiment.label_smoothing,
            preprocess=lambda images, step: np.asarray(recipe.preprocess_train(images, step)),
            apply=apply,
            freeze_backbone=recipe.freeze_backbone,
        ),
        train.make_eval_step(config, preprocess=lambda images: np.asarray(recipe.preprocess_test(images)), apply=apply),
        numpy_device(),
        network.to_torch,
        moments,
    )


def _in_torch(network: Network, recipe: Recipe) -> Training:
    import torch

    from torch_ref import train

    experiment = recipe.experiment
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = network.torch()
    arrays = network.to_torch(network.params, network.batch_stats)
    counts = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()} | counts)
    model.to(device, getattr(torch, experiment.precision))
    if recipe.freeze_backbone:
        train.freeze_backbone(model)
    hyperparameters = experiment.hyperparameters
    del hyperparameters["dampening"]  # refuse_uncommon has seen that it is 0
    optimizer = make_torch_optimizer(experiment.opt, model, **hyperparameters)

    def to_tensor(images: Any) -> torch.Tensor:
        return torch.from_numpy(np.moveaxis(np.asarray(images), -1, 1).copy()).to(device)

    def with_arrays(results: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        return {name: value.cpu().numpy() for name, value in results.items()}

    def labels_of(labels: Array) -> torch.Tensor:
        return torch.from_numpy(labels.astype(np.int64)).to(device)

    step = train.make_train_step(
        model,
        optimizer,
        learning_rate=as_numbers(recipe.schedule, recipe.steps),
        label_smoothing=experiment.label_smoothing,
        preprocess=lambda images, number: to_tensor(recipe.preprocess_train(images, number)),
    )
    test = train.make_eval_step(model, preprocess=lambda images: to_tensor(recipe.preprocess_test(images)))

    def train_step(state: State, images: Array, labels: Array) -> tuple[State, dict[str, Array]]:
        state, metrics = step(state, images, labels_of(labels))
        return state, with_arrays(metrics)

    def eval_step(params: Any, batch_stats: Any, images: Array, labels: Array) -> dict[str, Array]:
        return with_arrays(test(params, batch_stats, images, labels_of(labels)))

    def moments(state: State) -> AdaBoundState:
        found = {name: optimizer.state[param] for name, param in state.params.items() if param in optimizer.state}
        trees = []
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            of_all = {name: kept[key] for name, kept in found.items() if key in kept}
            trees.append(jax_resnet.weights.from_torch(of_all)[0] or None)
        return AdaBoundState(int(next(iter(found.values()))["step"]), *trees)

    return Training(
        experiment.framework,
        train.create_train_state(model, optimizer),
        train_step,
        eval_step,
        torch_device(),
        lambda params, batch_stats: with_arrays({name: v.detach() for name, v in (params | batch_stats).items()}),
        moments,
    )


class State(Protocol):
    """What the three frameworks' TrainState have in common: the count of steps, and two collections of arrays."""

    step: Any
    params: Any
    batch_stats: Any
