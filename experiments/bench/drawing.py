"""The benchmarks' tables as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.bench.benchmark import Table
from experiments.output.figures import panels, save
from experiments.output.tables import as_text


def plot_tables(path: Path, tables: Sequence[Table], title: str) -> None:
    """Draws a panel of bars per table, with a group per row and a bar per plotted column."""
    columns, width = (1, 9) if len(tables) <= 4 else (3, 6)
    bars = max(len(table.rows) * len(table.plotted) for table in tables)
    figure, axes = panels(len(tables), columns, width, 0.9 + 0.24 * bars, margin=0.6)
    for axis, table in zip(axes, tables, strict=True):
        _bars(axis, table)
    figure.suptitle(textwrap.fill(title, 110 * columns), fontsize=9)
    save(figure, path)


def _bars(axis: Axes, table: Table) -> None:
    axis.grid(False)
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
    axis.set_title(f"{table.title}\n", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    place = dict(loc="lower right", bbox_to_anchor=(1, 1), ncols=max(1, len(table.plotted)))
    axis.legend(fontsize=8, frameon=False, borderpad=0, **place)
