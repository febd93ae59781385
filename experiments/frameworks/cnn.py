"""The small network of experiments.mnist: a convolution, ReLU and a dense layer, in NumPy, JAX and PyTorch.

Its parameters are {"conv": {"weight", "bias"}, "fc": {"weight", "bias"}}; there are no running statistics.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import jax_resnet.layers
import jax_resnet.resnet
import numpy_ref.layers
import numpy_ref.resnet
from experiments.frameworks.common import Network
from jax_resnet import weights

if TYPE_CHECKING:
    import torch

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
    config: CNNConfig,
    params: Params,
    batch_stats: Any,
    images: jax.Array,
    *,
    train: bool,
    dtype: Any = None,
    return_activations: bool = False,
) -> jax_resnet.resnet.Output:
    """Runs the network in the form of `jax_resnet.resnet.apply`."""
    layers = jax_resnet.layers
    dtype = dtype or images.dtype
    kernel, bias = (params["conv"][name].astype(dtype) for name in ("weight", "bias"))
    x = layers.conv2d(images.astype(dtype), kernel, bias, stride=config.stride, padding=config.kernel // 2)
    x = layers.relu(x)
    features = layers.flatten(x).astype(params["fc"]["weight"].dtype)
    logits = layers.dense(features, **params["fc"])
    return jax_resnet.resnet.Output(logits, batch_stats, {"conv": x} if return_activations else {})


def make_module(config: CNNConfig) -> torch.nn.Module:
    """The network in PyTorch; `to_torch` makes its state_dict."""
    from torch import nn

    convolution = nn.Conv2d(1, config.channels, config.kernel, config.stride, config.kernel // 2)
    dense = nn.Linear(math.prod(config.feature_shape), config.num_classes)
    return nn.Sequential(OrderedDict(conv=convolution, relu=nn.ReLU(), flatten=nn.Flatten(), fc=dense))


def to_torch(config: CNNConfig, params: Params, batch_stats: Any) -> dict[str, np.ndarray]:
    """{name: array} in PyTorch's layout.

    The rows of the dense layer are reordered: features come as (H', W', K) here, and from PyTorch's Flatten as
    (K, H', W').
    """
    rows = np.arange(math.prod(config.feature_shape)).reshape(config.feature_shape).transpose(2, 0, 1).reshape(-1)
    dense = {"weight": np.asarray(params["fc"]["weight"])[rows], "bias": params["fc"]["bias"]}
    return weights.to_torch({**params, "fc": dense}, batch_stats)


def network(config: CNNConfig, params: Params) -> Network:
    """The network in all frameworks."""
    return Network(
        (config, apply_jax),
        (config, apply_numpy),
        lambda framework: make_module(config),
        params,
        {},
        functools.partial(to_torch, config),
    )
