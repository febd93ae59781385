"""The operations after a convolution in a ResNet, computed together: BatchNorm, the residual sum and ReLU.

`batch_norm_relu` computes the same as these layers of `numpy_ref.layers`, and a test compares both:

    (y, mean, var), vjp_norm = batch_norm(x, weight, bias, running_mean, running_var, train=train)
    y, vjp_relu = relu(y + shortcut)

Each operation of these layers reads an activation from memory and writes a new one, which takes longer than the
arithmetic. `batch_norm_relu` runs several operations on one block of rows while the block is in the cache. To allocate
fewer arrays, it overwrites x in training and dy in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy import ndarray as Array

from numpy_ref.convolution import Vjp
from numpy_ref.fast.threads import Gather, alone

BLOCK_BYTES = 2**18


def batch_norm_relu(
    x: Array,
    weight: Array,
    bias: Array,
    running_mean: Array,
    running_var: Array,
    shortcut: Array | None = None,
    *,
    train: bool,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    gather: Gather = alone,
) -> tuple[tuple[Array, Array, Array], Vjp]:
    """relu(batch_norm(x) + shortcut). Training overwrites x with shifted values, and the vjp overwrites dy.

    Args:
      x: (N, H, W, C) float. The vjp reads x again, so do not use or change it after the call.
      weight, bias, running_mean, running_var, train, momentum, eps: as in `layers.batch_norm`.
      shortcut: an array with the shape of x, or None.
      relu: whether to apply ReLU.
      gather: collects a value from all threads that share a batch (see `threads`). Statistics are those of the whole
        batch; the gradients of weight and bias are sums over this thread's images.

    Returns:
      (y, new running mean, new running variance), and vjp: dy (y's shape) -> (dx, dweight, dbias, dshortcut). dshortcut
      uses the memory of dy; without a shortcut it is None, and dx uses the memory of dy.

    Raises:
      ValueError: in training with one value per channel.
    """
    x = np.ascontiguousarray(x)
    n, dtype = x.size // x.shape[-1], x.dtype
    new_mean, new_var = running_mean, running_var
    if train:
        origin = x.reshape(-1, x.shape[-1])[0].copy()
        n, mean, var = _shift_and_measure(x, origin, gather)
        new_mean = (1 - momentum) * running_mean + momentum * mean
        new_var = (1 - momentum) * running_var + momentum * (n / (n - 1)) * var
        mean = mean - origin  # the mean of x after its shift by -origin
    else:
        mean, var = running_mean.astype(dtype), running_var
    inverse_deviation = (1 / np.sqrt(var + eps)).astype(dtype)
    scale = weight * inverse_deviation
    offset = bias - mean * scale
    y = np.empty(x.shape, dtype)
    for y_block, x_block, shortcut_block, _ in _blocks(y, x, shortcut):
        np.multiply(x_block, scale, out=y_block)
        y_block += offset
        if shortcut is not None:
            y_block += shortcut_block
        if relu:
            np.clip(y_block, 0, np.inf, out=y_block)  # np.maximum(y, 0) takes more than twice as long

    def vjp(dy: Array) -> tuple[Array, Array, Array, Array | None]:
        dy = np.ascontiguousarray(dy)
        dbias, dweight = np.zeros_like(weight), np.zeros_like(weight)
        for dy_block, y_block, x_block, scratch in _blocks(dy, y, x):
            if relu:
                dy_block *= y_block > 0
            dbias += _column_sums(dy_block)
            dweight += _column_sums(np.multiply(dy_block, x_block, out=scratch))
        dweight = (dweight - mean * dbias) * inverse_deviation
        # dx of layers.batch_norm, written as scale · dy + slope · x + offset.
        all_dbias, all_dweight = (sum(of_parts) for of_parts in zip(*gather((dbias, dweight)), strict=True))
        slope = -scale * inverse_deviation * all_dweight / n
        offset = -scale * all_dbias / n - slope * mean
        dx = dy if shortcut is None else np.empty_like(dy)
        for dx_block, dy_block, x_block, scratch in _blocks(dx, dy, x):
            np.multiply(dy_block, scale, out=dx_block)
            if train:
                dx_block += np.multiply(x_block, slope, out=scratch)
                dx_block += offset
        return dx, dweight, dbias, None if shortcut is None else dy

    return (y, new_mean, new_var), vjp


def add_relu(x: Array, shortcut: Array | None = None, *, relu: bool = True) -> tuple[Array, Vjp]:
    """relu(x + shortcut) in the memory of x, for a network without BatchNorm. vjp: dy -> (dx, dshortcut).

    Arguments are those of `batch_norm_relu`. dx and dshortcut are both dy, which the vjp overwrites.
    """
    if shortcut is not None:
        x += shortcut
    y = np.maximum(x, 0, out=x) if relu else x

    def vjp(dy: Array) -> tuple[Array, Array | None]:
        if relu:
            dy *= y > 0
        return dy, None if shortcut is None else dy

    return y, vjp


def _column_sums(block: Array) -> Array:
    """block.sum(0) as a matrix product, because BLAS is twice as fast."""
    return np.ones(len(block), block.dtype) @ block


def _shift_and_measure(x: Array, origin: Array, gather: Gather) -> tuple[int, Array, Array]:
    """Subtracts origin (C,) from x in place. Returns count, mean and biased variance of the original x of all threads.

    One pass computes both moments. Subtracting a channel's first value avoids cancellation if |mean| >> deviation.
    """
    first, second = np.zeros_like(origin), np.zeros_like(origin)
    for block, scratch in _blocks(x):
        block -= origin
        first += _column_sums(block)
        second += _column_sums(np.multiply(block, block, out=scratch))
    n = x.size // x.shape[-1]
    parts = gather((n, origin + first / n, np.maximum(second - first * first / n, 0)))
    n = sum(count for count, _, _ in parts)
    if n < 2:
        raise ValueError(f"batch_norm: training needs more than one value per channel, got x {x.shape}")
    mean = sum(count * part_mean for count, part_mean, _ in parts) / n
    var = sum(squares + count * (part_mean - mean) ** 2 for count, part_mean, squares in parts) / n
    return n, mean, var


def _blocks(*arrays: Array | None) -> Iterator[tuple[Array, ...]]:
    """Yields views (pixels, C) of some pixels of each array (None for None), and scratch memory of the same shape."""
    channels = arrays[0].shape[-1]
    rows = [None if array is None else array.reshape(-1, channels) for array in arrays]
    count = max(1, BLOCK_BYTES // rows[0][0].nbytes)
    scratch = np.empty_like(rows[0][:count])
    for start in range(0, len(rows[0]), count):
        blocks = [None if array is None else array[start : start + count] for array in rows]
        yield *blocks, scratch[: len(blocks[0])]
