"""Figures of merit for classification, from labels and predictions."""

from __future__ import annotations

import numpy as np


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean over classes of F1 = 2 · true positives / (labelled + predicted); labels and predictions (N,) int.

    Classes that occur in neither count for nothing; one that occurs but is never right counts as 0.
    """
    classes = int(max(labels.max(), predictions.max())) + 1
    labelled = np.bincount(labels, minlength=classes)
    predicted = np.bincount(predictions, minlength=classes)
    right = np.bincount(labels[labels == predictions], minlength=classes)
    occurs = labelled + predicted > 0
    return float((2 * right[occurs] / (labelled + predicted)[occurs]).mean())
