"""2-D convolution in plain NumPy, as three functions with the same result.

Read `conv2d_loops` first: it is the definition. `conv2d_unfolded` computes one matrix product. `conv2d` is the function
to use: it computes this product in blocks and keeps no copy of its input.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy import ndarray as Array

Vjp = Callable[..., tuple[Any, ...]]

# A block of unfolded images should fit into a core's cache and still give the matrix product enough rows.
BLOCK_BYTES, BLOCK_ROWS = 2**20, 256


def conv2d_loops(
    x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0
) -> tuple[Array, Vjp]:
    """2-D cross-correlation by its definition, in slow loops. Arguments and results are those of `conv2d`.

    y[n, i, j, k] = bias[k] + sum over u, v, c of x[n, s·i + u - p, s·j + v - p, c] · weight[u, v, c, k], where x is 0
    outside the image. Each product x·weight in this sum adds dy·weight to dx and dy·x to dweight.
    """
    _check_conv2d(x, weight, bias, stride, padding)
    out_h, out_w = output_size(x, weight.shape, stride, padding)
    dtype = np.result_type(x, weight)

    def products() -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Yields the indices into y, x and weight of every product in the sum."""
        kh, kw, channels, filters = weight.shape
        for n, i, j, k in itertools.product(range(len(x)), range(out_h), range(out_w), range(filters)):
            for u, v in itertools.product(range(kh), range(kw)):
                row, column = stride * i + u - padding, stride * j + v - padding
                if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                    for c in range(channels):
                        yield (n, i, j, k), (n, row, column, c), (u, v, c, k)

    y = np.zeros((len(x), out_h, out_w, weight.shape[3]), dtype)
    for at_y, at_x, at_weight in products():
        y[at_y] += x[at_x] * weight[at_weight]

    def vjp(dy: Array) -> tuple[Array, Array, Array | None]:
        dx, dweight = np.zeros(x.shape, dtype), np.zeros(weight.shape, dtype)
        for at_y, at_x, at_weight in products():
            dx[at_x] += dy[at_y] * weight[at_weight]
            dweight[at_weight] += dy[at_y] * x[at_x]
        return dx, dweight, _bias_gradient(bias, dy)

    return _add_bias(y, bias), vjp


def conv2d_unfolded(
    x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0
) -> tuple[Array, Vjp]:
    """2-D cross-correlation as one matrix product (im2col). Arguments and results are those of `conv2d`.

    Each output pixel depends on one patch of x. With the patches as rows, y = patches·weight is a dense layer and has
    the gradient of a dense layer. At each pixel, dx is the sum of the gradients of all patches that contain the pixel.
    The vjp keeps the patches, which need kh·kw times the memory of x at stride 1.
    """
    _check_conv2d(x, weight, bias, stride, padding)
    kh, kw, _, filters = weight.shape
    matrix = weight.reshape(-1, filters)
    patches = unfold(x, kh, kw, stride, padding)
    y = (patches @ matrix).reshape(len(x), *output_size(x, weight.shape, stride, padding), filters)

    def vjp(dy: Array) -> tuple[Array, Array, Array | None]:
        dy_rows = dy.reshape(-1, filters)
        dx = fold(dy_rows @ matrix.T, x.shape, kh, kw, stride, padding)
        dweight = (patches.T @ dy_rows).reshape(weight.shape)
        return dx, dweight, _bias_gradient(bias, dy)

    return _add_bias(y, bias), vjp


def conv2d(
    x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0
) -> tuple[Array, Vjp]:
    """2-D cross-correlation: `conv2d_unfolded` on one block of images at a time.

    The vjp keeps only the arguments and unfolds each block again. If the patches of a block fit into the cache,
    unfolding takes about as long as reading stored patches from memory.

    Args:
      x: (N, H, W, C) float.
      weight: (kh, kw, C, K).
      bias: (K,) or None.
      stride: s, for both axes.
      padding: p, zeros added on each of the four sides.

    Returns:
      y, (N, (H + 2p - kh) // s + 1, (W + 2p - kw) // s + 1, K), and vjp: dy (y's shape) -> (dx, dweight, dbias).

    Raises:
      ValueError: if x is empty or not float, an array has a wrong rank or number of channels, the kernel is larger than
        the padded image, stride < 1 or padding < 0.
    """
    _check_conv2d(x, weight, bias, stride, padding)
    dtype = np.result_type(x, weight)
    x, weight = x.astype(dtype, copy=False), weight.astype(dtype, copy=False)
    if weight.shape[:2] == (1, 1) and padding == 0:
        y, vjp = _conv2d_1x1(x, weight, stride)
    else:
        y, vjp = _conv2d_blocks(x, weight, stride, padding)
    return _add_bias(y, bias), lambda dy: (*vjp(dy), _bias_gradient(bias, dy))


def _conv2d_1x1(x: Array, weight: Array, stride: int) -> tuple[Array, Vjp]:
    """Applies one dense layer to every pixel, without unfolding."""
    matrix = weight[0, 0]
    pixels = x[:, ::stride, ::stride]  # a view; for stride > 1 its rows would be a copy, so the vjp makes them again

    def vjp(dy: Array) -> tuple[Array, Array]:
        rows, dy_rows = pixels.reshape(-1, x.shape[3]), dy.reshape(-1, matrix.shape[1])
        dpixels = (dy_rows @ matrix.T).reshape(pixels.shape)
        dweight = (rows.T @ dy_rows).reshape(weight.shape)
        if stride == 1:
            return dpixels, dweight
        dx = np.zeros(x.shape, dpixels.dtype)
        dx[:, ::stride, ::stride] = dpixels
        return dx, dweight

    return (pixels.reshape(-1, x.shape[3]) @ matrix).reshape(*pixels.shape[:3], -1), vjp


def _conv2d_blocks(x: Array, weight: Array, stride: int, padding: int) -> tuple[Array, Vjp]:
    kh, kw, _, filters = weight.shape
    matrix = weight.reshape(-1, filters)
    out_h, out_w = output_size(x, weight.shape, stride, padding)
    y = np.empty((len(x), out_h, out_w, filters), x.dtype)
    for block, patches in unfolded_blocks(x, kh, kw, stride, padding):
        np.matmul(patches, matrix, out=y[block].reshape(-1, filters))

    def vjp(dy: Array) -> tuple[Array, Array]:
        dx, dweight = np.empty(x.shape, x.dtype), np.zeros(matrix.shape, x.dtype)
        for block, patches in unfolded_blocks(x, kh, kw, stride, padding):
            dy_rows = dy[block].reshape(-1, filters)
            dweight += patches.T @ dy_rows
            dpatches = np.matmul(dy_rows, matrix.T, out=patches)  # in the memory of the patches, which have been used
            dx[block] = fold(dpatches, x[block].shape, kh, kw, stride, padding)
        return dx, dweight.reshape(weight.shape)

    return y, vjp


def unfold(x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """Returns a kernel's patches (im2col): (N, H, W, C) -> (N·H'·W', kh·kw·C), taps row-major, channels last."""
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), axis=(1, 2))  # (N, …, …, C, kh, kw)
    return np.moveaxis(windows[:, ::stride, ::stride], 3, 5).reshape(-1, kh * kw * x.shape[3])


def fold(patches: Array, shape: tuple[int, ...], kh: int, kw: int, stride: int, padding: int) -> Array:
    """The gradient of `unfold`: returns images (N, H, W, C). Each pixel is the sum of its entries in patches."""
    n, h, w, channels = shape
    x = np.zeros((n, h + 2 * padding, w + 2 * padding, channels), patches.dtype)
    copies = patches.reshape(n, *output_size(x, (kh, kw), stride, 0), kh * kw, channels)
    for number, tap in enumerate(taps(x, kh, kw, stride)):
        tap += copies[:, :, :, number]
    return x[:, padding : padding + h, padding : padding + w]


def unfolded_blocks(x: Array, kh: int, kw: int, stride: int, padding: int) -> Iterator[tuple[slice, Array]]:
    """Yields a slice of the images and its patches as by `unfold`. The next block overwrites the patches."""
    n, h, w, channels = x.shape
    out_h, out_w = output_size(x, (kh, kw), stride, padding)
    rows = max(BLOCK_ROWS, BLOCK_BYTES // (kh * kw * channels * x.itemsize))
    images = min(n, -(-rows // (out_h * out_w)))
    padded = np.zeros((images, h + 2 * padding, w + 2 * padding, channels), x.dtype)
    patches = np.empty((images, out_h, out_w, kh, kw, channels), x.dtype)
    # A view of `padded` as patches: one step along H' or W' moves by `stride` pixels in the image.
    step_n, step_h, step_w, step_c = padded.strides
    strides = (step_n, stride * step_h, stride * step_w, step_h, step_w, step_c)
    windows = np.ndarray(patches.shape, x.dtype, padded, strides=strides)
    for start in range(0, n, images):
        count = min(images, n - start)
        block = slice(start, start + count)
        padded[:count, padding : padding + h, padding : padding + w] = x[block]
        patches[:count] = windows[:count]
        yield block, patches[:count].reshape(count * out_h * out_w, -1)


def taps(x: Array, kh: int, kw: int, stride: int) -> list[Array]:
    """For each kernel tap, row-major, returns a view (N, H', W', C) of the pixels of padded x that the tap reads."""
    out_h, out_w = output_size(x, (kh, kw), stride, 0)
    return [
        x[:, u : u + stride * (out_h - 1) + 1 : stride, v : v + stride * (out_w - 1) + 1 : stride]
        for u, v in itertools.product(range(kh), range(kw))
    ]


def output_size(x: Array, window: tuple[int, ...], stride: int, padding: int) -> tuple[int, int]:
    """Returns H' and W' for images (N, H, W, C) and a window (height, width, ...)."""
    return (x.shape[1] + 2 * padding - window[0]) // stride + 1, (x.shape[2] + 2 * padding - window[1]) // stride + 1


def _add_bias(y: Array, bias: Array | None) -> Array:
    return y if bias is None else np.add(y, bias, out=y)


def _bias_gradient(bias: Array | None, dy: Array) -> Array | None:
    return None if bias is None else dy.reshape(-1, len(bias)).sum(0)


def check_images(layer: str, x: Array) -> None:
    """Raises a ValueError with the layer's name unless x is (N, H, W, C) float with N >= 1."""
    if x.ndim != 4 or not len(x) or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{layer}: x must be (N, H, W, C) float with N >= 1, got {x.shape} {x.dtype}")


def _check_conv2d(x: Array, weight: Array, bias: Array | None, stride: int, padding: int) -> None:
    check_images("conv2d", x)
    if weight.ndim != 4 or weight.shape[2] != x.shape[3]:
        raise ValueError(
            f"conv2d: weight must be (kh, kw, C, K) and x (N, H, W, C), with the same C, "
            f"got {weight.shape} and {x.shape}"
        )
    if stride < 1 or padding < 0:
        raise ValueError(f"conv2d: stride must be >= 1 and padding >= 0, got stride {stride}, padding {padding}")
    if min(output_size(x, weight.shape, stride, padding)) < 1:
        raise ValueError(f"conv2d: a kernel {weight.shape} does not fit into x {x.shape} with padding {padding}")
    if bias is not None and bias.shape != weight.shape[3:]:
        raise ValueError(f"conv2d: bias must be ({weight.shape[3]},), got {bias.shape}")
