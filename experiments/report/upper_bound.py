"""AdaBound's upper bound at the end of a run, divided by the step that Adam takes there.

The text of `experiments.report.sections.upper_bound_section` says how both are measured. If the ratio is far below 1,
AdaBound clips nearly all steps and is SGD with momentum at that rate; if it is far above 1, AdaBound is Adam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.output.figures import in_percent, label, panels
from experiments.report.study_results import StudyResults, Trial

BANDS = ((0.0, 0.05), (0.05, 1.0), (1.0, math.inf))  # of the ratio
PANELS = {"top1": "final test top-1", "share": "final test top-1 over Adam's", "train_loss": "final training loss"}


class Point(NamedTuple):
    """An AdaBound run: its final upper bound over an Adam run's median step, and what both runs reached."""

    study: str
    ratio: float
    top1: float
    adam_top1: float
    train_loss: float

    @property
    def share(self) -> float:
        return self.top1 / self.adam_top1


def upper_bound_points(results: StudyResults) -> list[Point]:
    """A point for each final AdaBound run of a study that has an Adam run to compare with.

    A learning rate above final_lr turns AdaBound into SGD on purpose: such runs are left out.
    """
    final = [trial for trial in results.trials if trial.stage == "final" and trial.state == "done"]
    adams = [t for t in final if t.opt == "adam" and _median_step(t) is not None and t.accuracy() > 0]
    points = []
    for trial in final:
        settings = trial.config["settings"]
        if adams and trial.opt == "adabound" and settings["learning_rate"] <= settings["final_lr"]:
            adam = max(adams, key=lambda other: _settings_shared(trial, other))
            ratio = _final_upper_bound(trial) / _median_step(adam)
            loss = trial.epochs[-1]["train_loss"]
            points.append(Point(results.name, ratio, trial.accuracy(), adam.accuracy(), loss))
    return points


def _final_upper_bound(trial: Trial) -> float:
    settings = trial.config["settings"]
    return settings["final_lr"] * (1 + 1 / (settings["gamma"] * trial.epochs[-1]["step"]))


def _median_step(trial: Trial) -> float | None:
    steps = [value for column, value in trial.epochs[-1].items() if column.startswith("step/")]
    return float(np.median(steps)) if steps else None


def _settings_shared(ours: Trial, theirs: Trial) -> int:
    other = theirs.config["settings"]
    return sum(other.get(name) == value for name, value in ours.config["settings"].items())


def plot_upper_bounds(studies: Sequence[StudyResults]) -> Figure | None:
    """Each AdaBound run by its ratio; a study that varies final_lr or gamma as a curve. None without runs."""
    points = {study.name: found for study in studies if (found := upper_bound_points(study))}
    if not points:
        return None
    by_loss = [study.name for study in studies if study.measure == "train_loss" and study.name in points]
    grids = [study.name for study in studies if any(c.labels.keys() & {"final_lr", "gamma"} for c in study.contestants)]
    shown = {name: title for name, title in PANELS.items() if name != "train_loss" or by_loss}
    figure, axes = panels(len(shown), 1, 6.4, 4.2)  # one below the other, so that a phone shows them
    for axis, (panel, title) in zip(axes, shown.items(), strict=True):
        for number, (name, of_study) in enumerate(points.items()):
            if panel == "train_loss" and name not in by_loss:
                continue
            x, y = zip(*sorted((point.ratio, getattr(point, panel)) for point in of_study), strict=True)
            style, size = ("o-", 6) if name in grids else ("o", 4)
            axis.plot(x, y, style, ms=size, lw=1, color=f"C{number % 10}", label=label(name))
        axis.axvline(1, color="black", lw=1, ls="--")
        axis.set(xscale="log", title=title, xlabel="AdaBound's final upper bound over Adam's median step")
        if panel != "train_loss":
            in_percent(axis)
            axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def upper_bound_rows(studies: Sequence[StudyResults]) -> list[dict[str, str]]:
    """A table row per study: the range of final top-1 in each band of the ratio, and that of the Adam runs."""
    rows = []
    for study in studies:
        points = upper_bound_points(study)
        if not points:
            continue
        row = {"study": study.name}
        for low, high in BANDS:
            title = f"below {high:g}" if not low else f"above {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
            row[title] = _range([p.top1 for p in points if low <= p.ratio < high])
        rows.append(row | {"Adam": _range([p.adam_top1 for p in points], count=False)})
    return rows


def _range(values: Sequence[float], *, count: bool = True) -> str:
    """
    >>> _range([0.103, 0.123, 0.11]), _range([0.103]), _range([])
    ('10.3% to 12.3% (3)', '10.3% (1)', '')
    """
    if not values:
        return ""
    ends = dict.fromkeys(f"{value:.1%}" for value in (min(values), max(values)))
    return " to ".join(ends) + (f" ({len(values)})" if count else "")
