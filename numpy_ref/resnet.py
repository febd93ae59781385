"""ResNet-18, 34, 50, 101 and 152 (He et al. 2015, arXiv:1512.03385), built only from `numpy_ref.layers`.

Read this module from `apply` down. A part of the network without running statistics returns (output, vjp); a part that
may have them returns ((output, new running statistics), vjp). The vjp takes the gradient of the output and returns
(dparams, dx). dparams holds the gradients of the part's parameters in a dict like params; dx is the gradient of the
part's input. `numpy_ref.fast` computes the same numbers several times faster.

A network is a `ResNetConfig` and two nested dicts of arrays, `params` and `batch_stats`. Their paths joined by "." are
torchvision's keys: `params["layer1"]["0"]["conv1"]["weight"]` is `layer1.0.conv1.weight`.

>>> config = resnet18(num_classes=10, in_channels=1)
>>> params, batch_stats = init(config, np.random.default_rng(0))
>>> out, vjp = apply(config, params, batch_stats, np.zeros((2, 32, 48, 1), np.float32), train=True)
>>> dparams, dimages = vjp(np.ones_like(out.logits))
>>> out.logits.shape, dparams["layer4"]["1"]["conv2"]["weight"].shape, dimages.shape
((2, 10), (3, 3, 512, 512), (2, 32, 48, 1))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray as Array

from numpy_ref import layers
from numpy_ref.config import (
    ResNetConfig,
    Tree,
    blocks,
    convolutions,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    shapes,
)

__all__ = ["Output", "ResNetConfig", "apply", "init", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]

MIN_SIZE = 32  # the smallest height and width of an image

Vjp = Callable[[Array], tuple[Tree, Array]]  # dy -> (dparams, dx)


class Output(NamedTuple):
    """What `apply` returns besides the vjp.

    logits: (N, num_classes), before any softmax.
    batch_stats: the running statistics after this batch. Evaluation returns the arrays that were passed in.
    activations: {} or, with return_activations, {"stem", "layer1.0", ..., "layer4.2", "pool"}: the input of the first
      block, each block's output, and the pooled vector. The vjp reads these arrays: copy an array before you change it.
    """

    logits: Array
    batch_stats: Tree
    activations: dict[str, Array]


def apply(
    config: ResNetConfig,
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    images: Array,
    *,
    train: bool,
    return_activations: bool = False,
) -> tuple[Output, Vjp]:
    """Runs the network on a batch.

    Args:
      config: the architecture that params and batch_stats were made for.
      params, batch_stats: nested dicts as `init` returns them.
      images: (N, H, W, in_channels) float, H and W at least 32, normalized by the caller.
      train: whether to normalize with the batch's statistics and update the running statistics.
      return_activations: whether to fill Output.activations.

    Returns:
      Output(logits, batch_stats, activations), and vjp: dlogits (N, num_classes) -> (dparams, dimages).

    Raises:
      ValueError: if images have a wrong rank, type, size or number of channels, if params or batch_stats do not fit
        config, or in training with one value per channel.
    """
    check(config, params, batch_stats, images)
    (x, new_stats), vjp_stem = stem(params, batch_stats, images, train=train)
    activations, vjps = {"stem": x}, []
    for stage, number, stride in blocks(config):
        stats = batch_stats[stage][number] if config.batch_norm else {}
        (x, update), vjp_block = residual_block(config, params[stage][number], stats, x, stride, train=train)
        new_stats.setdefault(stage, {})[number] = update
        activations[f"{stage}.{number}"] = x
        vjps.append((stage, number, vjp_block))
    x, vjp_pool = layers.global_avg_pool(x)
    activations["pool"] = x
    logits, vjp_head = head(params, x)

    def vjp(dlogits: Array) -> tuple[Tree, Array]:
        dparams, dx = vjp_head(dlogits)
        (dx,) = vjp_pool(dx)
        for stage, number, vjp_block in reversed(vjps):
            dblock, dx = vjp_block(dx)
            dparams.setdefault(stage, {})[number] = dblock
        dstem, dimages = vjp_stem(dx)
        return dparams | dstem, dimages

    return Output(logits, new_stats if config.batch_norm else {}, activations if return_activations else {}), vjp


def stem(params: Tree, batch_stats: Tree, images: Array, *, train: bool) -> tuple[tuple[Array, Tree], Vjp]:
    """7x7 convolution with stride 2, BatchNorm, ReLU, 3x3 max-pool with stride 2. Returns the same as `conv_norm`."""
    (x, new_stats), vjp_conv = conv_norm_relu(params, batch_stats, "conv1", "bn1", images, 2, train=train)
    y, vjp_pool = layers.max_pool(x)

    def vjp(dy: Array) -> tuple[Tree, Array]:
        (dx,) = vjp_pool(dy)
        return vjp_conv(dx)

    return (y, new_stats), vjp


def residual_block(
    config: ResNetConfig, params: Tree, batch_stats: Tree, x: Array, stride: int, *, train: bool
) -> tuple[tuple[Array, Tree], Vjp]:
    """relu(branch(x) + shortcut(x)). The shortcut is x itself, or a 1x1 projection of x if the shapes differ.

    Args:
      config: sets the kind of block and which convolution of a bottleneck applies the stride.
      params, batch_stats: the dicts of this block, {"conv1", "bn1", ..., "downsample"}.
      x: (N, H, W, C).
      stride: the block's stride.
      train: as in `apply`.

    Returns:
      (the output (N, H', W', C'), the new running statistics), and vjp: dy -> (dparams, dx).
    """
    new_stats, shortcut, vjp_shortcut = {}, x, None
    if "downsample" in params:
        (shortcut, new_stats["downsample"]), vjp_shortcut = conv_norm(
            params["downsample"], batch_stats.get("downsample", {}), "0", "1", x, stride, train=train
        )
    strides = [conv_stride for _, _, conv_stride in convolutions(config, params["conv1"]["weight"].shape[3], stride)]
    y, vjps = x, []
    for i, conv_stride in enumerate(strides, start=1):
        layer = conv_norm_relu if i < len(strides) else conv_norm
        (y, update), vjp_layer = layer(params, batch_stats, f"conv{i}", f"bn{i}", y, conv_stride, train=train)
        new_stats |= update
        vjps.append(vjp_layer)
    y, vjp_sum = layers.relu(y + shortcut)

    def vjp(dy: Array) -> tuple[Tree, Array]:
        (dsum,) = vjp_sum(dy)  # both terms of a sum receive its gradient
        dparams, dbranch, dshortcut = {}, dsum, dsum
        for vjp_layer in reversed(vjps):
            dlayer, dbranch = vjp_layer(dbranch)
            dparams |= dlayer
        if vjp_shortcut is not None:
            dparams["downsample"], dshortcut = vjp_shortcut(dsum)
        return dparams, dbranch + dshortcut  # x feeds branch and shortcut, so the gradients add up

    return (y, new_stats), vjp


def conv_norm_relu(
    params: Tree, batch_stats: Tree, conv: str, norm: str, x: Array, stride: int, *, train: bool
) -> tuple[tuple[Array, Tree], Vjp]:
    """`conv_norm` followed by a ReLU. Arguments and results are those of `conv_norm`."""
    (y, new_stats), vjp_norm = conv_norm(params, batch_stats, conv, norm, x, stride, train=train)
    y, vjp_relu = layers.relu(y)

    def vjp(dy: Array) -> tuple[Tree, Array]:
        (dy,) = vjp_relu(dy)
        return vjp_norm(dy)

    return (y, new_stats), vjp


def conv_norm(
    params: Tree, batch_stats: Tree, conv: str, norm: str, x: Array, stride: int, *, train: bool
) -> tuple[tuple[Array, Tree], Vjp]:
    """The convolution params[conv], followed by the BatchNorm params[norm] if params has this key.

    Returns:
      (y, the new running statistics {norm: ...}), and vjp: dy -> ({conv: ..., norm: ...}, dx).
    """
    padding = len(params[conv]["weight"]) // 2  # keeps the size at stride 1
    y, vjp_conv = layers.conv2d(x, **params[conv], stride=stride, padding=padding)
    new_stats, vjp_norm = {}, None
    if norm in params:
        (y, mean, var), vjp_norm = layers.batch_norm(y, **params[norm], **batch_stats[norm], train=train)
        new_stats[norm] = {"running_mean": mean, "running_var": var}

    def vjp(dy: Array) -> tuple[Tree, Array]:
        dparams = {}
        if vjp_norm is not None:
            dy, dgamma, dbeta = vjp_norm(dy)
            dparams[norm] = {"weight": dgamma, "bias": dbeta}
        dx, dweight, dbias = vjp_conv(dy)
        dparams[conv] = {"weight": dweight}
        if dbias is not None:
            dparams[conv]["bias"] = dbias
        return dparams, dx

    return (y, new_stats), vjp


def head(params: Tree, x: Array) -> tuple[Array, Vjp]:
    """The dense layer. Without "fc" in params, the logits are x. Returns logits, and vjp: dlogits -> (dparams, dx)."""
    if "fc" not in params:
        return x, lambda dlogits: ({}, dlogits)
    logits, vjp_dense = layers.dense(x, **params["fc"])

    def vjp(dlogits: Array) -> tuple[Tree, Array]:
        dx, dweight, dbias = vjp_dense(dlogits)
        return {"fc": {"weight": dweight, "bias": dbias}}, dx

    return logits, vjp


def init(config: ResNetConfig, rng: np.random.Generator, dtype: Any = np.float32) -> tuple[Tree, Tree]:
    """Draws the initial parameters and running statistics of a network.

    Convolutions are normal with standard deviation sqrt(2 / (kh·kw·K)) (He et al. 2015, arXiv:1502.01852, fan-out).
    BatchNorm weights are 1 (or 0, see config.zero_gamma) and biases 0. A dense layer (C, K) is uniform in ±1/sqrt(C),
    as in PyTorch's Linear. Without BatchNorm, activations would grow exponentially with depth, so convolutions and
    their biases are then uniform in ±1/sqrt(kh·kw·C), PyTorch's default.

    Args:
      config: the architecture.
      rng: a NumPy random generator.
      dtype: the dtype of all arrays, np.float32 or np.float64.

    Returns:
      params and batch_stats, nested dicts; batch_stats is {} without BatchNorm.
    """

    def draw(tree: Tree) -> Tree:
        """Returns arrays for a tree of shapes. Names and ranks identify the kind of layer."""
        if "weight" not in tree and "running_var" not in tree:
            return {name: draw(subtree) for name, subtree in tree.items()}
        if "running_var" in tree or len(tree["weight"]) == 1:
            ones = ("weight", "running_var")
            return {name: np.full(shape, float(name in ones), dtype) for name, shape in tree.items()}
        *inputs, filters = tree["weight"]
        if len(inputs) == 3 and config.batch_norm:
            deviation = math.sqrt(2 / (inputs[0] * inputs[1] * filters))
            return {"weight": (rng.standard_normal(tree["weight"]) * deviation).astype(dtype)}
        bound = 1 / math.sqrt(math.prod(inputs))
        return {name: rng.uniform(-bound, bound, shape).astype(dtype) for name, shape in tree.items()}

    params, batch_stats = (draw(tree) for tree in shapes(config))
    if config.zero_gamma and config.batch_norm:
        for stage, number, _ in blocks(config):
            params[stage][number]["bn2" if config.block == "basic" else "bn3"]["weight"][:] = 0
    return params, batch_stats


def check(config: ResNetConfig, params: Mapping[str, Any], batch_stats: Mapping[str, Any], images: Array) -> None:
    """Raises a ValueError if images, the keys of a dict (the message lists them) or an array's shape do not fit."""
    if images.ndim != 4 or images.shape[3] != config.in_channels or not len(images):
        hint = ": is this NCHW?" if images.ndim == 4 and images.shape[1] == config.in_channels else ""
        raise ValueError(
            f"images must be (N, H, W, C) with N >= 1 and C = {config.in_channels} (config.in_channels), "
            f"got {images.shape}{hint}"
        )
    if min(images.shape[1:3]) < MIN_SIZE:
        raise ValueError(f"images must be at least {MIN_SIZE}x{MIN_SIZE}, got {images.shape[1]}x{images.shape[2]}")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be float, got {images.dtype}: convert and normalize them first")

    def check_tree(given: Any, expected: Any, name: str) -> None:
        if isinstance(expected, tuple):
            if np.shape(given) != expected:
                raise ValueError(f"{name} must have the shape {expected} for {config}, got {np.shape(given)}")
        elif not isinstance(given, Mapping) or set(given) != set(expected):
            found = sorted(given) if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(f"{name} must have the keys {sorted(expected)} for {config}, got {found}")
        else:
            for key, value in expected.items():
                check_tree(given[key], value, f"{name}.{key}")

    for name, given, expected in zip(("params", "batch_stats"), (params, batch_stats), shapes(config), strict=True):
        check_tree(given, expected, name)
