"""What the frameworks have in common: a network, a recipe for its training, and a training that can begin.

One adapter per framework does the work: `experiments.frameworks.jax`, `.numpy` and `.torch`. Importing this module
imports none of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from experiments.frameworks.experiment import CommonOptimizerName, Experiment, FrameworkName

if TYPE_CHECKING:
    import optax
    import torch

    from jax_resnet.adabound import AdaBoundState

Array = np.ndarray
Arrays = Mapping[str, Array]
State = Any  # a framework's TrainState, which has step, params and batch_stats


@dataclasses.dataclass(frozen=True)
class ResNet:
    """A ResNet, as settings that all implementations take; `make_resnet` of each adapter builds it."""

    arch: str
    num_classes: int = 1000
    in_channels: int = 3
    stride_in: str = "conv2"
    batch_norm: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """All settings but the architecture, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "arch"}

    def __str__(self) -> str:
        version = "" if self.arch in ("resnet18", "resnet34") or self.stride_in == "conv2" else ", v1"
        return f"{self.arch}{version}{'' if self.batch_norm else ' without BatchNorm'}"

    @property
    def why_not_torchvision(self) -> str:
        """Why torchvision has no such network, "" if it has one."""
        if not self.batch_norm:
            return "its networks have BatchNorm"
        return "its networks have the stride in conv2" if str(self).endswith(", v1") else ""


class Network(NamedTuple):
    """A network in every framework, and the weights that it starts from.

    jax, numpy: the configuration and apply, as the frameworks' make_train_step take them.
    torch: makes the nn.Module of "torch" or "torchvision".
    params, batch_stats: nested dicts of NumPy arrays, as jax and numpy take them.
    to_torch: (params, batch_stats) -> {name: array} as in the module's state_dict.
    """

    jax: tuple[Any, Callable[..., Any]]
    numpy: tuple[Any, Callable[..., Any]]
    torch: Callable[[FrameworkName], torch.nn.Module]
    params: Mapping[str, Any]
    batch_stats: Mapping[str, Any]
    to_torch: Callable[[Any, Any], dict[str, Array]]


def resnet_network(arch: str, params: Any, batch_stats: Any, **options: Any) -> Network:
    """A ResNet with these weights; options as for `ResNet`."""
    from experiments.frameworks import jax, numpy

    network = ResNet(arch, **options)
    return Network(
        (jax.make_resnet(network), jax.resnet.apply),
        (numpy.make_resnet(network), functools.partial(numpy.fast.apply, image_gradient=False)),
        lambda framework: adapter(framework).make_resnet(network, framework),
        params,
        batch_stats,
        jax.weights.to_torch,
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained, in any framework.

    experiment: its learning_rate is set; float64 needs jax.enable_x64.
    schedule, steps: the learning rate by step, and the steps of the whole training.
    preprocess_train: (uint8 images (N, H, W, C), step) -> floats of experiment.weights_dtype; JAX's step traces it, the
      other steps call it.
    preprocess_test: the same without a step.
    freeze_backbone: train only the dense layer; the rest runs as in evaluation.
    skip_nonfinite, devices: only for JAX, see `jax_resnet.train.make_train_step` and `data_mesh`.
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

    framework: only JAX's training can be resumed, compiled ahead and searched for non-finite values.
    state, train_step, eval_step: as `experiments.training.loop.Loop` takes them.
    device: the device that computes, as plain JSON values.
    arrays: (params, batch_stats) -> {torchvision's name: array in torchvision's layout}.
    moments: state -> count, first and second moments of Adam's family, under JAX's names and layout.
    put: (images, labels) of this process -> the batch as the steps take it.
    place: a state of NumPy arrays -> the same on the devices; only for JAX.
    averages: state -> params and batch_stats averaged over the steps, None without --ema.
    search: see `jax_resnet.train.make_nonfinite_search`; only for JAX.
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


def adapter(framework: FrameworkName) -> ModuleType:
    """The module that computes in a framework; raises a ValueError if the framework is not installed."""
    try:
        importlib.import_module(framework)
    except ImportError as error:
        raise ValueError(
            f'--framework {framework} needs PyTorch, which is missing ({error}): pip install -e ".[torch]"'
        ) from error
    module = "torch" if framework == "torchvision" else framework
    return importlib.import_module(f"experiments.frameworks.{module}")


def adapter_for(experiment: Experiment) -> ModuleType:
    """The adapter for an experiment; raises a ValueError if the framework is missing, or has no such optimizer.

    AMSGrad is only in JAX, since the libraries differ: optax takes the largest second moment after bias correction,
    torch before.
    """
    framework, opt, common = experiment.framework, experiment.opt, get_args(CommonOptimizerName)
    if framework != "jax" and opt not in common:
        raise ValueError(f"--opt {opt} is only in JAX: --framework {framework} has {', '.join(common)}")
    if experiment.dampening and framework not in ("jax", "numpy"):
        raise ValueError("--dampening is not in torch: its SGD does not dampen the first gradient")
    return adapter(framework)


def make_training(network: Network, recipe: Recipe) -> Training:
    """Prepares a training in the experiment's framework; raises what `adapter_for` raises."""
    return adapter_for(recipe.experiment).make_training(network, recipe)
