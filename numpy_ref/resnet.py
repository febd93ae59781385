"""ResNet-18, 34, 50, 101 and 152 (He et al. 2015, arXiv:1512.03385) in NumPy, forward and backward.

A network is a `ResNetConfig` and two nested dicts of arrays, `params` and `batch_stats`, whose paths joined by "." are
torchvision's keys: `params["layer1"]["0"]["conv1"]["weight"]` is `layer1.0.conv1.weight`. `apply` runs it and returns,
as every layer does, its output and the function that carries gradients back.

>>> config = resnet18(num_classes=10, in_channels=1)
>>> params, batch_stats = init(config, np.random.default_rng(0))
>>> out, vjp = apply(config, params, batch_stats, np.zeros((2, 32, 48, 1), np.float32), train=True)
>>> dparams, dimages = vjp(np.ones_like(out.logits))
>>> out.logits.shape, dparams["layer4"]["1"]["conv2"]["weight"].shape, dimages.shape
((2, 10), (3, 3, 512, 512), (2, 32, 48, 1))
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy import ndarray as Array

from numpy_ref import layers
from numpy_ref.fused import add_relu, batch_norm_relu
from numpy_ref.threads import Gather, Team, alone, cores

MIN_SIZE = 32
STAGE_WIDTHS = (64, 128, 256, 512)

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The architecture.

    Attributes:
      block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1 with four times the width at its end).
      stage_sizes: the number of blocks in each of the four stages.
      num_classes: the number of logits.
      in_channels: the channels of the images, 3 for RGB, 1 for grey.
      stride_in: which convolution of a bottleneck has the stride: "conv2", its 3x3 (v1.5, torchvision), or "conv1",
        its first 1x1 (v1, the paper). A basic block has it in its first 3x3 either way.
      batch_norm: False leaves every BatchNorm out and gives the convolutions a bias.
      zero_gamma: whether `init` sets the weight of each block's last BatchNorm to 0 (Goyal et al. 2017,
        arXiv:1706.02677, section 5.1).
    """

    block: Literal["basic", "bottleneck"]
    stage_sizes: tuple[int, int, int, int]
    num_classes: int = 1000
    in_channels: int = 3
    stride_in: Literal["conv2", "conv1"] = "conv2"
    batch_norm: bool = True
    zero_gamma: bool = False

    def __post_init__(self):
        if self.block not in ("basic", "bottleneck"):
            raise ValueError(f'block must be "basic" or "bottleneck", got {self.block!r}')
        if self.stride_in not in ("conv1", "conv2"):
            raise ValueError(f'stride_in must be "conv2" (v1.5) or "conv1" (v1), got {self.stride_in!r}')
        if len(self.stage_sizes) != 4 or min(self.stage_sizes) < 1:
            raise ValueError(f"stage_sizes must be four numbers >= 1, got {self.stage_sizes}")
        if self.num_classes < 1 or self.in_channels < 1:
            raise ValueError(f"num_classes and in_channels must be >= 1, got {self.num_classes}, {self.in_channels}")


resnet18 = functools.partial(ResNetConfig, "basic", (2, 2, 2, 2))
resnet34 = functools.partial(ResNetConfig, "basic", (3, 4, 6, 3))
resnet50 = functools.partial(ResNetConfig, "bottleneck", (3, 4, 6, 3))
resnet101 = functools.partial(ResNetConfig, "bottleneck", (3, 4, 23, 3))
resnet152 = functools.partial(ResNetConfig, "bottleneck", (3, 8, 36, 3))


class Output(NamedTuple):
    """What `apply` returns beside its vjp.

    logits: (N, num_classes), before any softmax.
    batch_stats: the running statistics after this batch (in evaluation those that were passed in).
    activations: {} or, with return_activations, {"stem", "layer1.0", ..., "layer4.2", "pool"}: the input of the first
      block, each block's output, and the pooled vector. The vjp reads them too: copy one before you change it.
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
    threads: int | None = None,
) -> tuple[Output, layers.Vjp]:
    """Runs the network on a batch.

    Args:
      config: the architecture that params and batch_stats were made for.
      params, batch_stats: nested dicts as `init` returns them.
      images: (N, H, W, in_channels) float, H and W at least 32, normalized by the caller.
      train: True normalizes with the batch's statistics and updates the running ones.
      return_activations: fill Output.activations.
      threads: that share the batch, at most one for two images [default: one per core].

    Returns:
      Output(logits, batch_stats, activations), and vjp: dlogits (N, num_classes) -> (dparams, dimages), dparams a
      nested dict like params.

    Raises:
      ValueError: for images of another rank, type, size or number of channels, or parameters of another network.
    """
    _check_images(config, images)
    _check_trees(config, params, batch_stats)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    size = min(cores() if threads is None else threads, len(images) // 2)
    if size <= 1:
        return _apply(config, params, batch_stats, images, train, return_activations, alone)
    team, parts = Team(size), np.array_split(images, size)
    runs = [
        functools.partial(_apply, config, params, batch_stats, part, train, return_activations, gather)
        for part, gather in zip(parts, team.gathers, strict=True)
    ]
    outs, vjps = zip(*team.run(runs), strict=True)
    logits = np.concatenate([out.logits for out in outs])
    activations = {name: np.concatenate([out.activations[name] for out in outs]) for name in outs[0].activations}

    def vjp(dlogits: Array) -> tuple[Tree, Array]:
        runs = [functools.partial(*of_part) for of_part in zip(vjps, np.array_split(dlogits, size), strict=True)]
        dparams, dimages = zip(*team.run(runs), strict=True)
        layers_of_all = list(zip(*map(_layers, dparams), strict=True))
        team.run([functools.partial(_add_to_first, layers_of_all[i::size]) for i in range(size)])
        return dparams[0], np.concatenate(dimages)

    return Output(logits, outs[0].batch_stats, activations), vjp


def _layers(tree: Tree) -> Iterator[dict[str, Array]]:
    """The dicts of arrays in a tree, in an order that its names alone decide."""
    if all(isinstance(value, dict) for value in tree.values()):
        for name in sorted(tree):
            yield from _layers(tree[name])
    else:
        yield tree


def _add_to_first(layers_of_all: list[tuple[dict[str, Array], ...]]) -> None:
    for first, *others in layers_of_all:
        for other in others:
            for name in first:
                first[name] += other[name]


def _apply(
    config: ResNetConfig,
    params: Tree,
    batch_stats: Tree,
    images: Array,
    train: bool,
    return_activations: bool,
    gather: Gather,
) -> tuple[Output, layers.Vjp]:
    """`apply` to the images of one thread."""
    (x, new_stats), vjp_stem = stem(params, batch_stats, images, train=train, gather=gather)
    activations, vjps = {"stem": x}, []
    for stage, number, stride in blocks(config):
        p = params[stage][number]
        stats = batch_stats[stage][number] if config.batch_norm else {}
        (x, update), vjp = residual_block(config, p, stats, x, stride, train=train, gather=gather)
        new_stats.setdefault(stage, {})[number] = update
        activations[f"{stage}.{number}"] = x
        vjps.append((stage, number, vjp))
    pooled, vjp_pool = layers.global_avg_pool(x)
    activations["pool"] = pooled
    logits, vjp_head = layers.dense(pooled, params["fc"]["weight"], params["fc"]["bias"])

    def vjp(dlogits: Array) -> tuple[Tree, Array]:
        dpooled, dweight, dbias = vjp_head(dlogits)
        dparams: Tree = {"fc": {"weight": dweight, "bias": dbias}}
        (dx,) = vjp_pool(dpooled)
        for stage, number, vjp_block in reversed(vjps):
            dparams.setdefault(stage, {})[number], dx = vjp_block(dx)
        dstem, dimages = vjp_stem(dx)
        return dstem | dparams, dimages

    new_stats = new_stats if config.batch_norm else {}
    return Output(logits, new_stats, activations if return_activations else {}), vjp


def blocks(config: ResNetConfig) -> Iterator[tuple[str, str, int]]:
    """The residual blocks in their order: stage ("layer3"), number in it ("10"), stride."""
    for stage, count in enumerate(config.stage_sizes, start=1):
        for number in range(count):
            yield f"layer{stage}", str(number), 2 if stage > 1 and number == 0 else 1


def stem(
    params: Tree, batch_stats: Tree, images: Array, *, train: bool, gather: Gather = alone
) -> tuple[tuple[Array, Tree], layers.Vjp]:
    """7x7 convolution with stride 2, BatchNorm, ReLU, 3x3 max-pool with stride 2.

    Returns:
      (the input of the first block, the new running statistics), and vjp: dx -> (dparams, dimages).
    """
    x, new_stats, vjp_conv = _conv_norm(params, batch_stats, "conv1", "bn1", images, 2, train=train, gather=gather)
    x, vjp_pool = layers.max_pool(x)
    return (x, new_stats), lambda dx: vjp_conv(*vjp_pool(dx))


def residual_block(
    config: ResNetConfig,
    params: Tree,
    batch_stats: Tree,
    x: Array,
    stride: int,
    *,
    train: bool,
    gather: Gather = alone,
) -> tuple[tuple[Array, Tree], layers.Vjp]:
    """relu(branch(x) + shortcut(x)); the shortcut is x itself or, where shapes differ, its 1x1 projection.

    Args:
      config: says where a bottleneck has its stride.
      params, batch_stats: of this block: {"conv1", "bn1", ..., "downsample"}.
      x: (N, H, W, C).
      stride: of the block.
      train: as in `apply`.
      gather: of the threads that share the batch (see `numpy_ref.threads`).

    Returns:
      (the output (N, H', W', C'), the new running statistics), and vjp: dy, overwritten -> (dparams, dx).
    """
    count = 2 if config.block == "basic" else 3
    strided = "conv1" if config.block == "basic" else config.stride_in
    names = [(f"conv{i}", f"bn{i}", stride if strided == f"conv{i}" else 1) for i in range(1, count + 1)]
    shortcut, vjp_shortcut, new_stats = x, None, {}
    if "downsample" in params:
        stats = batch_stats.get("downsample", {})
        shortcut, new_downsample, vjp_shortcut = _conv_norm(
            params["downsample"], stats, "0", "1", x, stride, train=train, relu=False, gather=gather
        )
        new_stats["downsample"] = new_downsample
    branch, vjps = x, []
    for conv, norm, conv_stride in names:
        last = shortcut if conv == names[-1][0] else None
        branch, update, vjp = _conv_norm(
            params, batch_stats, conv, norm, branch, conv_stride, last, train=train, gather=gather
        )
        new_stats |= update
        vjps.append(vjp)

    def vjp(dy: Array) -> tuple[Tree, Array]:
        dparams, dx, dshortcut = vjps[-1](dy)
        for vjp_conv in reversed(vjps[:-1]):
            gradients, dx = vjp_conv(dx)
            dparams |= gradients
        if vjp_shortcut is not None:
            dparams["downsample"], dshortcut = vjp_shortcut(dshortcut)
        return dparams, np.add(dx, dshortcut, out=dx)

    return (branch, new_stats), vjp


def _conv_norm(
    params: Tree,
    batch_stats: Tree,
    conv: str,
    norm: str,
    x: Array,
    stride: int,
    shortcut: Array | None = None,
    *,
    train: bool,
    relu: bool = True,
    gather: Gather = alone,
) -> tuple[Array, Tree, layers.Vjp]:
    """relu(norm(conv(x)) + shortcut), the norm only where params has one.

    Returns:
      y, the new running statistics {norm: ...}, and vjp: dy, overwritten -> ({conv: ..., norm: ...}, dx), and dshortcut
      where there is a shortcut.
    """
    kernel = params[conv]["weight"]
    y, vjp_conv = layers.conv2d(x, kernel, params[conv].get("bias"), stride=stride, padding=len(kernel) // 2)
    new_stats = {}
    if norm in params:
        affine, running = params[norm], batch_stats[norm]
        arrays = (affine["weight"], affine["bias"], running["running_mean"], running["running_var"])
        (y, mean, var), vjp_norm = batch_norm_relu(y, *arrays, shortcut, train=train, relu=relu, gather=gather)
        new_stats[norm] = {"running_mean": mean, "running_var": var}
    else:
        y, vjp_relu = add_relu(y, shortcut, relu=relu)

    def vjp(dy: Array) -> tuple[Any, ...]:
        dparams = {}
        if norm in params:
            dy, dgamma, dbeta, dshortcut = vjp_norm(dy)
            dparams[norm] = {"weight": dgamma, "bias": dbeta}
        else:
            dy, dshortcut = vjp_relu(dy)
        dx, dkernel, dbias = vjp_conv(dy)
        dparams[conv] = {"weight": dkernel} if dbias is None else {"weight": dkernel, "bias": dbias}
        return (dparams, dx) if shortcut is None else (dparams, dx, dshortcut)

    return y, new_stats, vjp


def shapes(config: ResNetConfig) -> tuple[Tree, Tree]:
    """The shapes of all parameters and running statistics: nested dicts of tuples, as `init` fills them."""
    out = STAGE_WIDTHS[0]
    params: Tree = {}
    batch_stats: Tree = {}

    def add(params: Tree, batch_stats: Tree, conv: str, norm: str, size: int, channels: int, filters: int) -> None:
        params[conv] = {"weight": (size, size, channels, filters)}
        if config.batch_norm:
            params[norm] = {"weight": (filters,), "bias": (filters,)}
            batch_stats[norm] = {"running_mean": (filters,), "running_var": (filters,)}
        else:
            params[conv]["bias"] = (filters,)

    add(params, batch_stats, "conv1", "bn1", 7, config.in_channels, out)
    for stage, number, stride in blocks(config):
        channels, width = out, STAGE_WIDTHS[int(stage[-1]) - 1]
        p = params.setdefault(stage, {}).setdefault(number, {})
        stats = batch_stats.setdefault(stage, {}).setdefault(number, {})
        if config.block == "basic":
            out = width
            add(p, stats, "conv1", "bn1", 3, channels, width)
            add(p, stats, "conv2", "bn2", 3, width, width)
        else:
            out = 4 * width
            add(p, stats, "conv1", "bn1", 1, channels, width)
            add(p, stats, "conv2", "bn2", 3, width, width)
            add(p, stats, "conv3", "bn3", 1, width, out)
        if stride > 1 or channels != out:
            projection: tuple[Tree, Tree] = {}, {}
            add(*projection, "0", "1", 1, channels, out)
            p["downsample"], stats["downsample"] = projection
    params["fc"] = {"weight": (out, config.num_classes), "bias": (config.num_classes,)}
    return params, batch_stats if config.batch_norm else {}


def init(config: ResNetConfig, rng: np.random.Generator, dtype: Any = np.float32) -> tuple[Tree, Tree]:
    """Draws the parameters and the first running statistics of a network.

    Convolutions are normal with deviation sqrt(2 / (kh·kw·K)) (He et al. 2015, arXiv:1502.01852, by fan-out), BatchNorm
    weights 1 and biases 0, the dense layer uniform within 1/sqrt(in), as PyTorch's Linear. Without BatchNorm that
    explodes with depth: there convolutions are PyTorch's default, uniform within 1/sqrt(kh·kw·C), their biases too.

    Args:
      config: the architecture.
      rng: a NumPy random generator.
      dtype: of all arrays, np.float32 or np.float64.

    Returns:
      params and batch_stats, nested dicts; batch_stats is {} without BatchNorm.
    """

    def draw(shapes: Tree) -> Tree:
        """Arrays for a tree of shapes; the arrays of one layer are told by their names and ranks."""
        if "running_mean" in shapes:
            return {"running_mean": np.zeros(shapes["running_mean"]), "running_var": np.ones(shapes["running_var"])}
        if "weight" not in shapes:
            return {name: draw(subtree) for name, subtree in shapes.items()}
        weight = shapes["weight"]
        if len(weight) == 1:
            return {"weight": np.ones(weight), "bias": np.zeros(weight)}
        if len(weight) == 4 and config.batch_norm:
            return {"weight": rng.standard_normal(weight) * math.sqrt(2 / (weight[0] * weight[1] * weight[3]))}
        bound = 1 / math.sqrt(math.prod(weight[:-1]))
        return {name: rng.uniform(-bound, bound, shape) for name, shape in shapes.items()}

    params, batch_stats = (draw(tree) for tree in shapes(config))
    if config.zero_gamma and config.batch_norm:
        last = "bn2" if config.block == "basic" else "bn3"
        for stage, number, _ in blocks(config):
            params[stage][number][last]["weight"][:] = 0
    return _cast(params, dtype), _cast(batch_stats, dtype)


def _cast(tree: Tree, dtype: Any) -> Tree:
    return {
        name: _cast(value, dtype) if isinstance(value, dict) else value.astype(dtype) for name, value in tree.items()
    }


def _check_images(config: ResNetConfig, images: Array) -> None:
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


def _check_trees(config: ResNetConfig, params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> None:
    """Raises a ValueError that names the first array that is missing, superfluous or misshapen."""

    def check(given: Any, expected: Any, name: str) -> None:
        if isinstance(expected, tuple):
            if np.shape(given) != expected:
                raise ValueError(f"{name} must be {expected} for {config}, got {np.shape(given)}")
        elif not isinstance(given, Mapping) or set(given) != set(expected):
            found = sorted(given) if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(f"{name} must have {sorted(expected)} for {config}, got {found}")
        else:
            for key, value in expected.items():
                check(given[key], value, f"{name}.{key}")

    for name, given, expected in zip(("params", "batch_stats"), (params, batch_stats), shapes(config), strict=True):
        check(given, expected, name)
