"""torch.nn.functional, torch_ref and torchvision for the comparisons: a layer, a network and a training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.frameworks.common import Arrays, ResNet
from experiments.frameworks.torch import load_weights, make_resnet, to_arrays, to_tensors
from experiments.parity.cases import OPTIMIZERS, LayerCase, TrainerState, cotangent
from experiments.parity.errors import Results
from jax_resnet import weights
from torch_ref import adabound


@contextlib.contextmanager
def exact_on_one_thread() -> Iterator[None]:
    """Uses full float32, in case PyTorch's default device is a GPU, and one thread.

    With two threads on two cores that other programs use too, a step of ResNet-18 took 5.4 s instead of 0.7 s: the
    threads wait for one another.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _nhwc(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer of NCHW images as one of NHWC images."""
    return lambda x, *arrays, **settings: layer(x.movedim(-1, 1), *arrays, **settings).movedim(1, -1)


def _batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, train: bool
) -> tuple[Tensor, ...]:
    mean, var = mean.clone(), var.clone()  # torch changes them in place
    return _nhwc(F.batch_norm)(x, mean, var, weight, bias, training=train), mean, var


LAYERS: dict[str, Callable[..., Any]] = {
    "conv2d": _nhwc(lambda x, weight, bias=None, **settings: F.conv2d(x, weight.permute(3, 2, 0, 1), bias, **settings)),
    "batch_norm": _batch_norm,
    "max_pool": _nhwc(lambda x, window, **settings: F.max_pool2d(x, window, **settings)),
    "global_avg_pool": lambda x: F.adaptive_avg_pool2d(x.movedim(-1, 1), 1).flatten(1),
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


def _images(images: np.ndarray) -> Tensor:
    """NHWC -> a copy whose shape is NCHW, and whose layout in memory is still NHWC."""
    return torch.tensor(np.moveaxis(images, -1, 1))


def make_model(network: ResNet, library: str, state_dict: Arrays) -> nn.Module:
    """The network of "torch_ref" or "torchvision" with these weights and their dtype."""
    model = make_resnet(network, "torch" if library == "torch_ref" else library)
    return load_weights(model.to(to_tensors(state_dict)["conv1.weight"].dtype), state_dict)


def run_network(
    network: ResNet, state_dict: Arrays, images: np.ndarray, labels: np.ndarray, train: bool, *, library: str
) -> Results:
    """A forward and backward pass of a library's network."""
    model = make_model(network, library, state_dict).train(train)
    inputs = _images(images).requires_grad_()
    logits, activations = _with_activations(model, library, inputs)
    loss = F.cross_entropy(logits, torch.tensor(labels, dtype=torch.long))
    loss.backward()
    return Results(
        logits=logits.detach().numpy(),
        loss=loss.detach().numpy(),
        activations={name: np.moveaxis(value, 1, -1) for name, value in to_arrays(activations).items()},
        running_statistics=to_arrays({name: value for name, value in model.named_buffers() if "running" in name}),
        parameter_gradients=to_arrays({name: param.grad for name, param in model.named_parameters()}),
        image_gradient=np.moveaxis(inputs.grad.numpy(), 1, -1),
    )


def _with_activations(model: nn.Module, library: str, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    if library == "torch_ref":
        return model(images, return_activations=True)
    activations: dict[str, Tensor] = {}
    modules = {"stem": model.maxpool, "pool": model.avgpool}
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        modules |= {f"{stage}.{number}": block for number, block in getattr(model, stage).named_children()}
    for name, module in modules.items():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: activations.update({name: output}))
    logits = model(images)
    activations["pool"] = activations["pool"].flatten(1)
    return logits, activations


MOMENTS = {"trace": "momentum_buffer", "mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
OPTIMIZER_CLASSES = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adabound": adabound.AdaBound,
    "amsbound": adabound.AMSBound,
}


class Trainer:
    """A training of torch_ref's network with an optimizer of `cases.OPTIMIZERS`."""

    def __init__(self, network: ResNet, optimizer: str, state_dict: Arrays):
        self._model = make_model(network, "torch_ref", state_dict).train()
        settings = dict(OPTIMIZERS[optimizer])
        learning_rate = settings.pop("learning_rate")
        self._optimizer = OPTIMIZER_CLASSES[optimizer](self._model.parameters(), lr=learning_rate, **settings)

    def load(self, state: TrainerState) -> None:
        """Continues from this state."""
        load_weights(self._model, weights.to_torch(state.params, state.batch_stats))
        saved = self._optimizer.state_dict()
        saved["state"] = {}
        if state.count:
            counts_in_tensors = not isinstance(self._optimizer, adabound.AdaBound)
            moments = {MOMENTS[name]: to_tensors(weights.to_torch(tree, {})) for name, tree in state.moments.items()}
            for number, (name, _) in enumerate(self._model.named_parameters()):
                saved["state"][number] = {key: tensors[name] for key, tensors in moments.items()}
                if "momentum_buffer" not in moments:  # SGD does not count its steps
                    count = torch.tensor(float(state.count)) if counts_in_tensors else state.count
                    saved["state"][number]["step"] = count
        self._optimizer.load_state_dict(saved)

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._optimizer.zero_grad()
        logits = self._model(_images(images))
        F.cross_entropy(logits, torch.tensor(labels, dtype=torch.long)).backward()
        self._optimizer.step()

    def weights(self) -> tuple[Any, Any]:
        """params and batch_stats as NumPy arrays."""
        return weights.from_torch(self._model.state_dict())
