"""Checks a backward pass with finite differences of the forward pass.

>>> import numpy as np
>>> def square(x):
...     return x**2, lambda dy: (2 * x * dy,)
>>> check_vjp(square, np.array([1.0, -2.0]))
>>> def wrong(x):
...     return x**2, lambda dy: (x * dy,)
>>> check_vjp(wrong, np.array([1.0, -2.0]))
Traceback (most recent call last):
AssertionError: gradient 0, (2,), is wrong: in a random direction the output changes by 0.21647, the vjp says 0.10824
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray as Array

STEP = 1e-6


def check_vjp(function: Callable[..., tuple[Any, Callable]], *arrays: Array, tolerance: float = 1e-6) -> None:
    """Compares a function's vjp with central differences, for a random output gradient w and random directions u.

    For each array x, <w, f(x + h·u) - f(x - h·u)> / 2h must equal <vjp(w), u>, in float64 with h = 1e-6. The other
    arrays stay fixed. u and w involve all entries at once, so the check of an array of any size costs two runs.

    Args:
      function: as in `numpy_ref.layers`: arrays -> (y, vjp), or ((y, ...), vjp) where only y has a gradient. Bind
        settings and labels with functools.partial. The function must be smooth between x - h·u and x + h·u, where each
        entry of u is standard normal: no ReLU input near 0, no near tie in a max-pool.
      arrays: the inputs of y. vjp returns a tuple with one gradient per array, in this order.
      tolerance: the allowed difference relative to the gradient's norm. An estimate of the rounding error is added.

    Raises:
      AssertionError: names the first array whose gradient is wrong, has a wrong shape, or is missing.
    """
    rng = np.random.default_rng(0)
    arrays = [np.asarray(array, np.float64) for array in arrays]

    def first_output(*arrays: Array) -> Array:
        outputs, _ = function(*arrays)
        return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)

    y = first_output(*arrays)
    w = rng.standard_normal(y.shape)
    gradients = function(*arrays)[1](w)
    if not isinstance(gradients, tuple):
        raise AssertionError(f"vjp must return a tuple, one gradient per array, got {type(gradients).__name__}")
    rounding = np.finfo(float).eps / STEP * np.linalg.norm(w) * np.linalg.norm(y)
    for i, (array, gradient) in enumerate(itertools.zip_longest(arrays, gradients[: len(arrays)])):
        if np.shape(gradient) != array.shape:
            raise AssertionError(f"gradient {i} must be {array.shape}, got {np.shape(gradient)}")
        u = rng.standard_normal(array.shape)
        ahead, behind = (first_output(*arrays[:i], array + h * u, *arrays[i + 1 :]) for h in (STEP, -STEP))
        numeric, analytic = np.vdot(w, ahead - behind) / (2 * STEP), np.vdot(gradient, u)
        if not abs(numeric - analytic) <= tolerance * np.linalg.norm(gradient) + rounding:  # also true for nan
            raise AssertionError(
                f"gradient {i}, {array.shape}, is wrong: in a random direction the output changes by {numeric:.5g}, "
                f"the vjp says {analytic:.5g}"
            )
