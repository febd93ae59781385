"""The benchmarks' tables as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from experiments.bench.tables import Table, as_text

matplotlib.use("Agg")  # files only; no window system is needed


def plot_tables(path: Path, tables: Sequence[Table], title: str) -> None:
    """Draws a panel of bars per table, one group per row, one bar for each of its plotted columns."""
    heights = [max(2, len(table.rows) * max(1, len(table.plotted))) for table in tables]
    figure, axes = plt.subplots(
        len(tables),
        1,
        figsize=(9, 0.7 * len(tables) + 0.26 * sum(heights) + 0.6),
        layout="constrained",
        squeeze=False,
        gridspec_kw={"height_ratios": [h + 1.5 for h in heights]},
    )
    for axis, table in zip(axes[:, 0], tables, strict=True):
        _bars(axis, table)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: plt.Axes, table: Table) -> None:
    names = list(table.rows)
    height = 0.8 / max(1, len(table.plotted))
    for number, column in enumerate(table.plotted):
        values = [table.rows[name].get(column, np.nan) for name in names]
        places = np.arange(len(names)) + (number - (len(table.plotted) - 1) / 2) * height
        errors = None
        if column == "median ms":
            spread = np.array([table.rows[name].get("quartiles ms", (np.nan, np.nan)) for name in names]).T
            errors = np.abs(spread - np.array(values))
        bars = axis.barh(places, values, height, xerr=errors, label=column, error_kw={"alpha": 0.5})
        axis.bar_label(bars, ["" if np.isnan(v) else as_text(v) for v in values], padding=3, fontsize=8)
    axis.set_yticks(np.arange(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(table.title, fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    if len(table.plotted) == 1:
        axis.set_xlabel(table.plotted[0], fontsize=8)
    else:
        axis.legend(fontsize=8)
