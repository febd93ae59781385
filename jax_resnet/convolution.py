"""Convolutions of images (N, H, W, C) with kernels (kh, kw, C, K) as products of matrices: the form for CPUs.

XLA:CPU multiplies matrices several times faster than it convolves. A product of unfolded patches (im2col) does for
every convolution; where no gradient is asked for, Winograd's form of 3x3 kernels needs 4/9 of the multiplications.
`jax_resnet.layers.conv2d` is what checks its arguments and chooses between these and XLA's own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

MIN_GATHERED = 16  # channels from which a gather unfolds faster than slices do
MIN_SAVED = 1200  # multiplications per pair of channels from which Winograd's form pays for transforming the kernel

# F(2x2, 3x3) of Winograd's minimal filtering (Lavin & Gray, 2016): y = Aᵀ((G g Gᵀ) ∘ (Bᵀ d B))A for tiles d of 4x4
# values that overlap by two. Bᵀ takes two values for each of its four results: d[FIRST] + SIGN · d[SECOND].
FIRST, SECOND, SIGN = np.array([0, 1, 2, 1]), np.array([2, 2, 1, 3]), np.array([-1, 1, -1, -1])
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])


def conv2d(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """(N, H', W', K), as `jax_resnet.layers.conv2d` defines it, in the form that is fastest by itself."""
    if _winograd_pays(x, weight, stride, padding):
        return _winograd(x, weight)
    return conv2d_unfolded(x, weight, stride=stride, padding=padding)


def conv2d_unfolded(x: Array, weight: Array, *, stride: int, padding: int) -> Array:
    """Patches times kernel: the form for training, where Winograd's transforms cost what its products save."""
    kh, kw, _, k = weight.shape
    patches = unfold(x, kh, kw, stride, padding)
    return (patches.reshape(-1, patches.shape[3]) @ weight.reshape(-1, k)).reshape(*patches.shape[:3], k)


def conv2d_unfolded_vjp(x: Array, weight: Array, dy: Array, *, stride: int, padding: int) -> tuple[Array, Array]:
    """The gradients of x and weight."""
    kh, kw, _, k = weight.shape
    # Unfolded again, so that x is all that must be kept. XLA:CPU notices in training, and keeps the patches after all.
    patches, fold = jax.vjp(lambda x: unfold(x, kh, kw, stride, padding), x)
    dy_rows = dy.reshape(-1, k)
    dweight = lax.dot_general(patches.reshape(-1, patches.shape[3]), dy_rows, (((0,), (0,)), ((), ())))
    (dx,) = fold((dy_rows @ weight.reshape(-1, k).T).reshape(patches.shape))
    return dx, dweight.reshape(weight.shape)


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
    return fits and saved >= MIN_SAVED and x.dtype.itemsize >= 4


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
