"""Recognizes which ResNet the arrays of a file belong to, and lists what does not fit a given network."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jax_resnet import resnet
from jax_resnet.naming import COUNT, STATISTICS
from jax_resnet.weight_files import to_torch_layout

__all__ = ["ARCHITECTURES", "check_arrays", "describe", "diagnosis", "recognize"]

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_LISTED = 8  # the largest number of differences that a message lists
_NEW_HEAD = 'training with --init draws a new one, as head="new" does in Python'


def check_arrays(
    arrays: Mapping[str, np.ndarray],
    config: resnet.ResNetConfig,
    path: str | os.PathLike,
) -> None:
    """Checks the arrays of a file against a network. Batch counts are optional.

    Args:
      arrays: {torchvision's name: array in torchvision's layout}.
      config: the network.
      path: the file's name for the message.

    Raises:
      ValueError: the arrays do not fit. The message names the other network that they belong to, if it is recognized.
        Otherwise it lists arrays that are missing, unexpected, of the wrong shape, not float or not finite, and
        negative variances.
    """
    expected = _shapes(config)
    arrays = {name: value for name, value in arrays.items() if name.rpartition(".")[2] != COUNT}
    missing = {name: shape for name, shape in expected.items() if name not in arrays}
    problems = [f"missing: {name} {shape}{_missing_hint(name, arrays)}" for name, shape in missing.items()]
    problems += [f"unexpected: {name} {value.shape}" for name, value in arrays.items() if name not in expected]
    problems += [
        f"{name}: expected {shape}, the file has {arrays[name].shape}{_hint(name, shape, arrays[name].shape, arrays)}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    for name, value in arrays.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            problems.append(f"{name}: expected floats, the file has {value.dtype}")
        elif count := value.size - np.count_nonzero(np.isfinite(value)):
            problems.append(f"{name}: {count:,} of {value.size:,} values are not finite")
        elif name.endswith("running_var") and (count := np.count_nonzero(value < 0)):
            problems.append(f"{name}: {count:,} of {value.size:,} variances are negative")
    if not problems:
        return
    if other := diagnosis(arrays, config):
        raise ValueError(f"{path} {other}")
    if len(problems) > _LISTED:
        problems[_LISTED:] = [f"and {len(problems) - _LISTED:,} more"]
    raise ValueError(f"{path} does not fit {describe(config)}:\n  " + "\n  ".join(problems))


def _missing_hint(name: str, arrays: Mapping[str, np.ndarray]) -> str:
    if not name.startswith("fc."):
        return ""
    found = "fc.weight" in arrays or "fc.bias" in arrays
    return f" ({'half a dense layer' if found else 'no dense layer'}: {_NEW_HEAD})"


def _hint(name: str, expected: tuple[int, ...], given: tuple[int, ...], arrays: Mapping[str, np.ndarray]) -> str:
    if name.startswith("fc.") and given and given[1:] == expected[1:]:
        if name == "fc.bias" and "fc.weight" in arrays and arrays["fc.weight"].shape[:1] != given:
            return " (a different number of classes from the file's fc.weight)"
        return f" (a different number of classes: {_NEW_HEAD})"
    if name == "conv1.weight" and given == (expected[0], 3, *expected[2:]) and expected[1] == 1:
        return ' (a stem for colour: training with --init sums its channels, as stem="grey" does in Python)'
    return " (transposed?)" if sorted(given) == sorted(expected) else ""


def recognize(arrays: Mapping[str, np.ndarray], arch: str | None = None) -> tuple[str, resnet.ResNetConfig]:
    """Recognizes the network of these weights by names and shapes. `check_arrays` checks whether all of them fit.

    Weights do not show which convolution of a bottleneck applies the stride: stride_in is always torchvision's.

    Args:
      arrays: {torchvision's name: array in torchvision's layout}; without a dense layer num_classes is 0.
      arch: the name of the architecture, if it is known; None looks for one that fits.

    Returns:
      the name and the configuration of the network.

    Raises:
      ValueError: the weights belong to another network, which the message names, or the number of blocks fits none.
    """
    if "layer1.0.conv1.weight" not in arrays:
        raise ValueError("holds no ResNet: layer1.0.conv1.weight is missing")
    if other := _other_network(arrays):
        raise ValueError(f"holds {other}: not supported")
    dense = arrays.get("fc.weight", np.empty((0, 0)))
    if dense.ndim != 2:
        raise ValueError(f"holds no ResNet: fc.weight has the shape {dense.shape}")
    settings = dict(
        num_classes=len(dense), in_channels=arrays["conv1.weight"].shape[1], batch_norm="bn1.weight" in arrays
    )
    networks = {name: getattr(resnet, name)(**settings) for name in ARCHITECTURES}
    if arch is not None:
        return arch, networks[arch]
    shape = _block_and_stages(arrays)
    for name, config in networks.items():
        if (config.block, config.stage_sizes) == shape:
            return name, config
    raise ValueError(f"holds a ResNet with {shape[1]} {shape[0]} blocks: not supported, or incomplete")


def describe(config: resnet.ResNetConfig) -> str:
    """Describes a network: "a resnet18 with 5 classes and 3 channels"."""
    shapes = {(c.block, c.stage_sizes): name for name in ARCHITECTURES if (c := getattr(resnet, name)())}
    name = shapes.get((config.block, config.stage_sizes), f"ResNet of {config.stage_sizes} {config.block} blocks")
    plain = "" if config.batch_norm else ", without BatchNorm"
    channels = "1 channel" if config.in_channels == 1 else f"{config.in_channels} channels"
    return f"a {name} with {config.num_classes or 'no'} class{'es' * (config.num_classes != 1)} and {channels}{plain}"


def diagnosis(arrays: Mapping[str, np.ndarray], config: resnet.ResNetConfig) -> str | None:
    """Says which other network the arrays belong to; None if they fit config's blocks or no known network."""
    if "layer1.0.conv1.weight" not in arrays:
        return None
    try:
        arch, found = recognize(arrays)
    except ValueError as error:
        return str(error) if _other_network(arrays) else None
    if (found.block, found.stage_sizes) == (config.block, config.stage_sizes):
        return None
    return f"holds the weights of {describe(found)}, not of {describe(config)}: pass --arch {arch}"


def _block_and_stages(arrays: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    blocks = {match.groups() for name in arrays if (match := re.match(r"layer([1-4])\.(\d+)\.", name))}
    stages = tuple(sum(stage == number for stage, _ in blocks) for number in "1234")
    return "bottleneck" if "layer1.0.conv3.weight" in arrays else "basic", stages


def _other_network(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Names the variant of a ResNet that these weights belong to; None if they may fit one of the five ResNets here."""
    shapes = {name: array.shape for name, array in arrays.items()}
    stem, block = shapes.get("conv1.weight"), shapes.get("layer1.0.conv1.weight", ())
    middle = shapes.get("layer1.0.conv2.weight", ())
    inner = {match[1] for name in arrays if (match := re.match(r"layer\d\.\d+\.(.+)\.\w+$", name))}
    strange = sorted(name for name in inner if not re.fullmatch(r"(conv|bn)[123]|downsample\.[01]", name))
    if arrays["layer1.0.conv1.weight"].dtype.kind in "iu" or any(name.endswith("zero_point") for name in arrays):
        return "a quantized network"
    if any(name.endswith(("weight_orig", "weight_g", "weight_v")) or "parametrizations" in name for name in arrays):
        return "weights in two parts, as pruning and weight normalization save them"
    if any(re.search(r"(^|\.)(se|eca|attn|cbam|gc)\b|^fc\d$|se_module", name) for name in inner):
        return f"a ResNet with attention in its blocks ({strange[0]})"
    if stem is None:
        return "a ResNet with another stem (ResNet-C or D, or an unusual name)"
    if len(stem) != 4 or len(block) != 4:
        return f"no ResNet: its first kernels have the shapes {stem} and {block}"
    if stem[2:] != (7, 7) and stem[:2] != (7, 7):
        return f"a ResNet with a stem of {stem[2]}x{stem[3]}, as for small pictures"
    if len(shapes.get("layer2.0.downsample.1.weight", ())) == 4:
        return "a ResNet-D, which pools in its shortcuts"
    if len(middle) == 4 and "layer1.0.conv3.weight" in arrays and middle[1] < middle[0] and middle[2:] == (3, 3):
        return f"a ResNeXt, with {middle[0] // middle[1]} groups in its convolutions"
    if block[0] != 64 and block[2:] in ((1, 1), (3, 3)):
        return f"a ResNet of another width: {block[0]} instead of 64 channels in its first block"
    if "bn1.weight" in arrays and not any(name.endswith(STATISTICS) for name in arrays):
        return "a ResNet without running statistics (GroupNorm, or moving averages of the parameters alone)"
    if strange:
        return f"a ResNet with {strange[0]} in its blocks"
    return None


@functools.cache
def _shapes(config: resnet.ResNetConfig) -> dict[str, tuple[int, ...]]:
    """Returns {torchvision's name: shape in torchvision's layout}."""
    trees = jax.eval_shape(functools.partial(resnet.init, config), jax.random.key(0))
    empty = jax.tree.map(lambda spec: np.broadcast_to(np.float32(0), spec.shape), trees)
    return {name: to_torch_layout(array).shape for tree in empty for name, array in flatten_dict(tree, sep=".").items()}
