"""numpy_ref.check: a right gradient passes, a wrong one is named."""

import functools

import numpy as np
import pytest

from numpy_ref import layers
from numpy_ref.check import check_vjp


def mistaken(change):
    """A dense layer whose gradients (dx, dweight, dbias) are changed."""

    def layer(*arrays):
        y, vjp = layers.dense(*arrays)
        return y, lambda dy: change(*vjp(dy))

    return layer


MISTAKES = {
    "right": (lambda dx, dw, db: (dx, dw, db), None),
    "more than asked for": (lambda dx, dw, db: (dx, dw, db, None), None),
    "sign": (lambda dx, dw, db: (dx, -dw, db), r"gradient 1, \(4, 3\), is wrong"),
    "a thousandth": (lambda dx, dw, db: (dx, dw, 1.001 * db), r"gradient 2, \(3,\), is wrong"),
    "one entry": (lambda dx, dw, db: (np.where(dx == dx.max(), 0, dx), dw, db), r"gradient 0, \(5, 4\), is wrong"),
    "zero": (lambda dx, dw, db: (0 * dx, dw, db), "gradient 0.* is wrong.*the vjp says 0"),
    "nan": (lambda dx, dw, db: (np.nan * dx, dw, db), "gradient 0.* is wrong"),
    "transposed": (lambda dx, dw, db: (dx, dw.T, db), r"gradient 1 must be \(4, 3\), got \(3, 4\)"),
    "no tuple": (lambda dx, dw, db: dx, "vjp must return a tuple, one gradient per array, got ndarray"),
    "nothing": (lambda dx, dw, db: None, "vjp must return a tuple, one gradient per array, got NoneType"),
    "missing": (lambda dx, dw, db: (dx, dw), r"gradient 2 must be \(3,\), got \(\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_a_wrong_gradient_is_named(mistake, scale):
    change, message = MISTAKES[mistake]
    rng = np.random.default_rng(0)
    arrays = [scale * rng.standard_normal(shape) for shape in [(5, 4), (4, 3), (3,)]]
    if message is None:
        check_vjp(mistaken(change), *arrays)
    else:
        with pytest.raises(AssertionError, match=message):
            check_vjp(mistaken(change), *arrays)


def test_float32_is_checked_in_float64_and_only_the_first_output_counts():
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in [(6, 3), 3, 3])
    running = np.zeros(3), np.ones(3)
    layer = functools.partial(layers.batch_norm, train=True)
    check_vjp(lambda *arrays: layer(*arrays, *running), x, weight, bias)
