"""Forms of layers that are faster on XLA's CPU backend, and the sizes from which each form is used.

XLA:CPU is slow where other backends are not. Outside a range of sizes, its convolutions and their gradients run on one
core or without its fast library. XLA:CPU merges equal computations and keeps their result in memory. It also fuses a
chain of sums into every later use. The forms below gave the following (docs/speed-notes.md names machines and sizes).
Ratios are new over old time:

- the weight's gradient as a matrix product: 0.77 to 0.88 of a training step
- unfolded patches for every convolution, with the weight's gradient by rows of the kernel: 0.81 to 0.94 of a step
- XLA's own convolution up to 128 channels in inference: 0.93 for ResNet-18
- max-pooling's gradient by phases of the stride: 0.22 of the layer, from 7.3 to 1.6 ms (32 images of 32x32x64)
- Winograd's form in inference with tiles as slices: 0.98 to 1.00
- `once_known`: the temporary memory of a training step of ResNet-101 falls from 348 to 148 MB (8 images of 96x96)

To turn these forms off, set `jax_resnet.cpu.ENABLED = False` before anything is traced, or call `jax.clear_caches()`
afterwards. A CPU then runs the code for GPUs and TPUs, and the results differ by rounding alone. `recomputed` stays on,
because remat uses it on every backend.

Static shapes and types choose the form. Where the choice would depend on a symbolic dimension (`jax.export`), the code
takes the form that works for every size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_resnet.symbolic import at_least, below

__all__ = [
    "ENABLED",
    "choose",
    "conv2d",
    "materialize",
    "max_pool_vjp",
    "moments",
    "once_known",
    "recomputed",
    "unfolded",
    "unfolded_vjp",
]

ENABLED = True

_MIN_DIRECT = 4  # XLA's own convolution needs this height and width: 3x3 kernels on 2x2 images are 60 times slower
_MAX_DIRECT = 128  # with more channels unfolding is faster: XLA's convolution packs the kernel in each call
_MIN_CHANNELS_BY_ROW = 16  # from this many on, the weight's gradient is faster row by row: 1.6 ms, not 2.4, at 32
_MIN_ROWS_TURNED = 512  # from this many rows on, xᵀ·dy is faster as (dyᵀ·x)ᵀ if dy has fewer columns than x
_MIN_CHANNELS_WINOGRAD = 16  # Winograd's form needs at least this many channels
# Winograd's form pays for its transforms if it saves this many multiplications per pair of channels. The second number
# is for 128 channels, where XLA's own convolution is fastest.
_MIN_SAVED, _MIN_SAVED_128 = 1200, 12_000

# Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray, 2016): y = Aᵀ((G g Gᵀ) ∘ (Bᵀ d B))A for tiles d of 4x4 values
# that overlap by two.
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def choose(*operands: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """Returns cpu(*operands) on a CPU and default(*operands) elsewhere. JAX chooses when it lowers the program."""
    if not ENABLED:
        return default(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


def conv2d(direct: Callable[[Array, Array], Array], x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """Convolves without gradients, in the form that is fastest for these sizes.

    Args:
      direct: (x, weight) -> y, XLA's own convolution.
      x: (N, H, W, C) float.
      weight: (kh, kw, C, K), in the type of x.
      stride, padding: as for `jax_resnet.layers.conv2d`.
    """
    if _winograd_pays(x, weight, stride, padding):
        return _winograd(x, weight)
    if _direct_pays(x, weight):
        return direct(x, weight)
    return unfolded(x, weight, stride=stride, padding=padding)


def unfolded(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """Convolves by one matrix product, patches times kernel. Training uses this form; the others gain nothing there."""
    kh, kw, _, k = weight.shape
    patches = _unfold(x, kh, kw, stride, padding)
    y = _product(patches.reshape(-1, patches.shape[3]), weight.reshape(-1, k), 1, 0)
    return y.astype(x.dtype).reshape(*patches.shape[:3], k)


def unfolded_vjp(x: Array, weight: Array, dy: Array, *, stride: int, padding: int) -> tuple[Array, Array]:
    """Computes dx and dweight of a convolution from dy."""
    kh, kw, c, k = weight.shape
    if max(kh, kw) > 1:
        x = once_known(dy, x)  # otherwise XLA makes the patches in the forward pass and keeps them until here
    rows = dy.reshape(-1, k)
    dpatches = _product(rows, weight.reshape(-1, k), 1, 1).reshape(*dy.shape[:3], kh * kw * c)
    dx = _fold(dpatches, x, kh, kw, stride, padding)
    if c < _MIN_CHANNELS_BY_ROW:
        patches = _unfold(x, kh, kw, stride, padding)
        return dx, _product_over_rows(patches, rows).astype(weight.dtype).reshape(weight.shape)
    # One row of the kernel at a time: unfolding along the width alone makes 1/kh of the patches, which may fit a cache.
    across = _side_by_side(_pad(x, padding), 2, kw, stride)
    last = stride * (dy.shape[1] - 1)
    of_rows = [_product_over_rows(lax.slice_in_dim(across, u, u + last + 1, stride, 1), rows) for u in range(kh)]
    return dx, jnp.stack(of_rows).astype(weight.dtype).reshape(weight.shape)


def _product_over_rows(x: Array, dy: Array) -> Array:
    """Returns xᵀ·dy, (C, K), for x (..., C) and dy (rows, K)."""
    x = x.reshape(-1, x.shape[-1])
    if x.shape[1] <= dy.shape[1] or not at_least(dy.shape[0], _MIN_ROWS_TURNED):
        return _product(x, dy, 0, 0)
    # The library transposes the left operand, so the smaller one goes there. The barrier keeps XLA from swapping them.
    return lax.optimization_barrier(_product(dy, x, 0, 0)).T


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """The sum of products over one axis of each matrix, in at least float32."""
    # For a bfloat16 result XLA:CPU converts the operands to float32 first. With a float32 result the processor
    # multiplies bfloat16 itself (amx_bf16).
    summed_in = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=summed_in)


def _direct_pays(x: Array, weight: Array) -> bool:
    fits = max(weight.shape[:2]) > 1 and max(weight.shape[2:]) <= _MAX_DIRECT and x.dtype == jnp.float32
    return fits and all(at_least(size, _MIN_DIRECT) for size in x.shape[1:3])


def once_known(late: Array, x: Array) -> Array:
    """Returns x, made to depend on `late`: XLA:CPU can use the result only after it has computed `late`.

    XLA:CPU then cannot merge a computation of the backward pass with an equal one of the forward pass, whose result it
    would keep. `lax.optimization_barrier` is not enough: XLA:CPU removes barriers before it merges. On a CPU the result
    is x + 0, or x + the smallest normal number if the first entry of `late` is nan. On other backends it is x.
    """
    if below(late.size, 1):
        return x

    def on_cpu(late: Array, x: Array) -> Array:
        return x + jnp.where(jnp.isnan(late[(0,) * late.ndim]), jnp.finfo(x.dtype).tiny, 0).astype(x.dtype)

    return choose(late, x, cpu=on_cpu, default=lambda late, x: x)


def _unfold(x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """Unfolds into patches (im2col): (N, H, W, C) -> (N, H', W', kh·kw·C), in the order of the kernel's rows."""
    return _side_by_side(_side_by_side(_pad(x, padding), 2, kw, stride), 1, kh, stride)


def _fold(dpatches: Array, x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """The transpose of `_unfold`: for each value of x, returns the sum of the gradients of its copies, in one pass."""

    def unfold_by_taps(x):
        return jnp.concatenate(_taps(_pad(x, padding), kh, kw, stride, *dpatches.shape[1:3]), axis=3)

    like_x = jax.ShapeDtypeStruct(x.shape, dpatches.dtype)
    return jax.linear_transpose(unfold_by_taps, like_x)(dpatches)[0].astype(x.dtype)


def _taps(x: Array, kh: int, kw: int, stride: int, out_h: int, out_w: int) -> list[Array]:
    """For each tap, a position (u, v) in the kernel, the inputs it multiplies: kh·kw arrays (N, out_h, out_w, C)."""
    return [
        x[:, u : u + stride * (out_h - 1) + 1 : stride, v : v + stride * (out_w - 1) + 1 : stride]
        for u in range(kh)
        for v in range(kw)
    ]


def _side_by_side(x: Array, axis: int, size: int, stride: int) -> Array:
    """Windows of `size` values along an axis, one every `stride` values, joined in the last axis: C becomes size·C."""
    end = x.shape[axis] - size + 1
    stacked = jnp.stack([lax.slice_in_dim(x, u, u + end, stride, axis) for u in range(size)], axis=3)
    return stacked.reshape(*stacked.shape[:3], size * x.shape[3])


def _pad(x: Array, padding: int, value: float = 0) -> Array:
    """Adds `padding` pixels of a value on each of the four sides."""
    if not padding:
        return x
    # XLA would fuse jnp.pad, and the computation of x with it, into each operation that copies the padded image.
    n, h, w, c = x.shape
    side, above = (jnp.full(shape, value, x.dtype) for shape in ((n, h, padding, c), (n, padding, w + 2 * padding, c)))
    return jnp.concatenate([above, jnp.concatenate([side, x, side], 2), above], 1)


def _winograd_pays(x: Array, weight: Array, stride: int, padding: int) -> bool:
    """Whether to use Winograd's form: its transforms cost time, and in half precision their sums are inaccurate."""
    if weight.shape[:2] != (3, 3) or (stride, padding) != (1, 1) or min(weight.shape[2:]) < _MIN_CHANNELS_WINOGRAD:
        return False
    n, h, w, _ = x.shape
    enough = _MIN_SAVED_128 if max(weight.shape[2:]) == 128 else _MIN_SAVED
    return at_least(9 * n * h * w - 16 * n * -(-h // 2) * -(-w // 2), enough) and x.dtype.itemsize >= 4


def _winograd(x: Array, weight: Array) -> Array:
    """Convolves with 3x3 kernels, stride 1 and padding 1."""
    n, h, w, c = x.shape
    k = weight.shape[3]
    kernels = (np.kron(_G, _G).astype(weight.dtype) @ weight.reshape(9, c * k)).reshape(16, c, k)
    tiles = _tiles(x)
    y = jnp.einsum("tpc,tck->tpk", tiles.reshape(16, -1, c), kernels).reshape(*tiles.shape[:5], k)
    for axis in range(2):  # Aᵀ y A: (2, 2, N, rows of tiles, columns of tiles, K)
        m = [lax.index_in_dim(y, i, axis, keepdims=False) for i in range(4)]
        y = jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], axis)
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(n, 2 * y.shape[3], 2 * y.shape[4], k)[:, :h, :w]


def _tiles(x: Array) -> Array:
    """Computes Bᵀ d B of each tile d: (4, 4, N, rows of tiles, columns of tiles, C)."""
    x = _pad(x, 2)[:, 1:, 1:]  # one pixel before the image and two after: odd sizes need the second
    for axis, size in enumerate(x.shape[1:3]):  # each new axis of 4 goes to the front: height is axis 1, width axis 3
        count = (size - 2) // 2
        d = [lax.slice_in_dim(x, i, i + 2 * count - 1, 2, 2 * axis + 1) for i in range(4)]
        x = jnp.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]], axis)
    return x


def max_pool_vjp(x: Array, y: Array, dy: Array, *, window: int, stride: int, padding: int) -> tuple[Array]:
    """Computes dx of y = max_pool(x): each value of x sums the dy of the windows in which it is the first maximum.

    Args:
      x: (N, H, W, C).
      y, dy: (N, H', W', C).
      window, stride, padding: as for `jax_resnet.layers.max_pool`.
    """
    n, _, _, c = x.shape
    padded = _pad(x, padding, -jnp.inf)
    nowhere = window * window  # taps are numbered from 0, so no tap has this number
    first = jnp.full(y.shape, nowhere, jnp.int16 if nowhere < 2**15 else jnp.int32)
    for tap, value in reversed(list(enumerate(_taps(padded, window, window, stride, *y.shape[1:3])))):
        first = jnp.where(value == y, tap, first)
    # Row stride·q + r of the padded image is row stride·t + r of window q - t, for each t that fits. So all values with
    # the same phase (r, s) of row and column have the same positions in their windows.
    before = (window - 1) // stride  # the largest such t
    rows, columns = (-(-size // stride) for size in padded.shape[1:3])
    around = (
        (0, 0),
        *((before, max(0, size - o)) for size, o in zip((rows, columns), y.shape[1:3], strict=True)),
        (0, 0),
    )
    first, dy = lax.optimization_barrier((jnp.pad(first, around, constant_values=nowhere), jnp.pad(dy, around)))

    def phase(r: int, s: int) -> Array:
        total = jnp.zeros((n, rows, columns, c), dy.dtype)
        for u in range(r, window, stride):
            for v in range(s, window, stride):
                down, across = before - u // stride, before - v // stride
                here = (slice(None), slice(down, down + rows), slice(across, across + columns))
                total += jnp.where(first[here] == window * u + v, dy[here], 0)
        return total

    phases = [jnp.stack([phase(r, s) for s in range(stride)], axis=3) for r in range(stride)]
    dx = jnp.stack(phases, axis=2).reshape(n, stride * rows, stride * columns, c)
    return (dx[:, padding : padding + x.shape[1], padding : padding + x.shape[2]],)


def moments(rows: Array) -> tuple[Array, Array]:
    """The mean and biased variance of each column, in two passes: one pass would also materialize the squares."""
    mean = rows.mean(0)
    centred = rows - mean
    return mean, (centred * centred).mean(0)


def materialize(x: Array) -> Array:
    """Returns x, computed once. Otherwise XLA:CPU fuses a chain of residual sums into each use and recomputes it."""
    return choose(x, cpu=lax.optimization_barrier, default=lambda x: x)


def recomputed(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a block so that the backward pass runs it again, and only the block's inputs are kept.

    jax.checkpoint would save no memory on a CPU, because XLA:CPU merges the second run with the first.
    """
    again = jax.custom_vjp(run)

    def forward(*inputs):
        y, _ = jax.vjp(run, *inputs)  # uses the forms for training, as the second run does; run(*inputs) uses others
        return y, inputs

    def backward(inputs, cotangents):
        dy, x = lax.optimization_barrier((cotangents[0], inputs[0]))
        return jax.vjp(run, once_known(dy, x), *inputs[1:])[1](cotangents)

    again.defvjp(forward, backward)
    return again
