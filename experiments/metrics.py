"""Figures of merit for classification, from labels and predictions; and the file that keeps these of each picture."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from experiments.data.dataset import Split

COLUMNS = ("picture", "label", "prediction", "confidence", "top5", "loss")


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


def write_test_results(path: Path, results: dict[str, np.ndarray], split: Split) -> None:
    """Writes what `experiments.training.evaluate` returns, a line for each picture of the split, as CSV with COLUMNS.

    picture is its name, or its number where it has none; label and prediction are class numbers, confidence is from 0
    to 1, top5 is 1 where the label is among the five best classes.
    """
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i, label in enumerate(split.labels):
            name = i if split.names is None else split.names[i]
            numbers = (f"{results['confidence'][i]:.4f}", int(results["top5"][i]), f"{results['loss'][i]:.4f}")
            writer.writerow((name, label, results["prediction"][i], *numbers))


def read_test_results(path: Path) -> dict[str, np.ndarray]:
    """The columns of a file of `write_test_results`, "picture" of text and the others of numbers.

    Raises:
      ValueError: it is no such file.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise ValueError(f"{path} holds no test results: its columns should be {', '.join(COLUMNS)}")
    columns = dict(zip(COLUMNS, zip(*rows[1:], strict=True), strict=True)) if rows[1:] else dict.fromkeys(COLUMNS, ())
    kinds = dict.fromkeys(("label", "prediction", "top5"), int) | dict.fromkeys(("confidence", "loss"), float)
    try:
        return {name: np.array(values, kinds.get(name, str)) for name, values in columns.items()}
    except ValueError as error:
        raise ValueError(f"{path} holds no test results: {error}") from error
