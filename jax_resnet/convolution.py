"""Convolutions of images (N, H, W, C) with kernels (kh, kw, C, K) on a CPU, in the forms that are fastest there.

`direct` is XLA's own convolution. XLA:CPU gives it to the library that multiplies its matrices where types and sizes
suit that, and is many times slower elsewhere. A product of unfolded patches (im2col) is fast everywhere, and in
training, with its gradients, as fast as any. Where no gradient is asked for, Winograd's form of 3x3 kernels needs 4/9
of the multiplications. `jax_resnet.layers.conv2d` is what checks its arguments, and what takes XLA's own convolution on
a GPU or TPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

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


def direct(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """(N, H', W', K), as `jax_resnet.layers.conv2d` defines it, by XLA's own convolution."""
    around = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, weight, (stride,) * 2, around, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def conv2d(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """The same in the form that is fastest by itself, where no gradient is asked for."""
    if _winograd_pays(x, weight, stride, padding):
        return _winograd(x, weight)
    form = direct if _direct_pays(x, weight) else unfolded
    return form(x, weight, stride=stride, padding=padding)


def unfolded(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """The same as one product, patches times kernel: the form for training, where the others gain nothing."""
    kh, kw, _, k = weight.shape
    patches = unfold(x, kh, kw, stride, padding)
    y = _product(patches.reshape(-1, patches.shape[3]), weight.reshape(-1, k), 1, 0)
    return y.astype(x.dtype).reshape(*patches.shape[:3], k)


def unfolded_vjp(x: Array, weight: Array, dy: Array, *, stride: int, padding: int) -> tuple[Array, Array]:
    """The gradients of x and weight."""
    kh, kw, c, k = weight.shape
    if max(kh, kw) > 1:
        x = once_known(dy, x)  # or patches, copies of x, would be made in the forward pass and kept until here
    rows = dy.reshape(-1, k)
    dpatches = _product(rows, weight.reshape(-1, k), 1, 1).reshape(*dy.shape[:3], kh * kw * c)
    dx = _fold(dpatches, x, kh, kw, stride, padding)
    if c < MIN_CHANNELS_BY_ROW:
        patches = unfold(x, kh, kw, stride, padding)
        return dx, _product_over_rows(patches, rows).astype(weight.dtype).reshape(weight.shape)
    # A row of the kernel at a time: unfolded across alone there is 1/kh of the patches, which caches may hold.
    across = _side_by_side(pad(x, padding), 2, kw, stride)
    last = stride * (dy.shape[1] - 1)
    of_rows = [_product_over_rows(lax.slice_in_dim(across, u, u + last + 1, stride, 1), rows) for u in range(kh)]
    return dx, jnp.stack(of_rows).astype(weight.dtype).reshape(weight.shape)


def _product_over_rows(x: Array, dy: Array) -> Array:
    """xᵀ·dy, (..., C) and (rows, K) -> (C, K)."""
    x = x.reshape(-1, x.shape[-1])
    if x.shape[1] <= dy.shape[1] or dy.shape[0] < MIN_ROWS_TURNED:
        return _product(x, dy, 0, 0)
    # The library transposes its left side: the smaller one, then. Without a barrier XLA turns the product around again.
    return lax.optimization_barrier(_product(dy, x, 0, 0)).T


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """The sum of products over an axis of each of two matrices, in at least float32."""
    # To bfloat16 at once XLA:CPU multiplies in float32; the processor's own products (amx_bf16) are summed in float32.
    summed_in = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=summed_in)


def _direct_pays(x: Array, weight: Array) -> bool:
    fits = max(weight.shape[:2]) > 1 and min(x.shape[1:3]) >= MIN_DIRECT and max(weight.shape[2:]) <= MAX_DIRECT
    return fits and x.dtype == jnp.float32


def once_known(late: Array, x: Array) -> Array:
    """x, but not before `late`, of any shape, is there: what is computed from it is not computed, and kept, sooner.

    `lax.optimization_barrier` does not do: XLA:CPU drops it before it merges what is computed twice and before it
    decides on an order. There this is x + 0, the 0 being the smallest normal number if the first entry of `late` is a
    nan; elsewhere it is x.
    """
    if not late.size:
        return x

    def on_cpu(late, x):
        return x + jnp.where(jnp.isnan(late[(0,) * late.ndim]), jnp.finfo(x.dtype).tiny, 0).astype(x.dtype)

    return lax.platform_dependent(late, x, cpu=on_cpu, default=lambda late, x: x)


def unfold(x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """The patches that a kernel sees (im2col): (N, H, W, C) -> (N, H', W', kh·kw·C), taps row-major, channels last."""
    return _side_by_side(_side_by_side(pad(x, padding), 2, kw, stride), 1, kh, stride)


def _fold(dpatches: Array, x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """The transpose of `unfold`, like x: each value gets the sum of what its copies got, all of them in one pass."""

    def unfold_by_taps(x):
        return jnp.concatenate(taps(pad(x, padding), kh, kw, stride, *dpatches.shape[1:3]), axis=3)

    like_x = jax.ShapeDtypeStruct(x.shape, dpatches.dtype)
    return jax.linear_transpose(unfold_by_taps, like_x)(dpatches)[0].astype(x.dtype)


def taps(x: Array, kh: int, kw: int, stride: int, out_h: int, out_w: int) -> list[Array]:
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


def pad(x: Array, padding: int, value: float = 0) -> Array:
    """x with so many pixels more on each of the four sides."""
    if not padding:
        return x
    # Not by jnp.pad, which XLA fuses, with all that x is computed from, into what copies it, once for each copy.
    n, h, w, c = x.shape
    side, above = (jnp.full(shape, value, x.dtype) for shape in ((n, h, padding, c), (n, padding, w + 2 * padding, c)))
    return jnp.concatenate([above, jnp.concatenate([side, x, side], 2), above], 1)


def _winograd_pays(x: Array, weight: Array, stride: int, padding: int) -> bool:
    """Whether Winograd's form is the faster one: transforms cost time, and in half precision their sums are coarse."""
    n, h, w, _ = x.shape
    saved = 9 * n * h * w - 16 * n * -(-h // 2) * -(-w // 2)
    fits = weight.shape[:2] == (3, 3) and (stride, padding) == (1, 1) and min(weight.shape[2:]) >= MIN_CHANNELS_WINOGRAD
    enough = MIN_SAVED_128 if max(weight.shape[2:]) == 128 else MIN_SAVED
    return fits and saved >= enough and x.dtype.itemsize >= 4


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
    x = pad(x, 2)[:, 1:, 1:]  # one before; one behind, and one more for tiles that stick out
    for axis, size in enumerate(x.shape[1:3]):  # the fours go to the front, so the pixels' axes are 1 and then 3
        count = (size - 2) // 2
        d = [lax.slice_in_dim(x, i, i + 2 * count - 1, 2, 2 * axis + 1) for i in range(4)]
        x = jnp.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]], axis)
    return x
