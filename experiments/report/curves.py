"""The pictures of the report; each is drawn from the files of the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from experiments.frameworks.experiment import BOUNDED
from experiments.output.figures import in_percent, label, panels
from experiments.report.analysis import expected_best, mean_interval, paired_difference
from experiments.report.study_results import Contestant, StudyResults

OUT_OF_REACH = 4  # times the median distance from 0; contestants beyond this do not widen the axis
MAPS_WIDE, DECADES = 4, 3  # maps side by side, and powers of ten on either side of the bound
PANELS = {"train_loss": "training loss", "test_loss": "test loss", "test_top1": "test top-1"}
PANELS |= {"at_upper": "share of weights at the upper bound"}
TUNING_WIDE = 3
MOST_CURVES = 10  # of one figure; more would hide one another
MOST_LOSS = 2  # times the lowest loss after one epoch
LEAST_BAND = 3  # seeds; the interval of two is 13 times their standard error, and covers all else


def plot_curves(contestants: Sequence[Contestant]) -> Figure:
    """Means over seeds with 95% intervals, by epoch; shares at the upper bound only for optimizers that have one."""
    bounded = [contestant for contestant in contestants if contestant.opt in BOUNDED]
    titles = {column: title for column, title in PANELS.items() if bounded or column != "at_upper"}
    figure, axes = panels(len(titles), len(titles), 4.3, 4.2)
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        curves = [(c, *c.curve(column)) for c in (bounded if column == "at_upper" else contestants)]
        curves = [(contestant, epochs, values) for contestant, epochs, values in curves if len(epochs)]
        # A curve that explodes would flatten the others, and its band would cover them.
        firsts = [values[:, 0].mean() for _, _, values in curves]
        most = MOST_LOSS * min(firsts, default=math.inf) if column.endswith("loss") else math.inf
        for contestant, epochs, values in curves:
            axis.plot(epochs, values.mean(0), color=contestant.colour, lw=1.5, label=label(contestant.name))
            if len(values) >= LEAST_BAND and values.max() < most:
                intervals = np.array([mean_interval(at_epoch) for at_epoch in values.T])
                axis.fill_between(epochs, intervals[:, 1], intervals[:, 2], color=contestant.colour, alpha=0.18)
        axis.set(xlabel="epoch", title=title)
        if axis.get_ylim()[1] > most:
            axis.set_ylim(0, most)
        if not column.endswith("loss"):
            in_percent(axis)
            axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(5, len(contestants)))
    return figure


def plot_differences(results: StudyResults, baseline: Contestant) -> Figure:
    """Each contestant's final top-1 minus the baseline's: every seed, the mean, and the interval over seeds."""
    others = [c for c in results.contestants if c is not baseline and c.by_seed()]
    figure, axis = plt.subplots(figsize=(9, 1.4 + 0.45 * len(others)), layout="constrained")
    theirs = baseline.by_seed()
    means, reach = [], []
    for y, contestant in enumerate(others):
        ours = contestant.by_seed()
        each = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        interval = paired_difference(ours, theirs)
        axis.plot(each, [y] * len(each), "o", ms=4, color="tab:gray", alpha=0.6)
        if not math.isnan(interval.low):
            axis.plot([interval.low, interval.high], [y, y], color="tab:blue", lw=2)
        axis.plot(interval.mean, y, "D", color="tab:blue", ms=6)
        means.append(interval.mean)
        reach.append(np.nanmax(np.abs([*each, interval.low, interval.high])))
    axis.axvline(0, color="black", lw=1)
    usual = 1.1 * max((r for r in reach if r < OUT_OF_REACH * np.median(reach)), default=0.0)
    if usual < max(reach):  # a contestant that learned nothing would squeeze the others
        axis.set_xlim(-usual, usual)
        for y, mean in enumerate(means):
            if reach[y] > usual:
                x, side = (0.01, "left") if mean < 0 else (0.99, "right")
                axis.annotate(f"{100 * mean:+.0f}", (x, y), xycoords=("axes fraction", "data"), ha=side, va="center")
    axis.set_yticks(range(len(others)), [contestant.name for contestant in others])
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axis.set(xlabel=f"final test top-1 minus that of {baseline.name}, same seed, in points")
    axis.grid(alpha=0.3, axis="x")
    return figure


def plot_tuning(results: StudyResults) -> Figure | None:
    """Every tuning trial: top-1 on held-out pictures over each setting that is drawn; failed trials are at 0."""
    tuned = [contestant for contestant in results.contestants if contestant.ended_tuning]
    if not tuned:
        return None
    figure, axes = panels(len(results.searched), TUNING_WIDE, 3.4, 3, margin=0.9, sharey=True)
    for axis, (field, choice) in zip(axes, results.searched.items(), strict=True):
        drawn = [c for c in tuned if any(field in trial.columns for trial in c.ended_tuning)]
        choices = sorted({t.number(field) for c in drawn for t in c.tuning if field in t.columns}) if choice else []
        for number, contestant in enumerate(drawn):
            for trial in contestant.ended_tuning:
                x = trial.number(field)
                if choice:  # side by side around the choice, or contestants would hide one another
                    x = choices.index(x) + 0.6 * ((number + 0.5) / len(drawn) - 0.5)
                marker = "o" if trial.state == "done" else "x"
                axis.plot(x, trial.accuracy(), marker, color=contestant.colour, ms=6, alpha=0.8)
        if choice:
            axis.set_xticks(range(len(choices)), [f"{value:g}" for value in choices], fontsize=8)
        else:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel=field.replace("_", " "), ylim=(-0.02, None))
        in_percent(axis)
    figure.supylabel("top-1 on held-out pictures", fontsize=10)
    handles = [Line2D([], [], color=c.colour, marker="o", ls="", label=label(c.name)) for c in tuned]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(tuned)))
    return figure


def plot_tuning_effort(results: StudyResults) -> Figure | None:
    """How good the best of k tuning trials is on average; failed trials count as 0. None if no contestant has two."""
    tuned = [contestant for contestant in results.contestants if len(contestant.ended_tuning) > 1]
    if not tuned:
        return None
    figure, (axis,) = panels(1, 1, 7.5, 4.2)
    for contestant in tuned:
        best = expected_best([trial.accuracy() for trial in contestant.ended_tuning])
        axis.plot(range(1, len(best) + 1), best, "o-", ms=3, color=contestant.colour, label=label(contestant.name))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    in_percent(axis)
    axis.set(xlabel="tuning trials", ylabel="the best one's top-1 on held-out pictures", ylim=(0, None))
    axis.legend()
    return figure


def _steps_of(contestant: Contestant) -> tuple[list[dict[str, Any]], list[str], np.ndarray]:
    """The rows of its first final run that have step sizes, the kernels, and their median steps by epoch, (L, E)."""
    rows = [row for row in contestant.finals[0].epochs if "at_upper" in row] if contestant.finals else []
    columns = [column for column in rows[0] if column.startswith("step/")] if rows else []
    names = [column.removeprefix("step/") for column in columns]
    return rows, names, np.array([[row[column] for row in rows] for column in columns])


def plot_step_map(contestants: Sequence[Contestant]) -> Figure | None:
    """Each layer's median step over AdaBound's upper bound, by epoch: a panel for each contestant that has steps."""
    found = {c.name: of_it for c in contestants if (of_it := _steps_of(c))[0]}
    if not found:
        return None
    one_network = len({tuple(names) for _, names, _ in found.values()}) == 1
    figure, axes = panels(len(found), MAPS_WIDE, 3.4, 4.6, margin=0.9, sharey=one_network)
    for axis, (name, (rows, names, steps)) in zip(axes, found.items(), strict=True):
        powers = np.log10(steps / [row["step_upper"] for row in rows])
        extent = (rows[0]["epoch"] - 0.5, rows[-1]["epoch"] + 0.5, len(names) - 0.5, -0.5)
        image = axis.imshow(
            powers, cmap="RdBu_r", vmin=-DECADES, vmax=DECADES, aspect="auto", extent=extent, interpolation="nearest"
        )
        axis.grid(False)
        axis.set_title(name, fontsize=9)
        ticks = range(0, len(names), max(1, len(names) // 26))
        axis.set_yticks(list(ticks), [names[i] for i in ticks], fontsize=6)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("epoch", fontsize=9)
    ticks = range(-DECADES, DECADES + 1)
    bar = figure.colorbar(image, ax=axes, ticks=list(ticks), extend="both", label="median step over the upper bound")
    bar.ax.set_yticklabels([f"{10.0**tick:g}" for tick in ticks])
    return figure
