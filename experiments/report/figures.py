"""The pictures of the report; each is drawn from the files of the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.analysis import mean_interval, paired_difference
from experiments.report.study_results import Contestant, StudyResults, Trial
from experiments.step_sizes import BOUNDED

matplotlib.use("Agg")  # files only; no window system is needed

PANELS = {"train_loss": "training loss", "test_loss": "test loss", "test_top1": "test top-1"}
MOST_CURVES = 10  # of one figure; more would hide one another


def plot_curves(contestants: Sequence[Contestant]) -> Figure:
    """Means over seeds with their 95% intervals, by epoch."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4.2), layout="constrained")
    for axis, (column, title) in zip(axes, PANELS.items(), strict=True):
        for number, contestant in enumerate(contestants):
            epochs, values = contestant.curve(column)
            if not len(epochs):
                continue
            intervals = [mean_interval(at_epoch) for at_epoch in values.T]
            colour = f"C{number}"
            axis.plot(epochs, [i.mean for i in intervals], color=colour, lw=1.5, label=contestant.name)
            axis.fill_between(epochs, [i.low for i in intervals], [i.high for i in intervals], color=colour, alpha=0.18)
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
    axes[-1].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[-1].set_ylim(bottom=0)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(contestants)))
    return figure


def plot_differences(results: StudyResults, baseline: Contestant) -> Figure:
    """Each contestant's final top-1 minus the baseline's: every seed, the mean, and the interval over seeds."""
    others = [c for c in results.contestants if c is not baseline and c.finals]
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.45 * len(others)), layout="constrained")
    theirs = baseline.by_seed()
    for y, contestant in enumerate(others):
        ours = contestant.by_seed()
        each = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        interval = paired_difference(ours, theirs)
        axis.plot(each, [y] * len(each), "o", ms=4, color="tab:gray", alpha=0.6)
        if not math.isnan(interval.low):
            axis.plot([interval.low, interval.high], [y, y], color="tab:blue", lw=2)
        axis.plot(interval.mean, y, "D", color="tab:blue", ms=6)
    axis.axvline(0, color="black", lw=1)
    axis.set_yticks(range(len(others)), [contestant.name for contestant in others])
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set(xlabel=f"final test top-1 minus that of {baseline.name}, same seed")
    axis.grid(alpha=0.3, axis="x")
    return figure


def plot_tuning(contestants: Sequence[Contestant]) -> Figure | None:
    """Every tuning trial: top-1 on held-out pictures over the learning rate; those that failed as crosses at 0."""
    tuned = [c for c in contestants if any("learning_rate" in trial.columns for trial in c.tuning)]
    if not tuned:
        return None
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for number, contestant in enumerate(tuned):
        for state, marker in (("done", "o"), ("failed", "x")):
            trials = [trial for trial in contestant.tuning if trial.state == state]
            x = [trial.number("learning_rate") for trial in trials]
            y = [trial.number("top1") if state == "done" else 0.0 for trial in trials]
            label = contestant.name if state == "done" else None
            axis.plot(x, y, marker, color=f"C{number}", label=label, ms=7, alpha=0.8)
    axis.set(xscale="log", xlabel="learning rate", ylabel="top-1 on held-out pictures", ylim=(-0.02, None))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def sgd_step(trial: Trial) -> float:
    """What SGD's momentum makes of its learning rate: the step on an averaged gradient, at the peak of the schedule."""
    settings = trial.config["settings"]
    return settings["learning_rate"] * (1 - settings["dampening"]) / (1 - settings["momentum"])


def plot_steps(contestants: Sequence[Contestant]) -> Figure | None:
    """What step the averaged gradient gets: shares at AdaBound's bounds, and the steps of all layers, by epoch."""
    with_steps = [c for c in contestants if c.curve("at_upper")[0].size]
    sgds = [c for c in contestants if c.finals and c.finals[0].config["settings"]["opt"] == "sgd"]
    if not with_steps:
        return None
    bounded = [c for c in with_steps if c.finals[0].config["settings"]["opt"] in BOUNDED]
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    colours = {contestant.name: f"C{number}" for number, contestant in enumerate(contestants)}
    for contestant in bounded:
        for column, bound, style in (("at_upper", "upper", "-"), ("at_lower", "lower", ":")):
            epochs, values = contestant.curve(column)
            label = f"{contestant.name}, at the {bound} bound"
            axes[0].plot(epochs, values.mean(0), style, color=colours[contestant.name], label=label)
    axes[0].set(xlabel="epoch", title="share of weights", ylim=(-0.02, 1.02))
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    for contestant in with_steps:
        rows = [row for row in contestant.finals[0].rows if "at_upper" in row]
        epochs = [row["epoch"] for row in rows]
        steps = np.array([[value for name, value in row.items() if name.startswith("step/")] for row in rows])
        low, median, high = np.percentile(steps, [5, 50, 95], axis=1)
        colour = colours[contestant.name]
        axes[1].plot(epochs, median, color=colour, label=contestant.name)
        axes[1].fill_between(epochs, low, high, color=colour, alpha=0.15)
        if contestant in bounded:
            axes[1].plot(epochs, [row["step_upper"] for row in rows], color=colour, ls="--", lw=0.8)
            axes[1].plot(epochs, [row["step_lower"] for row in rows], color=colour, ls="--", lw=0.8)
    for contestant in sgds:
        axes[1].axhline(sgd_step(contestant.finals[0]), color=colours[contestant.name], ls="-.", label=contestant.name)
    axes[1].set(xlabel="epoch", yscale="log", title="step on the averaged gradient, at the peak of the schedule")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def plot_layer_steps(contestants: Sequence[Contestant]) -> Figure | None:
    """The median step of each layer after the last epoch, from the stem to the dense layer."""
    figure, axis = plt.subplots(figsize=(13, 4.6), layout="constrained")
    names: list[str] = []
    for number, contestant in enumerate(contestants):
        if not contestant.finals:
            continue
        last = contestant.finals[0].rows[-1]
        steps = {name.removeprefix("step/"): v for name, v in last.items() if name.startswith("step/")}
        if steps:
            names = names or list(steps)
            axis.plot(range(len(steps)), list(steps.values()), ".-", color=f"C{number}", label=contestant.name)
        elif contestant.finals[0].config["settings"]["opt"] == "sgd":
            axis.axhline(sgd_step(contestant.finals[0]), color=f"C{number}", ls="-.", label=contestant.name)
    if not names:
        plt.close(figure)
        return None
    ticks = range(0, len(names), max(1, len(names) // 26))
    axis.set_xticks(list(ticks), [names[i] for i in ticks], rotation=60, ha="right", fontsize=7)
    axis.set(yscale="log", ylabel="median step, at the peak of the schedule")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def numeric_axes(results: StudyResults) -> tuple[str, str] | None:
    """The two axes of a heat map: those whose values are numbers, if there are two that some contestants share."""
    for contestant in results.contestants:
        numeric = [axis for axis, label in contestant.labels.items() if _is_number(label)]
        if len(numeric) == 2:
            return numeric[0], numeric[1]
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def plot_heat_map(results: StudyResults) -> Figure | None:
    """Final top-1 over two axes of numbers, the mean over seeds."""
    found = numeric_axes(results)
    if found is None:
        return None
    down, across = found
    cells = {
        (float(c.labels[down]), float(c.labels[across])): c.interval().mean
        for c in results.contestants
        if {down, across} <= set(c.labels)
    }
    rows, columns = sorted({y for y, _ in cells}), sorted({x for _, x in cells})
    values = np.array([[cells.get((y, x), np.nan) for x in columns] for y in rows])
    figure, axis = plt.subplots(figsize=(2.5 + 1.1 * len(columns), 1.8 + 0.7 * len(rows)), layout="constrained")
    image = axis.imshow(values, cmap="viridis", origin="lower", aspect="auto")
    axis.set_xticks(range(len(columns)), [f"{x:g}" for x in columns])
    axis.set_yticks(range(len(rows)), [f"{y:g}" for y in rows])
    axis.set(xlabel=across, ylabel=down)
    middle = np.nanmin(values) / 2 + np.nanmax(values) / 2 if np.isfinite(values).any() else 0.0
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            axis.text(j, i, f"{value:.1%}", ha="center", va="center", color="white" if value < middle else "black")
    figure.colorbar(image, format=PercentFormatter(1.0), label="final test top-1")
    return figure


def plot_final(contestants: Sequence[Contestant]) -> Figure:
    """Final top-1 of every run as a dot, with means: for more contestants than curves could show."""
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.3 * len(contestants)), layout="constrained")
    for y, contestant in enumerate(contestants):
        values = list(contestant.by_seed().values())
        axis.plot(values, [y] * len(values), "o", ms=5, color="tab:blue", alpha=0.6)
        failed = sum(trial.state == "failed" for trial in contestant.final)
        axis.plot([0.0] * failed, [y] * failed, "x", color="tab:red")
    axis.set_yticks(range(len(contestants)), [contestant.name for contestant in contestants], fontsize=8)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set(xlabel="final test top-1 (red cross: the training failed)", xlim=(-0.01, None))
    axis.grid(alpha=0.3)
    return figure


def plot_confusions(counts: np.ndarray, names: Sequence[str], title: str, axis: Axes) -> None:
    """A confusion matrix, each row divided by its sum; names (classes) are drawn where there are up to 40."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_title(title, fontsize=9, parse_math=False)
    axis.set(xlabel="taken for", ylabel="is")
    if len(names) <= 40:
        short = [name if len(name) <= 26 else f"{name[:25]}…" for name in names]
        axis.set_yticks(range(len(names)), short, fontsize=6)
        axis.set_xticks(range(len(names)), short, fontsize=6, rotation=90)
