"""Relative errors, the bounds on them, and the rows of the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.frameworks.common import Arrays


class Results(NamedTuple):
    """What one pass of a network computes: images and activations (N, H, W, C), the rest with torchvision's names and
    layout.

    running_statistics: after the pass.
    parameter_gradients, image_gradient: of the mean loss.
    """

    logits: np.ndarray
    loss: Any
    activations: Arrays
    running_statistics: Arrays
    parameter_gradients: Arrays
    image_gradient: np.ndarray

    @classmethod
    def of(
        cls, loss_and_output: tuple[Any, Any], gradients: tuple[Any, Any], to_torch: Callable[[Any, Any], Arrays]
    ) -> Results:
        """From results of jax_resnet or numpy_ref; to_torch: (params, batch_stats) -> {torchvision's name: array}."""
        (loss, out), (dparams, dimages) = loss_and_output, gradients
        return cls(out.logits, loss, out.activations, to_torch({}, out.batch_stats), to_torch(dparams, {}), dimages)


class Row(NamedTuple):
    """A comparison of a framework with JAX.

    what: the quantity compared.
    error: the largest of all arrays.
    bound: on the error; None if the row is for information only.
    where: the array with that error.
    """

    what: str
    framework: str
    error: float
    bound: float | None
    where: str

    @property
    def name(self) -> str:
        return f"{self.what}, {self.framework}"

    @property
    def verdict(self) -> str:
        """ "ok", "BROKEN" (for a nan too) or "" without a bound."""
        if self.bound is None:
            return ""
        return "ok" if self.error <= self.bound else "BROKEN"

    @property
    def columns(self) -> dict[str, str]:
        """Its cells in a table."""
        bound = "-" if self.bound is None else f"{self.bound:.0e}"
        return {"error": f"{self.error:.1e}", "bound": bound, "verdict": self.verdict or "-", "where": self.where}


def relative_error(ours: Any, reference: Any) -> float:
    """The largest difference divided by the reference's largest entry; inf for arrays of different shapes."""
    if np.shape(ours) != np.shape(reference):
        return math.inf
    difference, largest = _largest_magnitude(np.subtract(ours, reference)), _largest_magnitude(reference)
    if largest == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / largest


def _largest_magnitude(values: np.ndarray) -> float:
    """np.abs(values).max(), without allocating an array for the magnitudes; nan if any value is."""
    return abs(float(np.maximum(np.max(values), -np.min(values))))


def relative_errors(ours: Arrays, reference: Arrays) -> dict[str, float]:
    """Errors by name, in the reference's order; inf for a name that only one of them has."""
    errors = {name: relative_error(ours[name], reference[name]) if name in ours else math.inf for name in reference}
    return errors | dict.fromkeys(ours.keys() - reference.keys(), math.inf)


def length_of_difference(ours: Any, reference: Any) -> float:
    """|ours - reference| / |reference| over all numbers of an array, or of arrays by name; inf if names differ."""
    if not isinstance(reference, Mapping):
        ours, reference = {"": ours}, {"": reference}
    if ours.keys() != reference.keys():
        return math.inf
    difference, whole = (
        math.hypot(*(float(np.linalg.norm(array)) for array in arrays))
        for arrays in ((ours[name] - reference[name] for name in reference), reference.values())
    )
    return difference / whole


def largest(errors: Mapping[str, float]) -> tuple[float, str]:
    """The largest error and its name; nan counts as the largest."""
    name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[name], name
