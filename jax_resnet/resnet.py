"""ResNet-18, 34, 50, 101 and 152 (He et al. 2015, arXiv:1512.03385) as data and one pure function.

A network is a `ResNetConfig` (static, hashable) and two nested dicts of arrays, `params` and `batch_stats`. Their paths
joined by "." are torchvision's keys: `params["layer1"]["0"]["conv1"]["weight"]` is `layer1.0.conv1.weight`.

>>> import jax, jax.numpy as jnp
>>> config = resnet18(num_classes=10, in_channels=1)
>>> params, batch_stats = init(config, jax.random.key(0))
>>> out = apply(config, params, batch_stats, jnp.zeros((2, 64, 96, 1)), train=False)
>>> out.logits.shape
(2, 10)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from jax_resnet import cpu, layers
from jax_resnet.architecture import (
    MIN_SIZE,
    STAGE_WIDTHS,
    Block,
    Conv,
    ResNetConfig,
    blocks,
    feature_channels,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    stem,
)
from jax_resnet.symbolic import below

__all__ = [
    "MIN_SIZE",
    "STAGE_WIDTHS",
    "Block",
    "Conv",
    "Output",
    "ResNetConfig",
    "apply",
    "blocks",
    "feature_channels",
    "init",
    "init_dense",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "stem",
]


class Output(NamedTuple):
    """What `apply` returns.

    logits: (N, num_classes), before any softmax; with num_classes=0 the pooled vector, (N, 512) or (N, 2048).
    batch_stats: the running statistics after this batch; in evaluation they are unchanged.
    activations: {}, or with return_activations the input of the first block ("stem"), each block's output ("layer1.0",
      ..., "layer4.2") and the pooled vector ("pool").
    """

    logits: Array
    batch_stats: dict[str, Any]
    activations: dict[str, Array]


def init(config: ResNetConfig, key: Array, dtype: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draws the parameters and the initial running statistics of a network.

    Convolutions are normal with deviation sqrt(2 / (kh·kw·K)) (He et al. 2015, arXiv:1502.01852, by fan-out). BatchNorm
    weights are 1 and biases 0. The dense layer is uniform within ±1/sqrt(in), as in PyTorch's Linear. Without BatchNorm
    activations would explode with depth, so convolutions and their biases then take PyTorch's default, uniform within
    ±1/sqrt(kh·kw·C).

    Args:
      config: the architecture.
      key: a JAX random key.
      dtype: the type of all arrays, promoted to at least float32; None takes JAX's default float type.

    Returns:
      params and batch_stats, nested dicts. Without BatchNorm batch_stats is {}; with num_classes=0 params has no "fc".
    """
    dtype = jnp.promote_types(jnp.zeros((), dtype).dtype, jnp.float32)
    params: dict[str, Any] = {}
    batch_stats: dict[str, Any] = {}

    def draw(sample: Callable[..., Array], scale: float, *shape: int) -> Array:
        nonlocal key
        key, subkey = jax.random.split(key)
        return _draw(sample, scale, subkey, shape, dtype)

    def add(conv: Conv, gamma: float = 1.0) -> None:
        size, c_in, c_out = conv.size, conv.in_channels, conv.out_channels
        if config.batch_norm:
            deviation = math.sqrt(2 / (size * size * c_out))
            params[f"{conv.name}.weight"] = draw(jax.random.normal, deviation, size, size, c_in, c_out)
            params[f"{conv.norm}.weight"] = jnp.full(c_out, gamma, dtype)
            params[f"{conv.norm}.bias"] = jnp.zeros(c_out, dtype)
            batch_stats[f"{conv.norm}.running_mean"] = jnp.zeros(c_out, dtype)
            batch_stats[f"{conv.norm}.running_var"] = jnp.ones(c_out, dtype)
        else:
            bound = 1 / math.sqrt(size * size * c_in)
            params[f"{conv.name}.weight"] = draw(_uniform, bound, size, size, c_in, c_out)
            params[f"{conv.name}.bias"] = draw(_uniform, bound, c_out)

    add(stem(config))
    for block in blocks(config):
        for conv in block.convs:
            add(conv, gamma=0.0 if config.zero_gamma and conv is block.convs[-1] else 1.0)
        if block.projection:
            add(block.projection)
    if config.num_classes:
        params["fc"] = init_dense(config, key, dtype)
    return unflatten_dict(params, sep="."), unflatten_dict(batch_stats, sep=".")


def init_dense(config: ResNetConfig, key: Array, dtype: Any = None) -> dict[str, Array]:
    """Draws only the dense layer: {"weight": (features, num_classes), "bias": (num_classes,)}."""
    features = feature_channels(config)
    weight_key, bias_key = jax.random.split(key)
    dtype = jnp.promote_types(jnp.zeros((), dtype).dtype, jnp.float32)
    return {
        "weight": _draw(_uniform, features**-0.5, weight_key, (features, config.num_classes), dtype),
        "bias": _draw(_uniform, features**-0.5, bias_key, (config.num_classes,), dtype),
    }


_uniform = functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0)


def _draw(sample: Callable[..., Array], scale: float, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns scale * sample(key, shape, dtype), cut from a draw whose size is a power of two.

    XLA compiles a separate program for each size, which is slow; powers of two need few. Entry i of a draw depends on
    the key and on i alone, so a direct draw of this shape gives the same numbers.
    """
    size = math.prod(shape)
    return _cut(sample(key, (1 << (size - 1).bit_length(),), dtype), scale, shape)


@functools.partial(jax.jit, static_argnums=2)
def _cut(flat: Array, scale: float, shape: tuple[int, ...]) -> Array:
    return (flat[: math.prod(shape)] * scale).reshape(shape)


def apply(
    config: ResNetConfig,
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    images: Array,
    *,
    train: bool,
    dtype: Any = None,
    remat: bool = False,
    return_activations: bool = False,
) -> Output:
    """Runs the network on a batch.

    Args:
      config: the architecture of params and batch_stats.
      params, batch_stats: nested dicts as `init` returns them.
      images: (N, H, W, in_channels) float, H and W at least 32, normalized by the caller.
      train: True normalizes with the batch's statistics and updates the running statistics.
      dtype: the type of images, kernels and activations, such as jnp.bfloat16; None keeps the types of the arrays.
        BatchNorm's statistics, the pooled vector and the logits stay at least float32.
      remat: whether to recompute each block in the backward pass. This takes less memory and more time.
      return_activations: whether to fill Output.activations.

    Returns:
      Output(logits, batch_stats, activations).

    Raises:
      ValueError: images have the wrong rank, type, size or number of channels, or the parameters do not fit config.
    """
    _check_images(config, images)
    weights = flatten_dict(dict(params), sep=".")
    stats = flatten_dict(dict(batch_stats), sep=".")
    _check_names(config, weights, stats)
    options = {"train": train, "dtype": dtype}

    x = images if dtype is None else images.astype(dtype)
    x, new_stats = _conv_norm(config, stem(config), x, weights, stats, **options)
    x = layers.max_pool(layers.relu(x))
    activations = {"stem": x}
    for block in blocks(config):
        residual = functools.partial(_residual, config, *_without_prefix(block), **options)
        run = cpu.recomputed(residual) if remat else residual
        x, update = run(x, *(_below(arrays, block.name) for arrays in (weights, stats)))
        new_stats |= {f"{block.name}.{name}": array for name, array in update.items()}
        activations[block.name] = x
    x = layers.global_avg_pool(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    activations["pool"] = x
    logits = layers.dense(x, weights["fc.weight"], weights["fc.bias"]) if config.num_classes else x
    return Output(logits, unflatten_dict(new_stats, sep="."), activations if return_activations else {})


def _conv_norm(
    config: ResNetConfig,
    conv: Conv,
    x: Array,
    weights: Mapping[str, Array],
    stats: Mapping[str, Array],
    *,
    train: bool,
    dtype: Any,
) -> tuple[Array, dict[str, Array]]:
    """Applies a convolution and its BatchNorm. Returns the result and the new running statistics."""
    kernel = weights[f"{conv.name}.weight"]
    kernel = kernel.astype(dtype or jnp.result_type(x, kernel))
    bias = None if config.batch_norm else weights[f"{conv.name}.bias"].astype(kernel.dtype)
    y = layers.conv2d(x, kernel, bias, stride=conv.stride, padding=conv.size // 2)
    if not config.batch_norm:
        return y, {}
    affine = (weights[f"{conv.norm}.weight"], weights[f"{conv.norm}.bias"])
    names = (f"{conv.norm}.running_mean", f"{conv.norm}.running_var")
    y, *running = layers.batch_norm(
        y,
        *affine,
        *(stats[name] for name in names),
        train=train,
        momentum=config.batch_norm_momentum,
        eps=config.batch_norm_eps,
    )
    return y, dict(zip(names, running, strict=True))


# The jit and the names without the block's prefix let JAX trace and lower equal blocks once.
@functools.partial(jax.jit, static_argnames=("config", "convs", "projection", "train", "dtype"))
def _residual(
    config: ResNetConfig,
    convs: tuple[Conv, ...],
    projection: Conv | None,
    x: Array,
    weights: Mapping[str, Array],
    stats: Mapping[str, Array],
    **options: Any,
) -> tuple[Array, dict[str, Array]]:
    """Applies a residual block. Returns the result and the new running statistics."""
    shortcut, new_stats = _conv_norm(config, projection, x, weights, stats, **options) if projection else (x, {})
    for conv in convs:
        x, update = _conv_norm(config, conv, x, weights, stats, **options)
        new_stats |= update
        if conv is not convs[-1]:
            x = layers.relu(x)
    return cpu.materialize(layers.relu(x + shortcut)), new_stats


def _without_prefix(block: Block) -> tuple[tuple[Conv, ...], Conv | None]:
    """The convolutions of a block and its shortcut, with names relative to the block: "conv1", "downsample.0"."""

    def bare(conv: Conv) -> Conv:
        name, norm = (text.removeprefix(f"{block.name}.") for text in (conv.name, conv.norm))
        return conv._replace(name=name, norm=norm)

    return tuple(map(bare, block.convs)), block.projection and bare(block.projection)


def _below(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The arrays below a prefix, with names relative to it."""
    return {name.removeprefix(f"{prefix}."): a for name, a in arrays.items() if name.startswith(f"{prefix}.")}


def _check_names(config: ResNetConfig, weights: Mapping[str, Array], stats: Mapping[str, Array]) -> None:
    convs = [stem(config)]
    for block in blocks(config):
        convs += [*block.convs, block.projection] if block.projection else block.convs
    for conv in convs:
        names = [f"{conv.name}.weight"]
        names += [f"{conv.norm}.weight", f"{conv.norm}.bias"] if config.batch_norm else [f"{conv.name}.bias"]
        running = [f"{conv.norm}.running_mean", f"{conv.norm}.running_var"] if config.batch_norm else []
        missing = [name for name in names if name not in weights] + [name for name in running if name not in stats]
        if missing:
            raise ValueError(f"params and batch_stats do not fit {config}: there is no {missing[0]!r}")
    if config.num_classes and not {"fc.weight", "fc.bias"} <= weights.keys():
        raise ValueError(f"params and batch_stats do not fit {config}: there is no dense layer 'fc'")


def _check_images(config: ResNetConfig, images: Array) -> None:
    if images.ndim != 4 or images.shape[3] != config.in_channels:
        hint = ": is this NCHW?" if images.ndim == 4 and images.shape[1] == config.in_channels else ""
        raise ValueError(
            f"images must be (N, H, W, C) with C = {config.in_channels} (config.in_channels), got {images.shape}{hint}"
        )
    if any(below(size, MIN_SIZE) for size in images.shape[1:3]):
        raise ValueError(f"images must be at least {MIN_SIZE}x{MIN_SIZE}, got {images.shape[1]}x{images.shape[2]}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be float, got {images.dtype}: convert and normalize them first")
