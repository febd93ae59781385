"""What was compared, as a page with tables and plots."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.output.page import figure_bytes, html_figure, html_table, write_html
from experiments.parity.checks import BOUND_FLOAT64, GROWTH_BOUND, OWN_ERROR, Growth, Profile
from experiments.parity.errors import Row, columns
from experiments.parity.summary import Report

# torch_ref's errors are torchvision's to the bit: markers of different size show both.
STYLES = {
    OWN_ERROR: dict(color="black", marker=".", ms=3, zorder=3),
    "numpy": dict(color="tab:blue", marker="o", ms=3),
    "torch_ref": dict(color="tab:orange", marker="s", ms=5, markerfacecolor="none"),
    "torchvision": dict(color="tab:green", marker="x", ms=3),
}


def write_page(path: Path, report: Report) -> None:
    """Writes the page."""
    title = html.escape(report.title)
    parts = [f"<h1>{title}</h1><p>{html.escape(report.machine)}</p>"]
    parts += [f"<p>{html.escape(line)}.</p>" for line in report.conclusions]
    parts.append(
        "<p>Errors are relative to JAX: the largest difference over the largest entry, array by array; "
        "<em>where</em> names the array that has it.</p>"
    )
    for dtype in dict.fromkeys(profile.dtype for profile in report.profiles):
        of_dtype = [profile for profile in report.profiles if profile.dtype == dtype]
        caption = f"Error per layer along the network, {dtype}. Pale and dashed: evaluation."
        parts.append(_figure(plot_profiles(of_dtype), caption))
    if report.growths:
        caption = (
            "Trainings from the same weights on the same batches: how far each is from JAX's after every step, beside "
            "a training in JAX whose weights were moved by one unit in the last place (black)."
        )
        parts.append(_figure(plot_growths(report.growths), caption))
    parts += [f"<h2>{html.escape(name)}</h2>{_table(rows)}" for name, rows in report.tables.items() if rows]
    write_html(path, report.title, parts)


def _table(rows: Sequence[Row]) -> str:
    return html_table([{"": row.name} | columns(row) for row in rows], {"ok": "ok", "BROKEN": "BROKEN"})


def _figure(figure: Figure, caption: str) -> str:
    return html_figure(figure_bytes(figure, "svg"), caption)


def plot_profiles(profiles: Sequence[Profile]) -> Figure:
    """The errors of activations and of the parameters' gradients from the first layer to the last, of one dtype."""
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 6.4), layout="constrained")
    panels = {"activations": "activations", "gradients": "gradients of parameters"}
    for axis, (field, title) in zip(axes, panels.items(), strict=True):
        for profile in profiles:
            errors = getattr(profile, field)
            train = profile.mode == "train"
            style = STYLES[profile.framework] | (dict(ls="-", lw=1) if train else dict(ls="--", lw=0.7, alpha=0.6))
            if len(errors) > 60:  # parameters of all kinds in turn: lines between them would hide one another
                style |= dict(ls="", ms=0.6 * style["ms"])
            label = profile.framework if train else None
            axis.plot(range(len(errors)), _positive(errors.values()), label=label, **style)
        _mark_stages(axis, list(getattr(profiles[0], field)))
        if profiles[0].dtype == "float64":
            axis.axhline(BOUND_FLOAT64, color="tab:red", lw=1, label="bound")
        axis.set(yscale="log", title=title, ylabel="relative error")
        axis.grid(alpha=0.3)
    axes[0].legend(ncols=4, fontsize=8)
    return figure


def _positive(errors: Iterable[float]) -> np.ndarray:
    """Errors of 0 have no place on a logarithmic axis."""
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
    rows = -(-len(growths) // 2)
    figure, axes = plt.subplots(
        rows, 2, figsize=(6.4, 2.3 * rows + 0.5), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for axis in axes.flat[len(growths) :]:
        axis.set_axis_off()
    for axis, growth in zip(axes.flat, growths, strict=False):
        steps = range(1, len(growth.yardstick) + 1)
        axis.plot(steps, growth.yardstick, color="black", lw=1.5, label="JAX, weights moved by one unit")
        limit = GROWTH_BOUND * np.array(growth.yardstick)
        axis.plot(steps, limit, color="tab:red", lw=1, label=f"bound, {GROWTH_BOUND:.0f} times that")
        for name, distances in growth.distances.items():
            axis.plot(steps, distances, label=name, lw=1, **STYLES[name])
        axis.set(yscale="log", title=growth.optimizer)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("distance from JAX")
    for axis in axes.flat[max(0, len(growths) - 2) : len(growths)]:
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    return figure
