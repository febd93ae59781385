"""Shows the comparison as a page with tables and plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.output.figures import panels
from experiments.output.page import Block, picture, table, write_html
from experiments.parity.checks import BOUND_FLOAT64, GROWTH_BOUND, OWN_ERROR, Growth, Profile
from experiments.parity.comparison import Report

# torch_ref and torchvision have exactly the same errors: markers of different size show both.
STYLES = {
    OWN_ERROR: dict(color="black", marker=".", ms=3, zorder=3),
    "numpy": dict(color="tab:blue", marker="o", ms=3),
    "torch_ref": dict(color="tab:orange", marker="s", ms=5, markerfacecolor="none"),
    "torchvision": dict(color="tab:green", marker="x", ms=3),
}


MARKS = {"ok": "ok", "BROKEN": "**BROKEN**"}


def write_page(path: Path, report: Report) -> None:
    """Writes the page."""
    head: list[Block] = [report.machine, *(f"{line}." for line in report.conclusions)]
    head.append(
        "Errors are relative to JAX: the largest difference divided by the largest entry, for each array. "
        "*where* names the array with the largest error."
    )
    for dtype in dict.fromkeys(profile.dtype for profile in report.profiles):
        of_dtype = [profile for profile in report.profiles if profile.dtype == dtype]
        caption = f"Errors along the network, {dtype}. Pale: evaluation."
        head.append(picture(dtype, caption, plot_profiles(of_dtype)))
    if report.growths:
        caption = (
            "Trainings from the same weights on the same batches: their distance from JAX's training after each step. "
            "Black: a training in JAX whose initial weights were moved by one unit in the last place."
        )
        head.append(picture("trainings", caption, plot_growths(report.growths)))
    tables = {
        title: [table([{"": row.name} | row.columns | {"verdict": MARKS.get(row.verdict, "-")} for row in rows])]
        for title, rows in report.tables.items()
        if rows
    }
    write_html(path, report.title, head, tables)


def plot_profiles(profiles: Sequence[Profile]) -> Figure:
    """The errors of activations and of parameters' gradients in one dtype, from the first layer to the last."""
    titles = {"activations": "activations", "gradients": "gradients of parameters"}
    figure, axes = panels(2, 1, 6.4, 3.2)
    for axis, (field, title) in zip(axes, titles.items(), strict=True):
        for profile in profiles:
            errors = getattr(profile, field)
            train = profile.mode == "train"
            style = STYLES[profile.framework] | (dict(ls="-", lw=1) if train else dict(ls="--", lw=0.7, alpha=0.6))
            if len(errors) > 60:  # parameters of all kinds alternate: lines would hide one another
                style |= dict(ls="", ms=0.6 * style["ms"])
            label = profile.framework if train else None
            axis.plot(range(len(errors)), _positive(errors.values()), label=label, **style)
        _mark_stages(axis, list(getattr(profiles[0], field)))
        if profiles[0].dtype == "float64":
            axis.axhline(BOUND_FLOAT64, color="tab:red", lw=1, label="bound")
        axis.set(yscale="log", title=title, ylabel="relative error")
    axes[0].legend(ncols=4, fontsize=8)
    return figure


def _positive(errors: Iterable[float]) -> np.ndarray:
    """Replaces errors of 0 by nan: a logarithmic axis has no 0."""
    errors = np.array(list(errors))
    return np.where(errors > 0, errors, np.nan)


def _mark_stages(axis: Axes, names: Sequence[str]) -> None:
    """Labels where each stage begins."""
    firsts = {}
    for position, name in enumerate(names):
        firsts.setdefault(name.split(".")[0], position)
    stages = {name: at for name, at in firsts.items() if name.startswith(("layer", "pool", "fc"))}
    axis.set_xticks(list(stages.values()), list(stages), fontsize=8, rotation=30)


def plot_growths(growths: Sequence[Growth]) -> Figure:
    """A panel per optimizer: the distance from JAX's training by step."""
    figure, axes = panels(len(growths), 2, 3.2, 2.3, margin=0.5, sharex=True, sharey=True)
    for number, (axis, growth) in enumerate(zip(axes, growths, strict=True)):
        steps = range(1, len(growth.yardstick) + 1)
        axis.plot(steps, growth.yardstick, color="black", lw=1.5, label="JAX, weights moved by one unit")
        limit = GROWTH_BOUND * np.array(growth.yardstick)
        axis.plot(steps, limit, color="tab:red", lw=1, label=f"bound, {GROWTH_BOUND:.0f} times the black line")
        for name, distances in growth.distances.items():
            axis.plot(steps, distances, label=name, lw=1, **STYLES[name])
        axis.set(yscale="log", title=growth.optimizer)
        if number % 2 == 0:
            axis.set_ylabel("distance from JAX")
        if number >= len(growths) - 2:
            axis.set_xlabel("step")
            axis.tick_params(labelbottom=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return figure
