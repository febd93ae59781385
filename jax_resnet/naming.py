"""The names of a ResNet's layers in torchvision, Hugging Face and Keras, and other differences between their files."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jax_resnet.weight_files import to_torch_layout, to_tree_layout

__all__ = [
    "COUNT",
    "HUGGING_FACE",
    "KERAS",
    "KERAS_EPS",
    "LAYERS",
    "NAMINGS",
    "STATISTICS",
    "TORCHVISION",
    "Naming",
    "from_keras",
    "to_hugging_face",
    "to_keras",
    "torchvision_names",
    "with_counts",
]

COUNT = "num_batches_tracked"  # torch counts batches in each BatchNorm; this package does not use the count
STATISTICS = ("running_mean", "running_var")
LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
KERAS_EPS = 1.001e-5  # eps of BatchNorm in Keras; the default here is 1e-5
# The layers of a block in the order of keras.applications, which loads a file's arrays by their order.
_KERAS_ORDER = ("conv1", "bn1", "conv2", "bn2", "downsample.0", "conv3", "downsample.1", "bn3")


class Naming(NamedTuple):
    """How a library names the layers.

    title: the library.
    theirs: torchvision's name -> the library's name, both without a prefix.
    """

    title: str
    theirs: Callable[[str], str]


def _sequential(name: str) -> str:
    """The name in nn.Sequential(*resnet.children()), which numbers all modules: ReLU, pooling and flattening too."""
    first, _, rest = name.partition(".")
    return f"{dict(zip(LAYERS, (0, 1, 4, 5, 6, 7, 9), strict=True))[first]}.{rest}"


def _huggingface(name: str) -> str:
    if name.startswith("fc."):
        return f"classifier.1.{name.removeprefix('fc.')}"
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    if stem := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"embedder.embedder.{kinds[stem[1]]}.{stem[2]}"
    stage, block, layer, field = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)\.(\w+)", name).groups()  # type: ignore[union-attr]
    inner: Any = re.fullmatch(r"(conv|bn)(\d)|downsample\.(\d)", layer)
    where = f"layer.{int(inner[2]) - 1}.{kinds[inner[1]]}" if inner[1] else f"shortcut.{kinds[inner[3]]}"
    return f"encoder.stages.{int(stage) - 1}.layers.{block}.{where}.{field}"


def _keras(name: str) -> str:
    layer, _, field = name.rpartition(".")
    norm = layer.endswith(("downsample.1",)) or "bn" in layer
    fields = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    field = fields.get(field, field) if norm else field.replace("weight", "kernel")
    if layer in ("fc", "conv1", "bn1"):
        return f"{ {'fc': 'predictions', 'conv1': 'conv1_conv', 'bn1': 'conv1_bn'}[layer] }.{field}"
    stage, block, inner = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", layer).groups()  # type: ignore[union-attr]
    number = "0" if inner.startswith("downsample") else inner[-1]
    return f"conv{int(stage) + 1}_block{int(block) + 1}_{number}_{'bn' if norm else 'conv'}.{field}"


TORCHVISION = Naming("torchvision", lambda name: name)
HUGGING_FACE = Naming("Hugging Face", _huggingface)
KERAS = Naming("Keras", _keras)
NAMINGS = (TORCHVISION, Naming("nn.Sequential", _sequential), HUGGING_FACE, KERAS)


@functools.cache
def torchvision_names(naming: Naming) -> dict[str, str]:
    """Returns {a library's name: torchvision's name} for all arrays that one of the five networks may have."""
    fields = ("weight", "bias", "running_mean", "running_var", COUNT)
    inner = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample.0", "downsample.1")
    blocks = [f"layer{stage}.{block}.{layer}" for stage in range(1, 5) for block in range(36) for layer in inner]
    names = [f"{layer}.{field}" for layer in ("conv1", "bn1", "fc", *blocks) for field in fields]
    return {naming.theirs(name): name for name in names}


def with_counts(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds a batch count of 0 for each BatchNorm without one, because torch's state_dict has batch counts."""
    norms = [name.rpartition(".")[0] for name in arrays if name.endswith(f".{STATISTICS[0]}")]
    return {f"{norm}.{COUNT}": np.zeros((), np.int64) for norm in norms} | dict(arrays)


def to_hugging_face(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames torchvision's names to transformers' (ResNetForImageClassification). Adds missing batch counts."""
    theirs = {HUGGING_FACE.theirs(name): array for name, array in with_counts(arrays).items()}
    return {name if name.startswith("classifier.") else f"resnet.{name}": array for name, array in theirs.items()}


def to_keras(arrays: Mapping[str, np.ndarray], eps: float) -> dict[str, np.ndarray]:
    """Converts torchvision's names and layout into those of keras.applications, in Keras' order.

    Keras' convolutions have biases; they become 0. Batch counts are left out. `from_keras` reverses the rest.

    Args:
      arrays: {torchvision's name: array} of a network with bottleneck blocks and BatchNorm.
      eps: the eps of the network's BatchNorms. Its difference from Keras' eps is added to the variances.
    """
    blocks = sorted({(int(m[1]), int(m[2])) for name in arrays if (m := re.match(r"layer(\d)\.(\d+)\.", name))})
    inner = [f"layer{stage}.{block}.{layer}" for stage, block in blocks for layer in _KERAS_ORDER]
    theirs = {}
    for layer in ("conv1", "bn1", *inner, "fc"):
        ours = {field: arrays.get(f"{layer}.{field}") for field in ("weight", "bias", *STATISTICS)}
        kernel, variance = ours["weight"], ours["running_var"]
        if kernel is not None and kernel.ndim == 4:
            ours["bias"] = np.zeros(len(kernel), kernel.dtype)
        if variance is not None:
            ours["running_var"] = _shifted(variance, eps - KERAS_EPS)
        for field, array in ours.items():
            if array is not None:
                theirs[KERAS.theirs(f"{layer}.{field}")] = to_tree_layout(array)
    return theirs


def _shifted(variance: np.ndarray, by: float) -> np.ndarray:
    """Returns variance + by, rounded so that subtracting `by` again gives no negative number."""
    shifted = (variance.astype(np.float64) + by).astype(variance.dtype)
    below = (variance >= 0) & (shifted.astype(np.float64) - by < 0)
    return np.where(below, np.nextafter(shifted, np.ones_like(shifted)), shifted)


def from_keras(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts arrays in Keras' layout, under torchvision's names, into a network that computes the same in evaluation.

    The bias of a convolution is subtracted from the running mean of the BatchNorm after it. The difference between
    Keras' eps and 1e-5 is added to the running variance.
    """
    new = {}
    for name, array in arrays.items():
        layer, _, field = name.rpartition(".")
        if field == "running_mean":
            conv = re.sub(r"downsample\.1$", "downsample.0", layer).replace("bn", "conv")
            bias = arrays.get(f"{conv}.bias")
            array = array if bias is None else (array.astype(np.float64) - bias).astype(array.dtype)
        elif field == "running_var":
            array = (array.astype(np.float64) + (KERAS_EPS - 1e-5)).astype(array.dtype)
        elif field == "bias" and ("conv" in layer or layer.endswith("downsample.0")):
            continue
        new[name] = np.ascontiguousarray(to_torch_layout(array))
    return new
