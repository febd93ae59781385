"""The figures of a run, and of a comparison of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.output.figures import in_percent, panels, save
from experiments.output.figures import label as as_label
from experiments.training.run_folder import ends_epoch

Rows = Sequence[Mapping[str, Any]]
PANELS = {
    "loss": {"train": "train_loss", "test": "test_loss"},
    "accuracy": {"train": "train_top1", "test": "test_top1", "test, top-5": "test_top5"},
    "macro-F1": {"train": "train_macro_f1", "test": "test_macro_f1"},
}
SGD_STEP = 0.05 / (1 - 0.9)  # experiments.cars' defaults for --opt sgd


def plot_curves(path: Path, rows: Rows, title: str) -> None:
    """Draws loss, accuracy and macro-F1 of training and test pictures by epoch; rows within epochs as thin lines."""
    figure, axes = panels(len(PANELS), len(PANELS), 13 / 3, 3.8)
    ends, between = _ends_and_between(rows)
    for axis, (name, curves) in zip(axes, PANELS.items(), strict=True):
        for (label, key), colour in zip(curves.items(), ("tab:blue", "tab:orange", "tab:green"), strict=False):
            if between and key in between[0]:
                axis.plot(*_points(between, key), lw=0.7, alpha=0.6, color=colour, label=f"{label}, within epochs")
            axis.plot(*_points(ends, key), "o-", ms=4, color=colour, label=label)
        axis.set_ylim(bottom=0)
        if name != "loss":
            # At high accuracy, the first steps would take up most of the height: the lowest values may lie outside.
            values = [row[key] for row in rows for key in curves.values() if key in row] or [0.0]
            axis.set_ylim(bottom=max(0.0, 1 - 1.5 * (1 - np.quantile(values, 0.05))))
            in_percent(axis)
        _finish(axis, xlabel="epoch", title=name)
    figure.suptitle(title)
    save(figure, path)


def _ends_and_between(rows: Rows) -> tuple[Rows, Rows]:
    """The rows that end an epoch, and the others."""
    return [row for row in rows if ends_epoch(row)], [row for row in rows if not ends_epoch(row)]


def _points(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """The epochs and values of the rows that have the key."""
    shown = [row for row in rows if key in row]
    return [row["epoch"] for row in shown], [row[key] for row in shown]


def _finish(axis: Axes, legend: Mapping[str, Any] = MappingProxyType({}), **texts: str) -> None:
    axis.set(**texts)
    axis.legend(**legend)


def plot_comparison(
    path: Path,
    runs: Mapping[str, Rows],
    title: str,
    against: str | None = None,
    distances: Mapping[str, Rows] = MappingProxyType({}),
) -> None:
    """Overlays the curves of several runs: training loss by step, test loss and test top-1 by epoch.

    Args:
      runs: the rows of metrics.jsonl by the name of the run.
      against: the name of the run that the others are compared with.
      distances: by name, rows with "epoch" and "distance", the relative distance of the training loss from `against`.
    """
    figure, axes = panels(4 if distances else 3, 4, 4.3, 3.8)
    for axis, (key, marker) in zip(axes, dict(train_loss=".-", test_loss="o-", test_top1="o-").items(), strict=False):
        # Earlier curves are wider, so that they stay visible below later ones that coincide with them.
        for width, (name, rows) in zip(range(len(runs), 0, -1), runs.items(), strict=True):
            # Rows that end an epoch hold its mean; rows in between, if there are any, show more of the training loss.
            shown = _ends_and_between(rows)[1] if key == "train_loss" else rows
            size, line = (3 + 2 * width, 1.5 * width) if distances else (4, 1)
            axis.plot(*_points(shown or rows, key), marker, ms=size, lw=line, label=as_label(name))
        _finish(axis, dict(fontsize=8), xlabel="epoch", title=key.replace("_", " "))
    in_percent(axes[2])
    highest = max((row["test_top1"] for rows in runs.values() for row in rows if "test_top1" in row), default=1.0)
    axes[2].set_ylim(0, 1.1 * highest or 1.0)
    for number, name in enumerate(runs):
        if name in distances:
            x, y = _points(distances[name], "distance")
            shown = np.where(np.array(y) > 0, y, np.nan)
            axes[3].plot(x, shown, ".-", ms=4, lw=1, color=f"C{number}", label=as_label(name))
    if distances:
        title_of_distances = f"train loss, relative distance from {against}"
        _finish(axes[3], dict(fontsize=8), xlabel="epoch", yscale="log", title=title_of_distances)
    figure.suptitle(title)
    save(figure, path)


def plot_predictions(
    path: Path,
    images: np.ndarray,
    true_names: Sequence[str],
    predicted_names: Sequence[str],
    confidences: Sequence[float],
    title: str,
) -> None:
    """Draws pictures with their true and predicted names, the wrong ones framed and named in red.

    Args:
      images: (N, H, W, C) uint8, C = 1 or 3.
      true_names, predicted_names, confidences: N of each; confidences from 0 to 1.
    """
    figure, axes = panels(len(images), 4, 2.3, 2.7)
    shown = zip(axes, images, true_names, predicted_names, confidences, strict=True)
    for axis, image, true, predicted, confidence in shown:
        right = true == predicted
        axis.set(xticks=[], yticks=[])
        axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        for spine in axis.spines.values():
            spine.set(color="tab:green" if right else "tab:red", linewidth=2.5)
        text = f"{_short(true)}\n{confidence:.0%} sure" if right else f"{_short(true)}\ntaken for {_short(predicted)}"
        axis.set_title(text, fontsize=9.5, color="black" if right else "tab:red")
    figure.suptitle(title)
    save(figure, path)


def plot_layer_steps(path: Path, steps: dict[str, Any], title: str) -> None:
    """Draws what `step_sizes.layer_steps` returns: each layer's steps before clipping, the bounds, and SGD's step."""
    layers, lower, upper = steps["layers"], steps["lower"], steps["upper"]
    x = np.arange(len(layers))
    low, median, high = ([layer[name] for layer in layers] for name in ("low", "median", "high"))
    figure, (axis,) = panels(1, 1, 13, 4.6)
    axis.fill_between(x, low, high, alpha=0.3, label="Adam's step, 5%-95% of a layer")
    axis.plot(x, median, label="Adam's step, median of a layer")
    axis.axhspan(lower, upper, color="tab:orange", alpha=0.15)
    axis.axhline(upper, color="tab:orange", label=f"AdaBound's upper bound, {upper:.3g}")
    axis.axhline(lower, color="tab:orange", ls="--", label=f"AdaBound's lower bound, {lower:.3g}")
    axis.axhline(SGD_STEP, color="tab:green", ls=":", label=f"SGD's step, 0.05 at momentum 0.9: {SGD_STEP:.3g}")
    ticks = x[:: max(1, len(x) // 26)]
    names = [layers[i]["name"].removesuffix(".weight") for i in ticks]
    axis.set_xticks(ticks, names, rotation=60, ha="right", fontsize=7)
    legend = dict(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    title = f"{title}, update {steps['update']:,}, at the peak learning rate"
    _finish(axis, legend, yscale="log", ylabel="step on the averaged gradient", title=title)
    save(figure, path)


def _short(name: str) -> str:
    return name if len(name) <= 26 else name[:25] + "…"
