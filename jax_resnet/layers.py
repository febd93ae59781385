"""The layers of a ResNet as pure functions of arrays.

Images are NHWC, convolution kernels HWIO, dense kernels (in, out). The caller holds the state and calls `jax.jit`. The
mathematics is PyTorch's. Padding is explicit and symmetric. BatchNorm normalizes with the biased variance and keeps the
unbiased variance. In a max-pool window with equal maxima the first one gets the gradient. ReLU has gradient 0 at 0.

On a CPU some layers take a faster form with the same result up to rounding (`jax_resnet.cpu`). conv2d, batch_norm in
training, relu and max_pool define their gradients by `jax.custom_vjp`. For these, reverse mode works to any order, and
so does forward mode over reverse mode (Hessian-vector products, `jax.hessian`). `jax.jvp` by itself fails.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_resnet import cpu
from jax_resnet.symbolic import below

__all__ = [
    "batch_norm",
    "conv2d",
    "dense",
    "flatten",
    "global_avg_pool",
    "max_pool",
    "relu",
    "sigmoid",
    "softmax_cross_entropy",
]


def conv2d(x: Array, weight: Array, bias: Array | None = None, *, stride: int = 1, padding: int = 0) -> Array:
    """2-D cross-correlation, y[n, i, j, k] = sum_{u, v, c} x[n, s·i + u - p, s·j + v - p, c] · weight[u, v, c, k].

    Args:
      x: (N, H, W, C) float.
      weight: (kh, kw, C, K).
      bias: (K,) or None.
      stride: s, for both axes.
      padding: p, the number of zeros added on each of the four sides.

    Returns:
      y, (N, (H + 2p - kh) // s + 1, (W + 2p - kw) // s + 1, K), in the type that x and weight promote to.

    Raises:
      ValueError: an array has the wrong rank, the channels differ, stride or padding is out of range, or the kernel is
        larger than the padded image.
    """
    _check_images("conv2d", x)
    if weight.ndim != 4 or weight.shape[2] != x.shape[3]:
        raise ValueError(
            f"conv2d: weight must be (kh, kw, C, K) with C = {x.shape[3]}, the channels of x {x.shape}; "
            f"got {weight.shape}"
        )
    if stride < 1 or padding < 0:
        raise ValueError(f"conv2d: stride must be >= 1 and padding >= 0, got stride {stride}, padding {padding}")
    if any(below(size + 2 * padding, k) for size, k in zip(x.shape[1:3], weight.shape[:2], strict=True)):
        raise ValueError(
            f"conv2d: a {weight.shape[0]}x{weight.shape[1]} kernel does not fit into images of "
            f"{x.shape[1]}x{x.shape[2]} with padding {padding}"
        )
    if bias is not None and bias.shape != weight.shape[3:]:
        raise ValueError(f"conv2d: bias must be ({weight.shape[3]},), got {bias.shape}")
    dtype = jnp.result_type(x, weight)
    y = _conv2d(x.astype(dtype), weight.astype(dtype), stride, padding)
    return y if bias is None else y + bias


def _convolve(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """XLA's own convolution, which runs cuDNN on a GPU and the matrix unit on a TPU."""
    around = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, weight, (stride,) * 2, around, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d(x: Array, weight: Array, stride: int, padding: int) -> Array:
    direct = functools.partial(_convolve, stride=stride, padding=padding)
    on_cpu = functools.partial(cpu.conv2d, direct, stride=stride, padding=padding)
    return cpu.choose(x, weight, cpu=on_cpu, default=direct)


def _conv2d_fwd(x: Array, weight: Array, stride: int, padding: int) -> tuple[Array, tuple[Array, Array]]:
    on_cpu, default = (functools.partial(form, stride=stride, padding=padding) for form in (cpu.unfolded, _convolve))
    return cpu.choose(x, weight, cpu=on_cpu, default=default), (x, weight)


def _conv2d_bwd(stride: int, padding: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    def default(x: Array, weight: Array, dy: Array) -> tuple[Array, Array]:
        return jax.vjp(functools.partial(_convolve, stride=stride, padding=padding), x, weight)[1](dy)

    on_cpu = functools.partial(cpu.unfolded_vjp, stride=stride, padding=padding)
    return cpu.choose(*residuals, dy, cpu=on_cpu, default=default)


_conv2d.defvjp(_conv2d_fwd, _conv2d_bwd)


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
) -> tuple[Array, Array, Array]:
    """Batch normalization over all axes but the last (Ioffe & Szegedy 2015), as PyTorch computes it.

    In training y = (x - mean) / sqrt(var + eps) · weight + bias with the batch's mean and biased variance. The running
    statistics move by `momentum` towards the batch's mean and its unbiased variance (n / (n - 1) times the biased one).
    No gradient flows from the new running statistics into x. In evaluation the running statistics normalize x.

    Args:
      x: (..., C) float.
      weight, bias: (C,), gamma and beta.
      running_mean, running_var: (C,), at least float32.
      train: whether to normalize with the batch's statistics and update the running ones.
      momentum: the weight of the batch's statistics in the new running statistics.
      eps: added to the variance.

    Returns:
      y like x, the new running mean and the new running variance, each (C,). Statistics are computed in at least
      float32.

    Raises:
      ValueError: a vector does not fit the channels, or x has one value per channel in training.
    """
    for name, value in dict(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var).items():
        if value.shape != x.shape[-1:]:
            raise ValueError(f"batch_norm: {name} must be ({x.shape[-1]},) for x {x.shape}, got {value.shape}")
    if not train:
        scale = weight * lax.rsqrt(running_var + eps)
        return ((x - running_mean) * scale + bias).astype(x.dtype), running_mean, running_var
    n = x.size // x.shape[-1]
    if below(n, 2):
        raise ValueError(f"batch_norm: training needs more than one value per channel, got x {x.shape}")
    y, mean, var = _normalize(x, weight, bias, eps)
    mean, var = lax.stop_gradient((mean, var))
    new_mean = (1 - momentum) * running_mean + momentum * mean
    new_var = (1 - momentum) * running_var + momentum * (n / (n - 1)) * var
    return y, new_mean.astype(running_mean.dtype), new_var.astype(running_var.dtype)


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    return _normalize_fwd(x, weight, bias, eps)[0]


def _normalize_fwd(
    x: Array, weight: Array, bias: Array, eps: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array, Array, Array]]:
    rows = _at_least_float32(x.reshape(-1, x.shape[-1]))
    mean, var = cpu.choose(rows, cpu=cpu.moments, default=_moments)
    inverse_deviation = lax.rsqrt(var + eps)
    y = (rows - mean) * (weight * inverse_deviation) + bias
    return (y.astype(x.dtype).reshape(x.shape), mean, var), (x, weight, mean, inverse_deviation)


def _moments(rows: Array) -> tuple[Array, Array]:
    """The mean and the biased variance of each column."""
    # Subtracting one value of the channel avoids cancellation in the variance where |mean| >> deviation.
    shift = rows[0]
    shifted = rows - shift
    mean_shifted = shifted.mean(0)
    var = jnp.maximum((shifted * shifted).mean(0) - mean_shifted * mean_shifted, 0)
    return shift + mean_shifted, var


def _normalize_bwd(
    eps: float, residuals: tuple[Array, Array, Array, Array], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """dx = weight / deviation · (dy - mean(dy) - x̂ · mean(dy · x̂)), with x̂ the normalized x.

    The formula differentiates through the batch's mean and variance. Cotangents of the returned mean and variance are
    ignored, because `batch_norm` stops their gradients.
    """
    x, weight, mean, inverse_deviation = residuals
    # Without this, XLA:CPU would keep both x and x - mean in memory from the forward pass on.
    x = cpu.once_known(cotangents[0], x)
    rows = _at_least_float32(x.reshape(-1, x.shape[-1]))
    dy = _at_least_float32(cotangents[0].reshape(rows.shape))
    centred = rows - mean
    dbias = dy.sum(0)
    dweight = (dy * centred).sum(0) * inverse_deviation
    n = rows.shape[0]
    dx = (weight * inverse_deviation) * (dy - dbias / n - centred * (inverse_deviation * dweight / n))
    return dx.astype(x.dtype).reshape(x.shape), dweight.astype(weight.dtype), dbias.astype(weight.dtype)


_normalize.defvjp(_normalize_fwd, _normalize_bwd)


@jax.custom_vjp
def relu(x: Array) -> Array:
    """max(x, 0) for any shape, with gradient 0 at 0."""
    return _positive_part(x)


def _positive_part(x: Array) -> Array:
    return jnp.where(x < 0, 0, x)  # jnp.maximum loses a nan in some of XLA's fusions on a CPU


def _relu_fwd(x: Array) -> tuple[Array, Array]:
    y = _positive_part(x)
    return y, y  # the next layer keeps y anyway, whereas x or a mask would be one more array


def _relu_bwd(y: Array, dy: Array) -> tuple[Array]:
    return (jnp.where(y > 0, dy, 0),)


relu.defvjp(_relu_fwd, _relu_bwd)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) for any shape, without overflow."""
    return jax.nn.sigmoid(x)


def max_pool(x: Array, *, window: int = 3, stride: int = 2, padding: int = 1) -> Array:
    """The largest value in each window. The padding is -inf; among equal maxima the first one gets the gradient.

    Args:
      x: (N, H, W, C) float.
      window, stride, padding: for both axes; padding at most window // 2.

    Returns:
      y, (N, (H + 2·padding - window) // stride + 1, (W + 2·padding - window) // stride + 1, C).

    Raises:
      ValueError: x is not (N, H, W, C) float, padding exceeds half the window, stride is less than 1, or a window does
        not fit into the padded image.
    """
    _check_images("max_pool", x)
    if not 0 <= padding <= window // 2 or stride < 1:
        raise ValueError(
            f"max_pool: padding must be between 0 and window // 2 and stride >= 1, "
            f"got window {window}, stride {stride}, padding {padding}"
        )
    if any(below(size + 2 * padding, window) for size in x.shape[1:3]):
        raise ValueError(f"max_pool: a window of {window} does not fit into images of {x.shape[1]}x{x.shape[2]}")
    return _max_pool(x, window, stride, padding)


def _largest(x: Array, window: int, stride: int, padding: int) -> Array:
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), sides)


_max_pool = jax.custom_vjp(_largest, nondiff_argnums=(1, 2, 3))


def _max_pool_fwd(x: Array, window: int, stride: int, padding: int) -> tuple[Array, tuple[Array, Array]]:
    y = _largest(x, window, stride, padding)
    return y, (x, y)


def _max_pool_bwd(window: int, stride: int, padding: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array]:
    def default(x: Array, y: Array, dy: Array) -> tuple[Array]:
        return jax.vjp(lambda x: _largest(x, window, stride, padding), x)[1](dy)

    on_cpu = functools.partial(cpu.max_pool_vjp, window=window, stride=stride, padding=padding)
    return cpu.choose(*residuals, dy, cpu=on_cpu, default=default)


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def global_avg_pool(x: Array) -> Array:
    """The mean over height and width, (N, H, W, C) -> (N, C), computed in at least float32."""
    _check_images("global_avg_pool", x)
    return _at_least_float32(x).mean((1, 2)).astype(x.dtype)


def flatten(x: Array) -> Array:
    """Reshapes (N, ...) to (N, product of the other sizes), row-major: images in the order height, width, channel."""
    return x.reshape(x.shape[0], -1)


def dense(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Affine map y = x·W + b: x (N, C), weight (C, K), bias (K,) or None -> (N, K).

    Raises:
      ValueError: the shapes do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"dense: x must be (N, C) and weight (C, K), got {x.shape} and {weight.shape}")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"dense: bias must be ({weight.shape[1]},), got {bias.shape}")
    y = x @ weight
    return y if bias is None else y + bias


def softmax_cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[label] per example, in at least float32, stable for any finite logits.

    Args:
      logits: (N, K) float.
      labels: (N,) integers from 0 to K - 1. The range is not checked; values outside give meaningless losses.

    Returns:
      losses, (N,). The caller takes the mean.

    Raises:
      ValueError: the shapes do not fit, or labels are not integers.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"softmax_cross_entropy: logits must be (N, K) and labels (N,), got {logits.shape} and {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"softmax_cross_entropy: labels must be integer class numbers, got {labels.dtype}")
    log_probabilities = jax.nn.log_softmax(_at_least_float32(logits))
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]


def _check_images(layer: str, x: Array) -> None:
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{layer}: x must be (N, H, W, C) float, got {x.shape} {x.dtype}")
