"""The small network of experiments.mnist: a convolution, ReLU and a dense layer, in NumPy, JAX and PyTorch.

Its parameters are {"conv": {"weight", "bias"}, "fc": {"weight", "bias"}}; there are no running statistics. Images have
28x28 pixels and one channel.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from types import ModuleType
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
CHANNELS, KERNEL, STRIDE, CLASSES = 32, 5, 2, 10
FEATURES = (14, 14, CHANNELS)  # (H, W, K) of the convolution's output


def init(rng: np.random.Generator) -> Params:
    """Draws the parameters, float32, each uniform within ±1/sqrt(fan-in), as PyTorch does."""

    def layer(*shape: int) -> dict[str, np.ndarray]:
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        draw = functools.partial(rng.uniform, -bound, bound)
        return {"weight": draw(shape).astype(np.float32), "bias": draw(shape[-1:]).astype(np.float32)}

    return {"conv": layer(KERNEL, KERNEL, 1, CHANNELS), "fc": layer(math.prod(FEATURES), CLASSES)}


def steps(layers: ModuleType, params: Params) -> list[tuple[Any, ...]]:
    """The layers of numpy_ref or jax_resnet, each with its weights, in execution order."""
    conv2d = functools.partial(layers.conv2d, stride=STRIDE, padding=KERNEL // 2)
    conv, fc = ((params[name]["weight"], params[name]["bias"]) for name in ("conv", "fc"))
    return [(conv2d, *conv), (layers.relu,), (layers.flatten,), (layers.dense, *fc)]


def apply_numpy(
    config: None, params: Params, batch_stats: Any, images: np.ndarray, *, train: bool
) -> tuple[numpy_ref.resnet.Output, numpy_ref.layers.Vjp]:
    """Runs the network with the signature of `numpy_ref.resnet.apply`; training and evaluation are the same."""
    logits, vjp_layers = numpy_ref.layers.sequential(images, *steps(numpy_ref.layers, params))

    def vjp(dlogits: np.ndarray) -> tuple[Params, np.ndarray]:
        dimages, conv, (), (), dense = vjp_layers(dlogits)
        names = ("weight", "bias")
        return {"conv": dict(zip(names, conv, strict=True)), "fc": dict(zip(names, dense, strict=True))}, dimages

    return numpy_ref.resnet.Output(logits, batch_stats, {}), vjp


def apply_jax(
    config: None,
    params: Params,
    batch_stats: Any,
    images: jax.Array,
    *,
    train: bool,
    dtype: Any = None,
    return_activations: bool = False,
) -> jax_resnet.resnet.Output:
    """Runs the network with the signature of `jax_resnet.resnet.apply`; dtype is that of all before the dense layer."""
    x = images.astype(dtype or images.dtype)
    cast = params | {"conv": jax.tree.map(lambda a: a.astype(x.dtype), params["conv"])}
    *convolution, (dense, *fc) = steps(jax_resnet.layers, cast)
    for layer, *arrays in convolution:
        x = layer(x, *arrays)
    logits = dense(x.astype(fc[0].dtype), *fc)
    return jax_resnet.resnet.Output(logits, batch_stats, {"conv": x} if return_activations else {})


def make_module() -> torch.nn.Module:
    """The network in PyTorch; `to_torch` makes its state_dict."""
    from torch import nn

    convolution = nn.Conv2d(1, CHANNELS, KERNEL, STRIDE, KERNEL // 2)
    dense = nn.Linear(math.prod(FEATURES), CLASSES)
    return nn.Sequential(OrderedDict(conv=convolution, relu=nn.ReLU(), flatten=nn.Flatten(), fc=dense))


def to_torch(params: Params, batch_stats: Any) -> dict[str, np.ndarray]:
    """{name: array} in PyTorch's layout.

    The rows of the dense layer are reordered: features come as (H, W, K) here, and from PyTorch's Flatten as (K, H, W).
    """
    rows = np.arange(math.prod(FEATURES)).reshape(FEATURES).transpose(2, 0, 1).reshape(-1)
    dense = {"weight": np.asarray(params["fc"]["weight"])[rows], "bias": params["fc"]["bias"]}
    return weights.to_torch({**params, "fc": dense}, batch_stats)


def network(params: Params) -> Network:
    """The network in all frameworks."""
    return Network((None, apply_jax), (None, apply_numpy), lambda framework: make_module(), params, {}, to_torch)
