"""AdaBound's upper bound at the end of a run, divided by the step that Adam takes there.

The text of `experiments.report.sections.upper_bound_section` says how both are measured. If the ratio is far below 1,
AdaBound clips nearly all steps and is SGD with momentum at that rate; if it is far above 1, AdaBound is Adam, unless
the lower bound is above 1 as well.
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
NEAR = 1.5  # at most this far apart are the learning rates of two runs that are compared
PANELS = {"share": "final top-1 over Adam's", "train_loss": "final training loss"}


class Point(NamedTuple):
    """An AdaBound run: its final upper bound over an Adam run's median step, and what both runs reached.

    stage: of both runs. In tuning, top1 and adam_top1 are those of held-out pictures.
    lower_above: whether the lower bound ends above Adam's median step, too.
    """

    contestant: str
    stage: str
    ratio: float
    lower_above: bool
    top1: float
    adam_top1: float
    train_loss: float

    @property
    def share(self) -> float:
        return self.top1 / self.adam_top1


def upper_bound_points(results: StudyResults) -> list[Point]:
    """A point for each AdaBound run of a study that has an Adam run to compare with.

    The Adam run is of the same study, or of one that it is shown beside: the one with the nearest learning rate, at
    most a factor of NEAR away, and of these the one with the most settings in common.
    Left out: where Adam hardly learnt, and a learning rate above final_lr, which makes AdaBound SGD on purpose.
    """
    ended = [t for c in results.contestants for t in (*c.tuning, *c.final) if t.state == "done"]
    adams = [t for t in ended if t.opt == "adam" and _median_step(t) is not None]
    points = []
    for trial in results.trials:
        if trial.state != "done" or trial.opt != "adabound" or _rate(trial) > trial.config["settings"]["final_lr"]:
            continue
        alike = [a for a in adams if a.stage == trial.stage and _distance(trial, a)[0] <= math.log(NEAR)]
        adam = min(alike, key=lambda other: _distance(trial, other), default=None)
        if adam and _learnt(adam):
            lower, upper = (bound / _median_step(adam) for bound in _final_bounds(trial))
            accuracies = trial.accuracy(), adam.accuracy()
            loss = trial.epochs[-1]["train_loss"]
            points.append(Point(trial.columns["contestant"], trial.stage, upper, lower > 1, *accuracies, loss))
    return points


def _final_bounds(trial: Trial) -> tuple[float, float]:
    settings = trial.config["settings"]
    closed = settings["gamma"] * trial.epochs[-1]["step"]
    return settings["final_lr"] * closed / (closed + 1), settings["final_lr"] * (1 + 1 / closed)


def _learnt(trial: Trial) -> bool:
    """Whether it reaches four times the top-1 of guessing, or a half; a share of less than that shows nothing."""
    return trial.accuracy() >= min(4 / _classes(trial), 0.5)


def _classes(trial: Trial) -> int:
    return len(trial.config["input"]["class_names"])


def _rate(trial: Trial) -> float:
    return trial.config["settings"]["learning_rate"]


def _median_step(trial: Trial) -> float | None:
    steps = [value for column, value in trial.epochs[-1].items() if column.startswith("step/")]
    return float(np.median(steps)) if steps else None


def _distance(ours: Trial, theirs: Trial) -> tuple[float, int]:
    """How far their learning rate is from ours, as a ratio; then how many settings differ."""
    other = theirs.config["settings"]
    differ = sum(other.get(name) != value for name, value in ours.config["settings"].items())
    return abs(math.log(_rate(theirs) / _rate(ours))), differ


def plot_upper_bounds(studies: Sequence[StudyResults]) -> Figure | None:
    """Each AdaBound run by its ratio, a cross where the lower bound ends above 1, too. None without runs.

    The first study, those with as many classes, and those that vary final_lr or gamma stand out; the last are curves.
    The others are pale.
    """
    points = {study.name: found for study in studies if (found := upper_bound_points(study))}
    if not points:
        return None
    studies = [study for study in studies if study.name in points]
    by_loss = [study.name for study in studies if study.measure == "train_loss"]
    classes = [_classes(next(trial for trial in study.trials if trial.state == "done")) for study in studies]
    large = [study.name for study, number in zip(studies, classes, strict=True) if number == classes[0]]
    grids = [study.name for study in studies if any(c.labels.keys() & {"final_lr", "gamma"} for c in study.contestants)]
    shown = {name: title for name, title in PANELS.items() if name != "train_loss" or by_loss}
    figure, axes = panels(len(shown), 1, 6.4, 4.2)  # one below the other, so that a phone shows them
    for axis, (panel, title) in zip(axes, shown.items(), strict=True):
        for number, (name, of_study) in enumerate(points.items()):
            if panel == "train_loss" and name not in by_loss:
                continue
            strong = name in (*large, *grids)
            look = {"color": f"C{number % 10}", "ms": 7 if strong else 4, "alpha": 1 if strong else 0.4}
            look["zorder"] = 3 if name in large else 2
            within = sorted((p.ratio, getattr(p, panel)) for p in of_study if not p.lower_above)
            beyond = [(p.ratio, getattr(p, panel)) for p in of_study if p.lower_above]
            axis.plot(*np.reshape(beyond, (-1, 2)).T, "x", label="" if within else label(name), **look)
            if within:
                axis.plot(*np.transpose(within), "o-" if name in grids else "o", lw=1, label=label(name), **look)
        axis.axvline(1, color="black", lw=1, ls="--")
        axis.set(xscale="log", title=title, xlabel="AdaBound's final upper bound over Adam's median step")
        if panel != "train_loss":
            in_percent(axis)
            axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def upper_bound_rows(studies: Sequence[StudyResults]) -> list[dict[str, str]]:
    """A table row per study: the range of final top-1 in each band of the ratio, and that of the Adam runs beside."""
    rows = []
    for study in studies:
        points = [point for point in upper_bound_points(study) if point.stage == "final"]
        if not points:
            continue
        row = {"study": study.name}
        for low, high in BANDS:
            title = f"below {high:g}" if not low else f"above {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
            row[title] = _range([p.top1 for p in points if low <= p.ratio < high and not p.lower_above])
        row["both bounds above 1"] = _range([p.top1 for p in points if p.lower_above])
        rows.append(row | {"Adam beside": _range([p.adam_top1 for p in points], count=False)})
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
