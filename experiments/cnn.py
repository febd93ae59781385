"""The small network of experiments.mnist: a convolution, ReLU and a dense layer, in NumPy and in JAX.

Its parameters are {"conv": {"weight", "bias"}, "fc": {"weight", "bias"}}; there are no running statistics.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

import jax_resnet.layers
import jax_resnet.resnet
import numpy_ref.layers
import numpy_ref.resnet

Params = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class CNNConfig:
    """The architecture: images of image_size x image_size with one channel; the convolution keeps 1 / stride of it."""

    num_classes: int = 10
    image_size: int = 28
    channels: int = 32
    kernel: int = 5
    stride: int = 2

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(H', W', K) of the convolution's output."""
        side = (self.image_size - 1) // self.stride + 1
        return side, side, self.channels


def init(config: CNNConfig, rng: np.random.Generator) -> Params:
    """Draws the parameters, float32, each uniform within 1/sqrt(inputs of its layer), as PyTorch does."""

    def layer(*shape: int) -> dict[str, np.ndarray]:
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        draw = functools.partial(rng.uniform, -bound, bound)
        return {"weight": draw(shape).astype(np.float32), "bias": draw(shape[-1:]).astype(np.float32)}

    return {
        "conv": layer(config.kernel, config.kernel, 1, config.channels),
        "fc": layer(math.prod(config.feature_shape), config.num_classes),
    }


def apply_numpy(
    config: CNNConfig, params: Params, batch_stats: Any, images: np.ndarray, *, train: bool
) -> tuple[numpy_ref.resnet.Output, numpy_ref.layers.Vjp]:
    """Runs the network in the form of `numpy_ref.resnet.apply`; it is the same in training and evaluation."""
    layers = numpy_ref.layers
    conv2d = functools.partial(layers.conv2d, stride=config.stride, padding=config.kernel // 2)
    logits, vjp_layers = layers.sequential(
        images,
        (conv2d, params["conv"]["weight"], params["conv"]["bias"]),
        (layers.relu,),
        (layers.flatten,),
        (layers.dense, params["fc"]["weight"], params["fc"]["bias"]),
    )

    def vjp(dlogits: np.ndarray) -> tuple[Params, np.ndarray]:
        dimages, conv, (), (), dense = vjp_layers(dlogits)
        names = ("weight", "bias")
        return {"conv": dict(zip(names, conv, strict=True)), "fc": dict(zip(names, dense, strict=True))}, dimages

    return numpy_ref.resnet.Output(logits, batch_stats, {}), vjp


def apply_jax(
    config: CNNConfig, params: Params, batch_stats: Any, images: jax.Array, *, train: bool
) -> jax_resnet.resnet.Output:
    """Runs the network in the form of `jax_resnet.resnet.apply`."""
    layers = jax_resnet.layers
    x = layers.conv2d(images, **params["conv"], stride=config.stride, padding=config.kernel // 2)
    logits = layers.dense(layers.flatten(layers.relu(x)), **params["fc"])
    return jax_resnet.resnet.Output(logits, batch_stats, {})


def channels_first(config: CNNConfig, params: Params) -> Params:
    """The parameters with the dense layer's rows in the order that PyTorch's Flatten gives the features.

    Here features come as (H', W', K), there as (K, H', W'). What the `save` of either framework makes of the result is
    the state_dict of Sequential(conv=Conv2d(1, 32, 5, stride=2, padding=2), relu=ReLU(), flatten=Flatten(),
    fc=Linear(6272, 10)).
    """
    rows = np.arange(math.prod(config.feature_shape)).reshape(config.feature_shape).transpose(2, 0, 1).reshape(-1)
    return params | {"fc": {"weight": np.asarray(params["fc"]["weight"])[rows], "bias": params["fc"]["bias"]}}
