"""What follows a convolution in a ResNet, in one go: BatchNorm, the residual sum and ReLU.

`batch_norm_relu` computes what these layers of `numpy_ref.layers` compute; the tests hold it to them:

    (y, mean, var), vjp_norm = batch_norm(x, weight, bias, running_mean, running_var, train=train)
    y, vjp_relu = relu(y + shortcut)

Each of their lines reads an activation from memory and writes another, which takes longer than the arithmetic. Here all
steps are done to one block of rows while it is in the cache, and into memory that is there already.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy import ndarray as Array

from numpy_ref.convolution import Vjp

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
) -> tuple[tuple[Array, Array, Array], Vjp]:
    """relu(batch_norm(x) + shortcut), which takes over the memory of x, and its vjp that of dy.

    Args:
      x: (N, H, W, C) float; overwritten.
      weight, bias, running_mean, running_var, train, momentum, eps: as in `layers.batch_norm`.
      shortcut: like x, or None to add nothing.
      relu: False leaves the ReLU out.

    Returns:
      (y, new running mean, new running variance), and vjp: dy like y, overwritten -> (dx, dweight, dbias, dshortcut),
      where dshortcut, None without a shortcut, is in the memory of dy.
    """
    x = np.ascontiguousarray(x)
    n, dtype = x.size // x.shape[-1], x.dtype
    new_mean, new_var = running_mean, running_var
    if train:
        mean = _mean(x)
        var = np.zeros_like(mean)
        for block, scratch in _blocks(x):
            block -= mean
            var += _column_sums(np.multiply(block, block, out=scratch)) / n
        new_mean = (1 - momentum) * running_mean + momentum * mean
        new_var = (1 - momentum) * running_var + momentum * (n / (n - 1)) * var
    else:
        x -= running_mean.astype(dtype)
        var = running_var
    centred = x
    inverse_deviation = (1 / np.sqrt(var + eps)).astype(dtype)
    scale = weight * inverse_deviation
    y = np.empty(x.shape, dtype)
    for y_block, centred_block, shortcut_block, _ in _blocks(y, centred, shortcut):
        np.multiply(centred_block, scale, out=y_block)
        y_block += bias
        if shortcut is not None:
            y_block += shortcut_block
        if relu:
            np.maximum(y_block, 0, out=y_block)

    def vjp(dy: Array) -> tuple[Array, Array, Array, Array | None]:
        dy = np.ascontiguousarray(dy)
        dbias, dweight = np.zeros_like(weight), np.zeros_like(weight)
        for dy_block, y_block, centred_block, scratch in _blocks(dy, y, centred):
            if relu:
                dy_block *= y_block > 0
            dbias += _column_sums(dy_block)
            dweight += _column_sums(np.multiply(dy_block, centred_block, out=scratch))
        dweight *= inverse_deviation
        slope, offset = -scale * inverse_deviation * dweight / n, -scale * dbias / n
        dx = dy if shortcut is None else np.empty_like(dy)
        for dx_block, dy_block, centred_block, scratch in _blocks(dx, dy, centred):
            np.multiply(dy_block, scale, out=dx_block)
            if train:
                np.multiply(centred_block, slope, out=scratch)
                scratch += offset
                dx_block += scratch
        return dx, dweight, dbias, None if shortcut is None else dy

    return (y, new_mean, new_var), vjp


def add_relu(x: Array, shortcut: Array | None = None, *, relu: bool = True) -> tuple[Array, Vjp]:
    """relu(x + shortcut) in the memory of x, for a network without BatchNorm; vjp: dy, overwritten -> (dx, dshortcut).

    Arguments as for `batch_norm_relu`; dx and dshortcut are the same array.
    """
    if shortcut is not None:
        x += shortcut
    y = np.maximum(x, 0, out=x) if relu else x

    def vjp(dy: Array) -> tuple[Array, Array | None]:
        if relu:
            dy *= y > 0
        return dy, None if shortcut is None else dy

    return y, vjp


def _mean(x: Array) -> Array:
    """The mean of each channel, taken around one of its values: sums in float32 lose digits where it is large."""
    shift = x.reshape(-1, x.shape[-1])[0].copy()
    total = np.zeros_like(shift)
    for block, scratch in _blocks(x):
        total += _column_sums(np.subtract(block, shift, out=scratch))
    return shift + total / (x.size // x.shape[-1])


def _column_sums(block: Array) -> Array:
    """block.sum(0) as a matrix product: BLAS is twice as fast."""
    return np.ones(len(block), block.dtype) @ block


def _blocks(*arrays: Array | None) -> Iterator[tuple[Array, ...]]:
    """Some pixels at a time, (pixels, C): views of each array (None of None), and scratch memory of that shape."""
    channels = arrays[0].shape[-1]
    rows = [None if array is None else array.reshape(-1, channels) for array in arrays]
    count = max(1, BLOCK_BYTES // rows[0][0].nbytes)
    scratch = np.empty_like(rows[0][:count])
    for start in range(0, len(rows[0]), count):
        blocks = [None if array is None else array[start : start + count] for array in rows]
        yield *blocks, scratch[: len(blocks[0])]
