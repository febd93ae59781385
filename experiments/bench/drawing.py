"""The benchmarks' tables as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from experiments.bench.benchmark import Table
from experiments.output.figures import save
from experiments.output.tables import as_text


def plot_tables(path: Path, tables: Sequence[Table], title: str) -> None:
    """Draws a panel of bars per table, one group per row, one bar for each of its plotted columns."""
    columns = 1 if len(tables) <= 4 else 3
    panels = max(len(table.rows) * len(table.plotted) for table in tables)
    rows = -(-len(tables) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(9 if columns == 1 else 18, 0.6 + rows * (0.9 + 0.24 * panels)), layout="constrained"
    )
    axes = np.atleast_1d(axes).ravel()
    for axis, table in zip(axes, tables, strict=False):
        _bars(axis, table)
    for axis in axes[len(tables) :]:
        axis.set_axis_off()
    figure.suptitle(textwrap.fill(title, 110 * columns), fontsize=9)
    save(figure, path)


def _bars(axis: plt.Axes, table: Table) -> None:
    names = list(table.rows)
    height = 0.8 / max(1, len(table.plotted))
    for number, column in enumerate(table.plotted):
        values = [table.rows[name].get(column, np.nan) for name in names]
        places = np.arange(len(names)) + (number - (len(table.plotted) - 1) / 2) * height
        errors = None
        if column.startswith("median "):
            quartiles = column.replace("median", "quartiles")
            spread = np.array([table.rows[name].get(quartiles, (np.nan, np.nan)) for name in names]).T
            errors = np.abs(spread - np.array(values))
        bars = axis.barh(places, values, height, xerr=errors, label=column, error_kw={"alpha": 0.5})
        axis.bar_label(bars, ["" if np.isnan(v) else as_text(v) for v in values], padding=3, fontsize=8)
    axis.set_yticks(np.arange(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(table.title + ("\n" if len(table.plotted) > 1 else ""), fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    if len(table.plotted) == 1:
        axis.set_xlabel(table.plotted[0], fontsize=8)
    else:
        axis.legend(
            fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(table.plotted), frameon=False, borderpad=0
        )
