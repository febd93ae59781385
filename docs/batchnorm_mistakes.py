"""Measures what common mistakes in BatchNorm do to a bottleneck block; prints the table of docs/batchnorm.md.

    python docs/batchnorm_mistakes.py

The block is the second of ResNet-50's first stage, in float64, on 8 random images of 4x4x256: 128 values per channel.
Each mistake stands in for `numpy_ref.layers.batch_norm` in all three places. An error is the length of the difference
from the right result over the length of the right result. A last line says what is left of two mistakes without ReLU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import numpy as np
from numpy import ndarray as Array

from numpy_ref import layers, resnet

EPS, AXES = 1e-5, (0, 1, 2)
right = layers.batch_norm


def unbiased_normalization(x: Array, weight: Array, **others: Any) -> tuple[Any, Callable]:
    """Divides by the root of the unbiased variance, in the backward pass too."""
    n = x.size // x.shape[-1]
    shrink = np.sqrt((n - 1) / n)
    outputs, vjp = right(x, weight * shrink, **others, eps=EPS * (n - 1) / n)

    def vjp_of_shrunk(dy: Array) -> tuple[Array, ...]:
        dx, dweight, dbias = vjp(dy)
        return dx, dweight * shrink, dbias

    return outputs, vjp_of_shrunk


def biased_running_variance(x: Array, *, running_var: Array, **others: Any) -> tuple[Any, Callable]:
    """Updates the running variance with the biased variance."""
    (y, new_mean, _), vjp = right(x, running_var=running_var, **others)
    return (y, new_mean, 0.9 * running_var + 0.1 * x.var(AXES)), vjp


def constants(x: Array, weight: Array, *, mean_too: bool, **others: Any) -> tuple[Any, Callable]:
    """A backward pass that treats the variance as a constant, and perhaps the mean too."""
    outputs, vjp = right(x, weight, **others)

    def vjp_of_constants(dy: Array) -> tuple[Array, ...]:
        _, dweight, dbias = vjp(dy)
        dcentred = dy if mean_too else dy - dy.mean(AXES)
        return dcentred * weight / np.sqrt(x.var(AXES) + EPS), dweight, dbias

    return outputs, vjp_of_constants


def eps_outside_root(x: Array, weight: Array, bias: Array, **others: Any) -> tuple[Any, Callable]:
    """Divides by sqrt(var) + eps; the backward pass belongs to this formula."""
    (y, *statistics), vjp = right(x, weight, bias, **others)
    deviation, centred, n = x.std(AXES), x - x.mean(AXES), x.size // x.shape[-1]
    factor = np.sqrt(deviation**2 + EPS) / (deviation + EPS)  # this formula's y - bias over the right one's

    def vjp_of_product(dy: Array) -> tuple[Array, ...]:
        dx, dweight, _ = vjp(dy * factor)
        dfactor = (dy * (y - bias)).sum(AXES)
        slope = EPS * (deviation - 1) / (np.sqrt(deviation**2 + EPS) * (deviation + EPS) ** 2)  # of factor by deviation
        return dx + dfactor * slope * centred / (n * deviation), dweight, dy.sum(AXES)

    return ((y - bias) * factor + bias, *statistics), vjp_of_product


MISTAKES: dict[str, tuple[Callable, float]] = {  # the BatchNorm with the mistake, and a factor for the block's input
    "unbiased variance normalizes": (unbiased_normalization, 1),
    "running variance from the biased variance": (biased_running_variance, 1),
    "momentum 0.9 instead of 0.1": (functools.partial(right, momentum=0.9), 1),
    "mean and variance as constants": (functools.partial(constants, mean_too=True), 1),
    "variance as a constant": (functools.partial(constants, mean_too=False), 1),
    "eps outside the root": (eps_outside_root, 1),
    "the same, input times 0.01": (eps_outside_root, 0.01),
}
COLUMNS = ("output", "dx", "conv1's gradient", "bn3's gradient", "running variance")


def block(batch_norm: Callable, scale: float) -> dict[str, Any]:
    """What the block computes with this BatchNorm, by column."""
    rng = np.random.default_rng(0)
    config = resnet.resnet50(num_classes=1)
    params, batch_stats = (tree["layer1"]["1"] for tree in resnet.init(config, rng, np.float64))
    for number in "123":
        params[f"bn{number}"] = {name: rng.uniform(0.5, 1.5, v.shape) for name, v in params[f"bn{number}"].items()}
    x, dy = scale * rng.standard_normal((8, 4, 4, 256)), rng.standard_normal((8, 4, 4, 256))
    with mock.patch.object(layers, "batch_norm", batch_norm):
        (y, new_stats), vjp = resnet.residual_block(config, params, batch_stats, x, 1, train=True)
        dparams, dx = vjp(dy)
    results = y, dx, dparams["conv1"]["weight"], dparams["bn3"]["weight"], new_stats["bn3"]["running_var"]
    return dict(zip(COLUMNS, results, strict=True))


def measure(names: Iterable[str] = MISTAKES) -> dict[str, dict[str, float]]:
    """{mistake: {column: error}}."""
    table = {}
    for name in names:
        batch_norm, scale = MISTAKES[name]
        ours, expected = block(batch_norm, scale), block(right, scale)
        norm = np.linalg.norm
        table[name] = {key: norm(ours[key] - expected[key]) / norm(expected[key]) for key in COLUMNS}
    return table


def most_without_relu() -> float:
    """The largest error of a gradient by the first and the last mistake, in a block without ReLU."""
    with mock.patch.object(layers, "relu", lambda x: (x, lambda dy: (dy,))):
        table = measure((next(iter(MISTAKES)), next(reversed(MISTAKES))))
    return max(errors[column] for errors in table.values() for column in COLUMNS[1:4])


def text(error: float) -> str:
    """The error in percent with two digits; below 1e-10 it is rounding and becomes 0."""
    return "0" if error < 1e-10 else "< 0.001%" if error < 1e-5 else f"{float(f'{100 * error:.2g}'):g}%"


def rows() -> list[str]:
    """The table in Markdown."""
    head = ["| mistake | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    return head + [f"| {name} | " + " | ".join(map(text, errors.values())) + " |" for name, errors in measure().items()]


if __name__ == "__main__":
    print("\n".join(rows()))
    print(f"without ReLU, gradients by the first and the last row: at most {text(most_without_relu())}")
