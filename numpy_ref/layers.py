"""The layers of a ResNet in plain NumPy, each with its gradient right below it.

Every function in this module returns (outputs, vjp). `vjp` (vector-Jacobian product) is the backward pass. Its argument
is the gradient of a scalar with respect to the output. It always returns a tuple: the gradients with respect to the
array arguments, in order. The gradient of an absent bias is None; labels and running statistics have no entry.
Functions do not change their arguments, and a vjp can be called more than once. Images are NHWC, convolution kernels
HWIO, dense kernels (in, out). Arrays are float32 or float64.

Three functions compute the same convolution. Read `conv2d_loops` first: it is the definition. `conv2d_unfolded`
computes one matrix product. `conv2d` is the function to use: it computes this product in blocks.

>>> import numpy as np
>>> y, vjp = dense(np.ones((2, 3)), np.full((3, 1), 0.5))
>>> dx, dweight, dbias = vjp(np.ones((2, 1)))
>>> y.tolist(), dx[0].tolist(), dweight.T.tolist(), dbias
([[1.5], [1.5]], [0.5, 0.5, 0.5], [[2.0, 2.0, 2.0]], None)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import ndarray as Array

from numpy_ref.convolution import Vjp, check_images, conv2d, conv2d_loops, conv2d_unfolded, output_size, taps

__all__ = [
    "batch_norm",
    "conv2d",
    "conv2d_loops",
    "conv2d_unfolded",
    "dense",
    "flatten",
    "global_avg_pool",
    "max_pool",
    "relu",
    "sequential",
    "sigmoid",
    "softmax_cross_entropy",
]


def batch_norm(
    x: Array,
    weight: Array,
    bias: Array,
    running_mean: Array,
    running_var: Array,
    *,
    train: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[tuple[Array, Array, Array], Vjp]:
    """Batch normalization over all axes but the last (Ioffe & Szegedy 2015), as PyTorch computes it.

    y = (x - mean) / sqrt(var + eps) · weight + bias. Training normalizes with the batch's mean and biased variance,
    evaluation with the running mean and variance. Training moves the running statistics by the share `momentum` towards
    the batch's mean and unbiased variance (the biased variance times n / (n - 1)).

    Args:
      x: (..., C) float.
      weight, bias: (C,), gamma and beta.
      running_mean, running_var: (C,).
      train: whether to normalize with the batch's statistics and update the running statistics.
      momentum: the weight of the batch's statistics in the new running statistics.
      eps: added to the variance.

    Returns:
      (y, new running mean, new running variance), and vjp: dy (y's shape) -> (dx, dweight, dbias).

    Raises:
      ValueError: if a vector is not (C,), or in training with one value per channel.
    """
    _check_batch_norm(x, weight, bias, running_mean, running_var, train)
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    new_mean, new_var = running_mean, running_var
    if train:
        # NumPy adds rows one by one. In float32 this loses digits if |mean| >> deviation.
        mean = rows.mean(0, dtype=np.float64).astype(x.dtype)
        centred = rows - mean
        var = (centred * centred).mean(0)
        new_mean = (1 - momentum) * running_mean + momentum * mean
        new_var = (1 - momentum) * running_var + momentum * (n / (n - 1)) * var
    else:
        centred, var = rows - running_mean, running_var
    inverse_deviation = 1 / np.sqrt(var + eps)
    y = centred * (weight * inverse_deviation) + bias

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        dy = dy.reshape(rows.shape)
        dbias = dy.sum(0)
        dweight = (dy * centred).sum(0) * inverse_deviation
        kept = dy
        if train:
            # BatchNorm undoes any shift or scaling of the batch, so dy loses its components along these directions.
            kept = dy - dbias / n - centred * (inverse_deviation * dweight / n)
        dx = kept * (weight * inverse_deviation)
        return dx.reshape(x.shape), dweight, dbias

    return (y.reshape(x.shape), new_mean, new_var), vjp


def relu(x: Array) -> tuple[Array, Vjp]:
    """max(x, 0) for any shape, with gradient 0 at 0. vjp: dy -> (dx,)."""
    y = np.maximum(x, 0)
    return y, lambda dy: (np.where(y > 0, dy, 0),)


def sigmoid(x: Array) -> tuple[Array, Vjp]:
    """1 / (1 + exp(-x)) for any shape, without overflow. vjp: dy -> (dx,)."""
    decay = np.exp(-np.abs(x))
    y = np.where(x >= 0, 1, decay) / (1 + decay)
    return y, lambda dy: (dy * decay / (1 + decay) ** 2,)


def max_pool(x: Array, *, window: int = 3, stride: int = 2, padding: int = 1) -> tuple[Array, Vjp]:
    """The largest value in each window. The padding is -inf; in a tie, the first position gets the gradient.

    Args:
      x: (N, H, W, C) float.
      window, stride, padding: for both axes; padding is at most window // 2.

    Returns:
      y, (N, (H + 2·padding - window) // stride + 1, the same for W, C), and vjp: dy (y's shape) -> (dx,).

    Raises:
      ValueError: if x has a wrong rank or type or is empty, an option is out of range, or the window does not fit.
    """
    _check_max_pool(x, window, stride, padding)
    n, h, w, channels = x.shape
    padded = np.full((n, h + 2 * padding, w + 2 * padding, channels), -np.inf, x.dtype)
    inside = (slice(None), slice(padding, padding + h), slice(padding, padding + w))
    padded[inside] = x
    first, *others = taps(padded, window, window, stride)
    y = first.copy()
    for tap in others:
        np.maximum(y, tap, out=y)

    def vjp(dy: Array) -> tuple[Array]:
        dx = np.zeros(padded.shape, y.dtype)
        waiting = np.ones(y.shape, bool)  # True until a tap equals the maximum
        for tap, dtap in zip(taps(padded, window, window, stride), taps(dx, window, window, stride), strict=True):
            takes = waiting & (tap == y)
            dtap += dy * takes
            waiting &= ~takes
        return (dx[inside],)

    return y, vjp


def global_avg_pool(x: Array) -> tuple[Array, Vjp]:
    """The mean over height and width, (N, H, W, C) -> (N, C). vjp: dy (N, C) -> (dx,)."""
    check_images("global_avg_pool", x)
    _, h, w, _ = x.shape

    def vjp(dy: Array) -> tuple[Array]:
        return (np.broadcast_to(dy[:, None, None, :] / (h * w), x.shape).copy(),)

    return x.mean((1, 2)), vjp


def flatten(x: Array) -> tuple[Array, Vjp]:
    """(N, ...) -> (N, product of the rest), for images in the order height, width, channel. vjp: dy -> (dx,)."""
    return x.reshape(len(x), -1), lambda dy: (dy.reshape(x.shape),)


def dense(x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, Vjp]:
    """Affine map, y = x·W + b.

    Args:
      x: (N, C) float.
      weight: (C, K).
      bias: (K,) or None.

    Returns:
      y, (N, K), and vjp: dy (N, K) -> (dx, dweight, dbias).

    Raises:
      ValueError: if the shapes do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"dense: x must be (N, C) and weight (C, K), got {x.shape} and {weight.shape}")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"dense: bias must be ({weight.shape[1]},), got {bias.shape}")
    y = x @ weight if bias is None else x @ weight + bias

    def vjp(dy: Array) -> tuple[Array, Array, Array | None]:
        return dy @ weight.T, x.T @ dy, None if bias is None else dy.sum(0)

    return y, vjp


def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Vjp]:
    """-log softmax(logits)[label] of each example, stable for any finite logits.

    Args:
      logits: (N, K) float.
      labels: (N,) integer class numbers from 0 to K - 1.

    Returns:
      losses, (N,), and vjp: dlosses (N,) -> (dlogits,). The caller takes the mean of the losses.

    Raises:
      ValueError: if the shapes do not fit or a label is not a class number.
    """
    _check_labels(logits, labels)
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    examples = np.arange(len(labels))

    def vjp(dlosses: Array) -> tuple[Array]:
        """d loss / d logits is softmax(logits) minus the one-hot label."""
        dlogits = np.exp(log_probabilities)
        dlogits[examples, labels] -= 1
        return (dlogits * dlosses[:, None],)

    return -log_probabilities[examples, labels], vjp


def sequential(x: Array, *steps: tuple[Any, ...]) -> tuple[Array, Vjp]:
    """Runs layers one after the other. The vjp applies the chain rule.

    Args:
      x: the input of the first layer.
      steps: one (layer, *arrays) per layer, where layer is a function (x, *arrays) -> (output, vjp). Bind settings such
        as the stride with functools.partial. Layers with several outputs, such as batch_norm, do not work.

    Returns:
      the last output, and vjp: dy (the output's shape) -> (dx, *gradients). Each entry of gradients is the tuple of the
      gradients of one layer's arrays.

    >>> y, vjp = sequential(np.ones((1, 2)), (dense, np.ones((2, 3))), (relu,))
    >>> dx, (dweight,), () = vjp(np.ones((1, 3)))
    >>> y.tolist(), dx.tolist()
    ([[2.0, 2.0, 2.0]], [[3.0, 3.0]])
    """
    vjps = []
    for layer, *arrays in steps:
        x, vjp = layer(x, *arrays)
        vjps.append((vjp, len(arrays)))

    def vjp_all(dy: Array) -> tuple[Any, ...]:
        gradients = []
        for vjp, count in reversed(vjps):
            dy, *of_arrays = vjp(dy)
            gradients.append(tuple(of_arrays[:count]))
        return dy, *reversed(gradients)

    return x, vjp_all


def _check_batch_norm(
    x: Array, weight: Array, bias: Array, running_mean: Array, running_var: Array, train: bool
) -> None:
    for name, value in dict(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var).items():
        if value.shape != x.shape[-1:]:
            raise ValueError(f"batch_norm: {name} must be ({x.shape[-1]},) for x {x.shape}, got {value.shape}")
    if train and x.size < 2 * x.shape[-1]:
        raise ValueError(f"batch_norm: training needs more than one value per channel, got x {x.shape}")


def _check_max_pool(x: Array, window: int, stride: int, padding: int) -> None:
    check_images("max_pool", x)
    if window < 1 or not 0 <= padding <= window // 2 or stride < 1:
        raise ValueError(
            f"max_pool: window and stride must be >= 1 and padding between 0 and window // 2, "
            f"got window {window}, stride {stride}, padding {padding}"
        )
    if min(output_size(x, (window, window), stride, padding)) < 1:
        raise ValueError(f"max_pool: a window of {window} does not fit into x {x.shape} with padding {padding}")


def _check_labels(logits: Array, labels: Array) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"softmax_cross_entropy: logits must be (N, K) and labels (N,) integers, "
            f"got {logits.shape} and {labels.shape} {labels.dtype}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        raise ValueError(
            f"softmax_cross_entropy: labels must be between 0 and {logits.shape[1] - 1}, "
            f"got {labels.min()} to {labels.max()}"
        )
