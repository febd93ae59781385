"""All that exists for XLA's CPU backend: forms of layers that are faster there, with their thresholds.

XLA:CPU is slow where other backends are not. Its convolutions and their gradients run on one core or leave the fast
library outside a range of sizes, it merges what is computed twice and keeps the result, and it fuses a chain of sums
into every later use. The gain of each form, as new over old time of a training step or of the layer
(docs/speed-notes.md has machines and sizes):

- a weight's gradient as a matrix product: training 0.77 to 0.88; by rows of the kernel and turned: 0.81 to 0.94
- XLA's own convolution up to 128 channels in inference: without it ResNet-18 takes 1.08
- max-pooling's gradient by phases of the stride: 1.6 ms of 7.3 (32 of 32x32x64)
- Winograd's form in inference, as slices: 0.98 to 1.00
- `once_known`: the temporary memory of a training step of ResNet-101 falls from 348 to 148 MB (8 of 96x96)

To leave all of it out, set `jax_resnet.cpu.ENABLED = False` before anything is traced, or call `jax.clear_caches()`
after it. Then a CPU runs what a GPU or TPU runs, and the results differ by rounding alone. (`recomputed`, which is what
remat uses everywhere, stays.)

Static shapes and types decide between forms. Where a symbolic dimension (`jax.export`) would decide, the form is the
one that needs no such decision.
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

MIN_DIRECT = 4  # pixels of height and width from which XLA's own convolution is fast: 2x2 under 3x3 is 60 times slower
MAX_DIRECT = 128  # channels up to which it is faster than unfolding: it packs the kernel in each call
MIN_CHANNELS_BY_ROW = 16  # channels from which the weight's gradient is faster row by row: 1.6 of 2.4 ms at 32
MIN_ROWS_TURNED = 512  # positions from which xᵀ·dy is faster as (dyᵀ·x)ᵀ, where dy has fewer columns than x
MIN_CHANNELS_WINOGRAD = 16  # channels from which Winograd's form is tried
# Multiplications per pair of channels from which Winograd's form pays for its transforms: 128 channels are what XLA's
# own convolution is best at.
MIN_SAVED, MIN_SAVED_128 = 1200, 12_000

# F(2x2, 3x3) of Winograd's minimal filtering (Lavin & Gray, 2016): y = Aᵀ((G g Gᵀ) ∘ (Bᵀ d B))A for tiles d of 4x4
# values that overlap by two.
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def choose(*operands: Any, cpu: Callable[..., Any], default: Callable[..., Any]) -> Any:
    """cpu(*operands) on a CPU, default(*operands) elsewhere; chosen when the program is lowered."""
    if not ENABLED:
        return default(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


def conv2d(direct: Callable[[Array, Array], Array], x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """A convolution where no gradient is asked for, in the form that is fastest by itself.

    Args:
      direct: (x, weight) -> the same by XLA's own convolution.
      x: (N, H, W, C) float.
      weight: (kh, kw, C, K), of the same type.
      stride, padding: as for `jax_resnet.layers.conv2d`.
    """
    if _winograd_pays(x, weight, stride, padding):
        return _winograd(x, weight)
    if _direct_pays(x, weight):
        return direct(x, weight)
    return unfolded(x, weight, stride=stride, padding=padding)


def unfolded(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """A convolution as one product, patches times kernel: the form for training, where the others gain nothing."""
    kh, kw, _, k = weight.shape
    patches = _unfold(x, kh, kw, stride, padding)
    y = _product(patches.reshape(-1, patches.shape[3]), weight.reshape(-1, k), 1, 0)
    return y.astype(x.dtype).reshape(*patches.shape[:3], k)


def unfolded_vjp(x: Array, weight: Array, dy: Array, *, stride: int, padding: int) -> tuple[Array, Array]:
    """The gradients of x and weight, from that of the convolution's result."""
    kh, kw, c, k = weight.shape
    if max(kh, kw) > 1:
        x = once_known(dy, x)  # or patches, copies of x, would be made in the forward pass and kept until here
    rows = dy.reshape(-1, k)
    dpatches = _product(rows, weight.reshape(-1, k), 1, 1).reshape(*dy.shape[:3], kh * kw * c)
    dx = _fold(dpatches, x, kh, kw, stride, padding)
    if c < MIN_CHANNELS_BY_ROW:
        patches = _unfold(x, kh, kw, stride, padding)
        return dx, _product_over_rows(patches, rows).astype(weight.dtype).reshape(weight.shape)
    # A row of the kernel at a time: unfolded across alone there is 1/kh of the patches, which caches may hold.
    across = _side_by_side(_pad(x, padding), 2, kw, stride)
    last = stride * (dy.shape[1] - 1)
    of_rows = [_product_over_rows(lax.slice_in_dim(across, u, u + last + 1, stride, 1), rows) for u in range(kh)]
    return dx, jnp.stack(of_rows).astype(weight.dtype).reshape(weight.shape)


def _product_over_rows(x: Array, dy: Array) -> Array:
    """xᵀ·dy, (..., C) and (rows, K) -> (C, K)."""
    x = x.reshape(-1, x.shape[-1])
    if x.shape[1] <= dy.shape[1] or not at_least(dy.shape[0], MIN_ROWS_TURNED):
        return _product(x, dy, 0, 0)
    # The library transposes its left side: the smaller one, then. Without a barrier XLA turns the product around again.
    return lax.optimization_barrier(_product(dy, x, 0, 0)).T


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """The sum of products over an axis of each of two matrices, in at least float32."""
    # To bfloat16 at once XLA:CPU multiplies in float32; the processor's own products (amx_bf16) are summed in float32.
    summed_in = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=summed_in)


def _direct_pays(x: Array, weight: Array) -> bool:
    fits = max(weight.shape[:2]) > 1 and max(weight.shape[2:]) <= MAX_DIRECT and x.dtype == jnp.float32
    return fits and all(at_least(size, MIN_DIRECT) for size in x.shape[1:3])


def once_known(late: Array, x: Array) -> Array:
    """Returns x, made to depend on `late`: XLA:CPU cannot compute anything from it before `late` is known.

    So it cannot merge a computation in the backward pass with the same one in the forward pass, and keep its result.
    `lax.optimization_barrier` is not enough, because XLA:CPU removes it before it merges. On a CPU this is x + 0, where
    the 0 is the smallest normal number if the first entry of `late` is a nan. Elsewhere it is x itself.
    """
    if below(late.size, 1):
        return x

    def on_cpu(late: Array, x: Array) -> Array:
        return x + jnp.where(jnp.isnan(late[(0,) * late.ndim]), jnp.finfo(x.dtype).tiny, 0).astype(x.dtype)

    return choose(late, x, cpu=on_cpu, default=lambda late, x: x)


def _unfold(x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """The patches that a kernel sees (im2col): (N, H, W, C) -> (N, H', W', kh·kw·C), taps row-major, channels last."""
    return _side_by_side(_side_by_side(_pad(x, padding), 2, kw, stride), 1, kh, stride)


def _fold(dpatches: Array, x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """The transpose of `_unfold`, like x: each value gets the sum of what its copies got, all of them in one pass."""

    def unfold_by_taps(x):
        return jnp.concatenate(_taps(_pad(x, padding), kh, kw, stride, *dpatches.shape[1:3]), axis=3)

    like_x = jax.ShapeDtypeStruct(x.shape, dpatches.dtype)
    return jax.linear_transpose(unfold_by_taps, like_x)(dpatches)[0].astype(x.dtype)


def _taps(x: Array, kh: int, kw: int, stride: int, out_h: int, out_w: int) -> list[Array]:
    """For each tap (u, v) of a kernel, row-major, the values it meets: kh·kw arrays (N, out_h, out_w, C)."""
    return [
        x[:, u : u + stride * (out_h - 1) + 1 : stride, v : v + stride * (out_w - 1) + 1 : stride]
        for u in range(kh)
        for v in range(kw)
    ]


def _side_by_side(x: Array, axis: int, size: int, stride: int) -> Array:
    """From every stride-th place along an axis on, `size` values, together in the last axis: C becomes size·C."""
    end = x.shape[axis] - size + 1
    stacked = jnp.stack([lax.slice_in_dim(x, u, u + end, stride, axis) for u in range(size)], axis=3)
    return stacked.reshape(*stacked.shape[:3], size * x.shape[3])


def _pad(x: Array, padding: int, value: float = 0) -> Array:
    """x with so many pixels more on each of the four sides."""
    if not padding:
        return x
    # Not by jnp.pad, which XLA fuses, with all that x is computed from, into what copies it, once for each copy.
    n, h, w, c = x.shape
    side, above = (jnp.full(shape, value, x.dtype) for shape in ((n, h, padding, c), (n, padding, w + 2 * padding, c)))
    return jnp.concatenate([above, jnp.concatenate([side, x, side], 2), above], 1)


def _winograd_pays(x: Array, weight: Array, stride: int, padding: int) -> bool:
    """Whether Winograd's form is the faster one: transforms cost time, and in half precision their sums are coarse."""
    if weight.shape[:2] != (3, 3) or (stride, padding) != (1, 1) or min(weight.shape[2:]) < MIN_CHANNELS_WINOGRAD:
        return False
    n, h, w, _ = x.shape
    enough = MIN_SAVED_128 if max(weight.shape[2:]) == 128 else MIN_SAVED
    return at_least(9 * n * h * w - 16 * n * -(-h // 2) * -(-w // 2), enough) and x.dtype.itemsize >= 4


def _winograd(x: Array, weight: Array) -> Array:
    """conv2d of 3x3 kernels, stride 1, padding 1."""
    n, h, w, c = x.shape
    k = weight.shape[3]
    kernels = (np.kron(G, G).astype(weight.dtype) @ weight.reshape(9, c * k)).reshape(16, c, k)
    tiles = _tiles(x)
    y = jnp.einsum("tpc,tck->tpk", tiles.reshape(16, -1, c), kernels).reshape(*tiles.shape[:5], k)
    for axis in range(2):  # Aᵀ y A: (2, 2, N, tiles down, tiles across, K)
        m = [lax.index_in_dim(y, i, axis, keepdims=False) for i in range(4)]
        y = jnp.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], axis)
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(n, 2 * y.shape[3], 2 * y.shape[4], k)[:, :h, :w]


def _tiles(x: Array) -> Array:
    """Bᵀ d B of each tile: (4, 4, N, tiles down, tiles across, C)."""
    x = _pad(x, 2)[:, 1:, 1:]  # one before; one behind, and one more for tiles that stick out
    for axis, size in enumerate(x.shape[1:3]):  # the fours go to the front, so the pixels' axes are 1 and then 3
        count = (size - 2) // 2
        d = [lax.slice_in_dim(x, i, i + 2 * count - 1, 2, 2 * axis + 1) for i in range(4)]
        x = jnp.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]], axis)
    return x


def max_pool_vjp(x: Array, y: Array, dy: Array, *, window: int, stride: int, padding: int) -> tuple[Array]:
    """The gradient of x, from dy, that of y = max_pool(x): a value gets those of the windows whose first maximum it is.

    Args:
      x: (N, H, W, C).
      y, dy: (N, H', W', C).
      window, stride, padding: as for `jax_resnet.layers.max_pool`.
    """
    n, _, _, c = x.shape
    padded = _pad(x, padding, -jnp.inf)
    nowhere = window * window  # the number of no tap
    first = jnp.full(y.shape, nowhere, jnp.int16 if nowhere < 2**15 else jnp.int32)
    for tap, value in reversed(list(enumerate(_taps(padded, window, window, stride, *y.shape[1:3])))):
        first = jnp.where(value == y, tap, first)
    # Row stride·q + r of the padded picture is row stride·t + r of window q - t, for each t that fits. So all values of
    # a phase (r of their rows, s of their columns) are in the same places of their windows.
    before = (window - 1) // stride  # windows that begin before a value's own and hold it
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
    """The mean and the biased variance of each column, in two passes: XLA:CPU materializes the squares either way."""
    mean = rows.mean(0)
    centred = rows - mean
    return mean, (centred * centred).mean(0)


def materialize(x: Array) -> Array:
    """x, computed once. XLA:CPU would fuse a chain of residual sums into each later use and recompute it there."""
    return choose(x, cpu=lax.optimization_barrier, default=lambda x: x)


def recomputed(run: Callable[..., Any]) -> Callable[..., Any]:
    """A block that is run again for its gradients, so that only its input is kept.

    In place of jax.checkpoint, which saves nothing on a CPU: XLA:CPU merges its second run with the first.
    """
    again = jax.custom_vjp(run)

    def forward(*inputs):
        y, _ = jax.vjp(run, *inputs)  # in the forms of training, as the second run: run(*inputs) takes other ones
        return y, inputs

    def backward(inputs, cotangents):
        dy, x = lax.optimization_barrier((cotangents[0], inputs[0]))
        return jax.vjp(run, once_known(dy, x), *inputs[1:])[1](cotangents)

    again.defvjp(forward, backward)
    return again
