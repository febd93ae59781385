"""The network of `numpy_ref.resnet`, made faster in three ways.

- `threads` gives each core a part of the batch. The parts exchange statistics in BatchNorm.
- `fused` computes BatchNorm, the residual sum and ReLU together, in blocks that fit into the cache, and overwrites
  arrays instead of allocating new ones where this is possible.
- A training step can skip the gradient of the images, which no update needs.

About two thirds of a training step are matrix products, whose speed depends on NumPy's BLAS (docs/numpy.md has figures,
and what was tried). The rest is limited by memory: NumPy makes one pass over an array per operation, and compiled code
makes one pass for all operations. Each thread also computes a gradient of all weights, and these gradients must be
added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy import ndarray as Array

from numpy_ref import layers
from numpy_ref.config import Tree, blocks, convolutions
from numpy_ref.convolution import Vjp, unfolded_blocks
from numpy_ref.fast.fused import add_relu, batch_norm_relu
from numpy_ref.fast.threads import Gather, Team, alone, cores
from numpy_ref.resnet import Output, ResNetConfig, check, head


def apply(
    config: ResNetConfig,
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    images: Array,
    *,
    train: bool,
    return_activations: bool = False,
    image_gradient: bool = True,
    threads: int | None = None,
) -> tuple[Output, Vjp]:
    """Runs the network on a batch.

    Args:
      config: the architecture that params and batch_stats were made for.
      params, batch_stats: nested dicts as `init` returns them.
      images: (N, H, W, in_channels) float, H and W at least 32, normalized by the caller.
      train: whether to normalize with the batch's statistics and update the running statistics.
      return_activations: whether to fill Output.activations.
      image_gradient: False saves time; vjp then returns None for dimages.
      threads: the maximum number of threads, limited to half the number of images [default: one per core].

    Returns:
      Output(logits, batch_stats, activations), and vjp: dlogits (N, num_classes) -> (dparams, dimages). dparams is a
      nested dict like params.

    Raises:
      ValueError: if images have a wrong rank, type, size or number of channels, if params or batch_stats do not fit
        config, if threads < 1, or in training with one value per channel.
    """
    check(config, params, batch_stats, images)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    size = min(cores() if threads is None else threads, len(images) // 2)
    if size <= 1:
        return _apply(config, params, batch_stats, images, train, return_activations, image_gradient, alone)
    team, parts = Team(size), np.array_split(images, size)
    runs = [
        functools.partial(_apply, config, params, batch_stats, part, train, return_activations, image_gradient, gather)
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
        return dparams[0], np.concatenate(dimages) if image_gradient else None

    return Output(logits, outs[0].batch_stats, activations), vjp


def _layers(tree: Tree) -> Iterator[dict[str, Array]]:
    """Yields the dicts of arrays in a tree, in the order of the sorted keys."""
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
    image_gradient: bool,
    gather: Gather,
) -> tuple[Output, Vjp]:
    """`apply` for the images of one thread."""
    (x, new_stats), vjp_stem = stem(
        params, batch_stats, images, train=train, image_gradient=image_gradient, gather=gather
    )
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
    logits, vjp_head = head(params, pooled)

    def vjp(dlogits: Array) -> tuple[Tree, Array]:
        dparams, dpooled = vjp_head(dlogits)
        (dx,) = vjp_pool(dpooled)
        for stage, number, vjp_block in reversed(vjps):
            dparams.setdefault(stage, {})[number], dx = vjp_block(dx)
        dstem, dimages = vjp_stem(dx)
        return dstem | dparams, dimages

    new_stats = new_stats if config.batch_norm else {}
    return Output(logits, new_stats, activations if return_activations else {}), vjp


def stem(
    params: Tree,
    batch_stats: Tree,
    images: Array,
    *,
    train: bool,
    image_gradient: bool = True,
    gather: Gather = alone,
) -> tuple[tuple[Array, Tree], Vjp]:
    """7x7 convolution with stride 2, BatchNorm, ReLU, 3x3 max-pool with stride 2.

    Returns:
      (the input of the first block, the new running statistics), and vjp: dx -> (dparams, dimages).
    """
    conv2d = layers.conv2d if image_gradient else conv2d_of_images
    x, new_stats, vjp_conv = _conv_norm_relu(
        params, batch_stats, "conv1", "bn1", images, 2, train=train, conv2d=conv2d, gather=gather
    )
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
) -> tuple[tuple[Array, Tree], Vjp]:
    """relu(branch(x) + shortcut(x)). The shortcut is x itself, or a 1x1 projection of x if the shapes differ.

    Args:
      config: sets the kind of block and which convolution of a bottleneck applies the stride.
      params, batch_stats: the dicts of this block, {"conv1", "bn1", ..., "downsample"}.
      x: (N, H, W, C).
      stride: the block's stride.
      train: as in `apply`.
      gather: collects a value from all threads that share the batch (see `numpy_ref.fast.threads`).

    Returns:
      (the output (N, H', W', C'), the new running statistics), and vjp: dy -> (dparams, dx). The vjp overwrites dy.
    """
    convs = convolutions(config, params["conv1"]["weight"].shape[3], stride)
    names = [(f"conv{i}", f"bn{i}", conv_stride) for i, (_, _, conv_stride) in enumerate(convs, start=1)]
    shortcut, vjp_shortcut, new_stats = x, None, {}
    if "downsample" in params:
        stats = batch_stats.get("downsample", {})
        shortcut, new_downsample, vjp_shortcut = _conv_norm_relu(
            params["downsample"], stats, "0", "1", x, stride, train=train, relu=False, gather=gather
        )
        new_stats["downsample"] = new_downsample
    branch, vjps = x, []
    for conv, norm, conv_stride in names:
        last = shortcut if conv == names[-1][0] else None
        branch, update, vjp = _conv_norm_relu(
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


def _conv_norm_relu(
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
    conv2d: Callable = layers.conv2d,
    gather: Gather = alone,
) -> tuple[Array, Tree, Vjp]:
    """relu(norm(conv(x)) + shortcut). Without params[norm] there is no normalization.

    Returns:
      y, the new running statistics {norm: ...}, and vjp: dy -> ({conv: ..., norm: ...}, dx). With a shortcut, vjp also
      returns dshortcut. The vjp overwrites dy.
    """
    kernel = params[conv]["weight"]
    y, vjp_conv = conv2d(x, kernel, params[conv].get("bias"), stride=stride, padding=len(kernel) // 2)
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


def conv2d_of_images(
    x: Array, weight: Array, bias: Array | None = None, *, stride: int, padding: int
) -> tuple[Array, Vjp]:
    """`layers.conv2d` whose vjp returns None for dx. Computing dx of the stem takes as long as a large layer."""
    y, _ = layers.conv2d(x, weight, bias, stride=stride, padding=padding)
    kh, kw, _, filters = weight.shape

    def vjp(dy: Array) -> tuple[None, Array, Array | None]:
        products = (
            patches.T @ dy[block].reshape(-1, filters) for block, patches in unfolded_blocks(x, kh, kw, stride, padding)
        )
        dweight = functools.reduce(lambda total, product: np.add(total, product, out=total), products)
        return None, dweight.reshape(weight.shape), None if bias is None else dy.reshape(-1, filters).sum(0)

    return y, vjp
