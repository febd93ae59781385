"""What is compared: layers with their arguments, networks with weights and a batch, optimizers with their settings.

Arrays are NumPy's in float64; weights have torchvision's names and layout, images are NHWC.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

import numpy_ref.resnet
import numpy_ref.weights
from experiments.frameworks import jax, numpy
from experiments.frameworks.common import Arrays, ResNet
from jax_resnet import resnet
from numpy_ref.resnet import MIN_SIZE

Tree = dict[str, Any]
Batch = tuple[np.ndarray, np.ndarray]  # images, labels

MIN_VALUES_PER_CHANNEL = 32


class LayerCase(NamedTuple):
    """A call of a layer: arrays with a gradient, arrays without one, and keyword arguments."""

    title: str
    layer: str
    arrays: Arrays
    constants: Mapping[str, np.ndarray] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})

    def astype(self, dtype: str) -> LayerCase:
        """The same case with floats of this dtype."""
        arrays, constants = (
            {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in values.items()}
            for values in (self.arrays, self.constants)
        )
        return self._replace(arrays=arrays, constants=constants)

    def named_results(self, outputs: Any, gradients: Any) -> Arrays:
        """{"output": ..., "gradient of x": ...}; batch_norm's second and third outputs are its running statistics."""
        names = ("output", "running mean", "running variance")
        results = dict(zip(names, outputs, strict=False))
        results |= {f"gradient of {name}": value for name, value in zip(self.arrays, gradients, strict=False)}
        return {name: np.asarray(value) for name, value in results.items()}


def cotangent(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The gradient that is sent back through an output: random, but the same for equal shapes."""
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def layer_cases(seed: int) -> list[LayerCase]:
    """Every layer, with sizes that are not multiples of the stride, ties in max_pool and zeros in relu."""
    rng = np.random.default_rng(seed)

    def conv2d(size: int, stride: int, padding: int, bias: bool, height: int = 14, width: int = 17) -> LayerCase:
        arrays = {"x": rng.standard_normal((3, height, width, 5)), "weight": rng.standard_normal((size, size, 5, 6))}
        if bias:
            arrays["bias"] = rng.standard_normal(6)
        title = f"conv2d {size}x{size}, stride {stride}, padding {padding}{', bias' if bias else ''}"
        return LayerCase(title, "conv2d", arrays, settings=dict(stride=stride, padding=padding))

    def batch_norm(train: bool) -> LayerCase:
        x = 3 + 2 * rng.standard_normal((4, 5, 6, 7))
        vectors = {name: rng.uniform(0.5, 1.5, 7) for name in ("weight", "bias", "running_mean", "running_var")}
        running = {name: vectors.pop(name) for name in ("running_mean", "running_var")}
        title = f"batch_norm, {'train' if train else 'eval'}"
        return LayerCase(title, "batch_norm", {"x": x} | vectors, running, dict(train=train))

    images = rng.standard_normal((3, 10, 13, 5))
    with_ties = np.round(images)
    dense = {"x": rng.standard_normal((8, 20)), "weight": rng.standard_normal((20, 6)), "bias": rng.standard_normal(6)}
    logits = 100 * rng.standard_normal((8, 10))
    return [
        conv2d(3, 1, 1, bias=True),
        conv2d(3, 2, 1, bias=False),
        conv2d(1, 1, 0, bias=False),
        conv2d(1, 2, 0, bias=True),
        conv2d(7, 2, 3, bias=False, height=20),
        batch_norm(train=True),
        batch_norm(train=False),
        LayerCase("max_pool, ties", "max_pool", {"x": with_ties}, settings=dict(window=3, stride=2, padding=1)),
        LayerCase("global_avg_pool", "global_avg_pool", {"x": images}),
        LayerCase("relu, zeros", "relu", {"x": with_ties}),
        LayerCase("sigmoid", "sigmoid", {"x": 20 * images}),
        LayerCase("dense", "dense", dense),
        LayerCase("flatten", "flatten", {"x": images}),
        LayerCase("softmax_cross_entropy", "softmax_cross_entropy", {"logits": logits}, {"labels": np.arange(8) % 10}),
    ]


def activation_names(network: ResNet) -> list[str]:
    """The names in execution order; jit sorts a dict by name, with "layer3.10" before "layer3.2"."""
    return ["stem", *(block.name for block in resnet.blocks(jax.make_resnet(network))), "pool"]


def draw_weights(network: ResNet, seed: int) -> Arrays:
    """Random weights {torchvision's name: array} in its layout, in execution order.

    BatchNorm's initial 1 and 0 would hide many mistakes. The last gamma of a block is small, as in trained networks: at
    1 each block would double the variance in evaluation, which makes a factor of 2^33 in ResNet-101. At 0 the block
    would be hidden.
    """
    rng = np.random.default_rng(seed)
    initial = numpy_ref.resnet.init(numpy.make_resnet(network), rng, np.float64)
    weights = numpy_ref.weights.to_torch(*initial)
    if not network.batch_norm:
        return weights
    last_gammas = {f"{block.convs[-1].norm}.weight" for block in resnet.blocks(jax.make_resnet(network))}
    for name, value in weights.items():
        if name in last_gammas:
            value[:] = rng.uniform(0.2, 0.5, value.shape)
        elif name.endswith(("running_mean", ".bias")) and not name.startswith("fc"):
            value[:] = 0.2 * rng.standard_normal(value.shape)
        elif value.ndim == 1 and not name.startswith("fc"):
            value[:] = rng.uniform(0.5, 1.5, value.shape)
    return weights


def draw_batch(network: ResNet, shape: tuple[int, int, int], rng: np.random.Generator) -> Batch:
    """images (N, H, W, C) float64, normal, and labels (N,) int32; shape is (N, H, W)."""
    images = rng.standard_normal((*shape, network.in_channels))
    return images, rng.integers(0, network.num_classes, len(images)).astype(np.int32)


def check_batch(network: ResNet, batch_size: int, height: int, width: int) -> None:
    """Raises a ValueError for an empty batch, or one with too few values per channel for a BatchNorm in training."""
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    values = batch_size * -(-height // MIN_SIZE) * -(-width // MIN_SIZE)
    if network.batch_norm and values < MIN_VALUES_PER_CHANNEL:
        raise ValueError(
            f"--batch-size {batch_size} of {height}x{width} images leaves {values} values per channel to the last "
            f"stage, whose BatchNorms magnify rounding without bound below {MIN_VALUES_PER_CHANNEL} values: take "
            f"--batch-size {-(-MIN_VALUES_PER_CHANNEL * batch_size // values)}"
        )


# The settings of each optimizer in all frameworks, under optax's names. weight_decay is L2 except in adamw. gamma is a
# hundred times the default; otherwise the bounds would clip hardly anything within 20 steps.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": dict(learning_rate=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": dict(learning_rate=1e-3),
    "adamw": dict(learning_rate=1e-3, weight_decay=0.05),
    "adabound": dict(learning_rate=1e-3, final_lr=0.1, gamma=0.1, weight_decay=5e-4),
    "amsbound": dict(learning_rate=1e-3, final_lr=0.1, gamma=0.1, weight_decay=5e-4),
}


class TrainerState(NamedTuple):
    """What a training step changes, in the form in which the frameworks exchange it.

    params, batch_stats: nested dicts in the layout of jax_resnet and numpy_ref.
    moments: the optimizer's, trees like params, by optax's names: "trace" or "mu", "nu" and, of AMSBound, "nu_max".
    """

    count: int
    params: Tree
    batch_stats: Tree
    moments: dict[str, Tree]
