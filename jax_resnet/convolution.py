"""Convolutions of images (N, H, W, C) with kernels (kh, kw, C, K) on a CPU, in the forms that are fastest there.

`direct` is XLA's own convolution. XLA:CPU gives it to the library that multiplies its matrices where types and sizes
suit that, and is many times slower elsewhere; there, and for the gradient of the weight, a product of unfolded patches
(im2col) does. Where no gradient is asked for, Winograd's form of 3x3 kernels needs 4/9 of the multiplications.
`jax_resnet.layers.conv2d` is what checks its arguments, and what takes XLA's own convolution on a GPU or TPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

MIN_DIRECT = 4  # pixels of height and width from which XLA's own convolution is fast: 2x2 under 3x3 is 60 times slower
MAX_DIRECT = 128  # channels up to which it is faster than unfolding: it packs the kernel in each call
MIN_GATHERED = 16  # channels from which a gather unfolds faster than slices do
# Multiplications per pair of channels from which Winograd's form pays for its transforms: 128 channels are what XLA's
# own convolution is best at.
MIN_SAVED, MIN_SAVED_128 = 1200, 12_000

# F(2x2, 3x3) of Winograd's minimal filtering (Lavin & Gray, 2016): y = Aᵀ((G g Gᵀ) ∘ (Bᵀ d B))A for tiles d of 4x4
# values that overlap by two. Bᵀ takes two values for each of its four results: d[FIRST] + SIGN · d[SECOND].
FIRST, SECOND, SIGN = np.array([0, 1, 2, 1]), np.array([2, 2, 1, 3]), np.array([-1, 1, -1, -1])
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])


def direct(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """(N, H', W', K), as `jax_resnet.layers.conv2d` defines it, by XLA's own convolution."""
    return _convolve(x, weight, stride, [(padding, padding)] * 2)


def conv2d(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """The same in the form that is fastest by itself."""
    if _winograd_pays(x, weight, stride, padding):
        return _winograd(x, weight)
    return conv2d_in_training(x, weight, stride=stride, padding=padding)


def conv2d_in_training(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """The same for training, where Winograd's transforms cost what its products save."""
    form = direct if _direct_pays(x, weight) else unfolded
    return form(x, weight, stride=stride, padding=padding)


def conv2d_vjp(x: Array, weight: Array, dy: Array, *, stride: int, padding: int) -> tuple[Array, Array]:
    """The gradients of x and weight."""
    if max(weight.shape[:2]) > 1:
        x = once_known(dy, x)  # or patches, copies of x, would be made in the forward pass and kept until here
    if stride == 1 and _direct_pays(x, weight):
        dx = direct_dx(weight, dy, padding=padding)
    else:
        dx = unfolded_dx(x, weight, dy, stride=stride, padding=padding)
    # As a convolution of x with dy this takes up to five times as long.
    kh, kw, _, k = weight.shape
    patches = unfold(x, kh, kw, stride, padding)
    dweight = lax.dot_general(patches.reshape(-1, patches.shape[3]), dy.reshape(-1, k), (((0,), (0,)), ((), ())))
    return dx, dweight.reshape(weight.shape)


def _direct_pays(x: Array, weight: Array) -> bool:
    fits = max(weight.shape[:2]) > 1 and min(x.shape[1:3]) >= MIN_DIRECT and max(weight.shape[2:]) <= MAX_DIRECT
    return fits and x.dtype == jnp.float32


def direct_dx(weight: Array, dy: Array, *, padding: int) -> Array:
    """The gradient of x at stride 1, as a convolution of dy with the turned kernel."""
    around = weight[::-1, ::-1].swapaxes(2, 3)
    return _convolve(dy, around, 1, [(size - 1 - padding,) * 2 for size in weight.shape[:2]])


def unfolded_dx(x: Array, weight: Array, dy: Array, *, stride: int, padding: int) -> Array:
    """The gradient of x, at any stride: that of its patches, folded back."""
    kh, kw, c, k = weight.shape
    dpatches = dy.reshape(-1, k) @ weight.reshape(-1, k).T
    (dx,) = _unfold_bwd(kh, kw, stride, padding, x, dpatches.reshape(*dy.shape[:3], kh * kw * c))
    return dx


def _convolve(x: Array, weight: Array, stride: int, padding: list[tuple[int, int]]) -> Array:
    return lax.conv_general_dilated(x, weight, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def unfolded(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """The convolution as one product, patches times kernel."""
    kh, kw, _, k = weight.shape
    patches = unfold(x, kh, kw, stride, padding)
    return (patches.reshape(-1, patches.shape[3]) @ weight.reshape(-1, k)).reshape(*patches.shape[:3], k)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def unfold(x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """The patches that a kernel sees (im2col): (N, H, W, C) -> (N, H', W', kh·kw·C), taps row-major, channels last."""
    if kh == kw == 1 or x.shape[3] < MIN_GATHERED:
        return _unfold_by_slices(x, kh, kw, stride, padding)
    return _unfold_by_gather(x, kh, kw, stride, padding)


def _unfold_fwd(x, kh, kw, stride, padding):
    return unfold(x, kh, kw, stride, padding), x


def _unfold_bwd(kh, kw, stride, padding, x, dpatches):
    """Each value gets the sum of what its copies got. Written out: a gather's own gradient is slow on a CPU."""

    def unfold_by_taps(x):
        return jnp.concatenate(taps(_pad(x, padding), kh, kw, stride, *dpatches.shape[1:3]), axis=3)

    return jax.linear_transpose(unfold_by_taps, x)(dpatches)


unfold.defvjp(_unfold_fwd, _unfold_bwd)


def taps(x: Array, kh: int, kw: int, stride: int, out_h: int, out_w: int) -> list[Array]:
    """For each tap (u, v) of a kernel, row-major, the values it meets: kh·kw arrays (N, out_h, out_w, C)."""
    return [
        x[:, u : u + stride * (out_h - 1) + 1 : stride, v : v + stride * (out_w - 1) + 1 : stride]
        for u in range(kh)
        for v in range(kw)
    ]


def _unfold_by_gather(x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """`unfold` in one gather of whole kernel rows: one pass over memory and one program to compile, not kh·kw."""
    n, h, w, c = x.shape
    out_h, out_w = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1
    row = stride * np.arange(out_h)[:, None, None] - padding + np.arange(kh)
    column = stride * np.arange(out_w)[:, None] - padding
    return _gather(x, row, column, kw, images_axis=0).reshape(n, out_h, out_w, kh * kw * c)


def _unfold_by_slices(x: Array, kh: int, kw: int, stride: int, padding: int) -> Array:
    """`unfold` in kw slices and then kh slices, which is faster for few channels."""
    x = _pad(x, padding)
    for axis, size in ((2, kw), (1, kh)):
        end = x.shape[axis] - size + 1
        x = jnp.concatenate([lax.slice_in_dim(x, u, u + end, stride, axis) for u in range(size)], axis=3)
    return x


def _pad(x: Array, padding: int) -> Array:
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0))) if padding else x


def _gather(x: Array, row: np.ndarray, column: np.ndarray, run: int, *, images_axis: int) -> Array:
    """For each position (row, column), `run` pixels of that row of the images from there to the right.

    Args:
      x: (N, H, W, C).
      row, column: integers that broadcast to positions of any shape; what lies outside the image is 0.
      run: pixels, neighbours in memory.
      images_axis: where N stands among the axes of the positions in what is returned.

    Returns:
      (the positions and N, run·C).
    """
    n, h, w, c = x.shape
    row, column = np.broadcast_arrays(row, column)
    inside = (row >= 0) & (row < h) & (column < w)
    # Zeros on the left and on the right of each row; what is above and below is taken from those on the left. They are
    # concatenated since XLA fuses jnp.pad, and all that x is computed from, into the gather, once for each copy of x.
    left, right = max(run, -column.min()), max(1, column.max(initial=0, where=inside) + run - w)
    zeros = [jnp.zeros((n, h, pixels * c), x.dtype) for pixels in (left, right)]
    image_rows = jnp.concatenate([zeros[0], x.reshape(n, h, w * c), zeros[1]], axis=2)
    starts = np.stack([np.where(inside, row, 0), np.where(inside, (left + column) * c, 0)], axis=-1)
    dimensions = lax.GatherDimensionNumbers(
        (images_axis, row.ndim + 1), collapsed_slice_dims=(1,), start_index_map=(1, 2)
    )
    return lax.gather(image_rows, jnp.asarray(starts, jnp.int32), dimensions, (n, 1, run * c), mode="promise_in_bounds")


def _winograd_pays(x: Array, weight: Array, stride: int, padding: int) -> bool:
    """Whether Winograd's form is the faster one: transforms cost time, and in half precision their sums are coarse."""
    n, h, w, _ = x.shape
    saved = 9 * n * h * w - 16 * n * -(-h // 2) * -(-w // 2)
    fits = weight.shape[:2] == (3, 3) and (stride, padding) == (1, 1) and min(weight.shape[2:]) >= MIN_GATHERED
    enough = MIN_SAVED_128 if max(weight.shape[2:]) == 128 else MIN_SAVED
    return fits and saved >= enough and x.dtype.itemsize >= 4


def _winograd(x: Array, weight: Array) -> Array:
    """conv2d of 3x3 kernels, stride 1, padding 1."""
    n, h, w, c = x.shape
    k = weight.shape[3]
    kernels = (np.kron(G, G).astype(weight.dtype) @ weight.reshape(9, c * k)).reshape(16, c, k)
    tiles = _tiles(x)
    products = jnp.einsum("tpc,tck->tpk", tiles.reshape(16, -1, c), kernels).reshape(*tiles.shape[:5], k)

    def outputs(m: Array, axis: int) -> Array:
        """Aᵀ along an axis: m[0] + m[1] + m[2] and m[1] - m[2] - m[3]."""
        one, two, outer = (lax.slice_in_dim(m, *bounds, axis=axis) for bounds in ((1, 2), (2, 3), (0, 4, 3)))
        return one + _along(axis, A[2], m) * (two + outer)

    y = outputs(outputs(products, 0), 1)  # (2, 2, N, tiles down, tiles across, K)
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(n, 2 * y.shape[3], 2 * y.shape[4], k)[:, :h, :w]


def _tiles(x: Array) -> Array:
    """Bᵀ d B of each tile: (4, 4, N, tiles down, tiles across, C)."""
    _, h, w, _ = x.shape
    row, column = 2 * np.arange(-(-h // 2))[:, None] - 1, 2 * np.arange(-(-w // 2)) - 1

    def values(down: np.ndarray, across: np.ndarray) -> Array:
        return _gather(x, row + down[:, None, None, None], column + across[:, None, None], 1, images_axis=2)

    down, across = _along(0, SIGN, x), _along(1, SIGN, x)
    return (
        values(FIRST, FIRST)
        + across * values(FIRST, SECOND)
        + down * (values(SECOND, FIRST) + across * values(SECOND, SECOND))
    )


def _along(axis: int, numbers: np.ndarray, like: Array) -> np.ndarray:
    """Numbers along an axis of six."""
    return numbers.astype(like.dtype).reshape([-1 if a == axis else 1 for a in range(6)])
