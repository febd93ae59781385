"""torch.nn.functional, torch_ref and torchvision for the comparisons: a layer, a network and a training."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.parity.cases import NUM_CLASSES, OPTIMIZERS, Arrays, LayerCase, Network, State, cotangent
from experiments.parity.errors import Results
from jax_resnet import weights
from torch_ref import adabound, resnet


@contextlib.contextmanager
def exact_on_one_thread() -> Iterator[None]:
    """Float32 in full, should PyTorch's default device be a GPU, and one thread.

    With two on two cores that something else uses too, a step of ResNet-18 took 5.4 s instead of 0.7: the threads wait
    for one another.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _channels_first(images: Tensor) -> Tensor:
    return images.movedim(-1, 1)


def _channels_last(images: Tensor) -> Tensor:
    return images.movedim(1, -1)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **settings: int) -> Tensor:
    return _channels_last(F.conv2d(_channels_first(x), weight.permute(3, 2, 0, 1), bias, **settings))


def _batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, train: bool
) -> tuple[Tensor, ...]:
    mean, var = mean.clone(), var.clone()  # torch changes them in place
    return _channels_last(F.batch_norm(_channels_first(x), mean, var, weight, bias, training=train)), mean, var


def _max_pool(x: Tensor, *, window: int, stride: int, padding: int) -> Tensor:
    return _channels_last(F.max_pool2d(_channels_first(x), window, stride, padding))


LAYERS: dict[str, Callable[..., Any]] = {
    "conv2d": _conv2d,
    "batch_norm": _batch_norm,
    "max_pool": _max_pool,
    "global_avg_pool": lambda x: F.adaptive_avg_pool2d(_channels_first(x), 1).flatten(1),
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "dense": lambda x, weight, bias: F.linear(x, weight.T, bias),
    "flatten": lambda x: torch.flatten(x, 1),
    "softmax_cross_entropy": lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
}


def run_layer(case: LayerCase) -> Arrays:
    """Outputs and gradients of torch.nn.functional's layer, by name and in the layout of the case."""
    arrays = [torch.tensor(value, requires_grad=True) for value in case.arrays.values()]
    constants = [torch.tensor(value) for value in case.constants.values()]
    outputs = LAYERS[case.layer](*arrays, *constants, **case.settings)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dy = cotangent(tuple(outputs[0].shape), case.arrays[next(iter(case.arrays))].dtype)
    gradients = torch.autograd.grad(outputs[0], arrays, torch.tensor(dy))
    return case.named_results([output.detach() for output in outputs], gradients)


def why_not_torchvision(network: Network) -> str:
    """What torchvision's networks do not have, "" if it is nothing."""
    if not network.batch_norm:
        return "its networks have BatchNorm"
    if network.stride_in != "conv2" and network.arch not in ("resnet18", "resnet34"):
        return "its networks have the stride in conv2"
    return ""


def make_model(network: Network, library: str, state_dict: Arrays) -> nn.Module:
    """The network of "torch_ref" or "torchvision" with these weights and their dtype."""
    if library == "torchvision":
        import torchvision

        model = getattr(torchvision.models, network.arch)(num_classes=NUM_CLASSES)
        if network.in_channels != 3:  # torchvision's take colour alone
            model.conv1 = nn.Conv2d(network.in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    else:
        model = getattr(resnet, network.arch)(**network.options)
    tensors = _tensors(state_dict)
    model.to(tensors["conv1.weight"].dtype).load_state_dict(tensors, strict=True)
    return model


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Copies of those arrays alone that PyTorch must not write to, such as JAX's."""
    return {name: torch.from_numpy(a if a.flags.writeable else a.copy()) for name, a in arrays.items()}


def run_network(
    network: Network, state_dict: Arrays, images: np.ndarray, labels: np.ndarray, train: bool, *, library: str
) -> Results:
    """One forward and backward pass of a library's network; weights go in by load_state_dict."""
    model = make_model(network, library, state_dict).train(train)
    inputs = torch.tensor(np.moveaxis(images, -1, 1), requires_grad=True)
    logits, activations = _with_activations(model, library, inputs)
    loss = F.cross_entropy(logits, torch.tensor(labels, dtype=torch.long))
    loss.backward()
    return Results(
        logits=_array(logits),
        loss=_array(loss),
        activations={name: np.moveaxis(_array(value), 1, -1) for name, value in activations.items()},
        running_statistics={name: _array(value) for name, value in model.named_buffers() if "running" in name},
        parameter_gradients={name: _array(param.grad) for name, param in model.named_parameters()},
        image_gradient=np.moveaxis(_array(inputs.grad), 1, -1),
    )


def _with_activations(model: nn.Module, library: str, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    if library == "torch_ref":
        return model(images, return_activations=True)
    activations: dict[str, Tensor] = {}
    stages = [f"layer{stage}" for stage in range(1, 5)]
    modules = {
        f"{stage}.{number}": block for stage in stages for number, block in getattr(model, stage).named_children()
    }
    for name, module in {"stem": model.maxpool, **modules, "pool": model.avgpool}.items():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: activations.update({name: output}))
    logits = model(images)
    activations["pool"] = activations["pool"].flatten(1)
    return logits, activations


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


MOMENTS = {"trace": "momentum_buffer", "mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    settings = dict(OPTIMIZERS[name])
    settings["lr"] = settings.pop("learning_rate")
    classes = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "adabound": adabound.AdaBound,
        "amsbound": adabound.AMSBound,
    }
    return classes[name](model.parameters(), **settings)


class Trainer:
    """A training of torch_ref's network, step by step."""

    def __init__(self, network: Network):
        self._network = network

    def start(self, optimizer: str, state_dict: Arrays) -> Trainer:
        """A training from these weights with an optimizer of `cases.OPTIMIZERS`."""
        trainer = copy.copy(self)
        trainer._model = make_model(self._network, "torch_ref", state_dict).train()
        trainer._optimizer = make_optimizer(optimizer, trainer._model)
        return trainer

    def load(self, state: State) -> None:
        """Continues from there."""
        self._model.load_state_dict(_tensors(weights.to_torch(state.params, state.batch_stats)), strict=True)
        saved = self._optimizer.state_dict()
        saved["state"] = {}
        if state.count:
            counts_in_tensors = not isinstance(self._optimizer, adabound.AdaBound)
            moments = {MOMENTS[name]: _tensors(weights.to_torch(tree, {})) for name, tree in state.moments.items()}
            for number, (name, _) in enumerate(self._model.named_parameters()):
                saved["state"][number] = {key: tensors[name] for key, tensors in moments.items()}
                if "momentum_buffer" not in moments:  # SGD does not count
                    count = torch.tensor(float(state.count)) if counts_in_tensors else state.count
                    saved["state"][number]["step"] = count
        self._optimizer.load_state_dict(saved)

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._optimizer.zero_grad()
        logits = self._model(torch.tensor(np.moveaxis(images, -1, 1)))
        F.cross_entropy(logits, torch.tensor(labels, dtype=torch.long)).backward()
        self._optimizer.step()

    def weights(self) -> tuple[Any, Any]:
        """params and batch_stats as NumPy arrays."""
        return weights.from_torch(self._model.state_dict())
