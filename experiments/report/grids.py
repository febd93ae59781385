"""Contestants that combine axes, as a grid: one half of the axes makes the rows, the other half the columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.report.analysis import paired_difference
from experiments.report.answer import percent, points
from experiments.report.study_results import Contestant


@dataclasses.dataclass(frozen=True)
class Grid:
    """The contestants of one block of a protocol.

    name: of the block.
    down, across: the axes, by name.
    rows, columns: their values, in the protocol's order.
    cells: the contestant of a row and a column.
    """

    name: str
    down: tuple[str, ...]
    across: tuple[str, ...]
    rows: list[tuple[str, ...]]
    columns: list[tuple[str, ...]]
    cells: dict[tuple[tuple[str, ...], tuple[str, ...]], Contestant]


def find_grids(contestants: Sequence[Contestant]) -> list[Grid]:
    """A grid for each block of a protocol with two axes or more; the first half of its axes goes across."""
    found: dict[str, list[Contestant]] = {}
    for contestant in contestants:
        if len(contestant.labels) > 1:
            found.setdefault(contestant.block, []).append(contestant)
    grids = []
    for block, members in found.items():
        axes = tuple(members[0].labels)
        across, down = axes[: len(axes) // 2], axes[len(axes) // 2 :]
        places = {tuple(tuple(c.labels[axis] for axis in part) for part in (down, across)): c for c in members}
        rows, columns = (list(dict.fromkeys(place[i] for place in places)) for i in range(2))
        grids.append(Grid(block, down, across, rows, columns, places))
    return grids


def label(axes: Sequence[str], values: Sequence[str]) -> str:
    """
    >>> label(("optimizer", "learning_rate"), ("Adam", "0.001"))
    'Adam, learning rate 0.001'
    """
    names = [f"{axis.replace('_', ' ')} " for axis in axes]
    return ", ".join(f"{name if v[0].isdigit() else ''}{v}" for name, v in zip(names, values, strict=True))


def grid_differences(grid: Grid) -> list[dict[str, str]]:
    """Each optimizer minus the first one of the axis "optimizer": a row for each combination of the other axes."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    first: dict[tuple[str, ...], Contestant] = {}
    for cell in grid.cells.values():
        if "optimizer" not in cell.labels:
            return []
        others = {axis: value for axis, value in cell.labels.items() if axis != "optimizer"}
        place = tuple(others.values())
        baseline = first.setdefault(place, cell)
        if cell is not baseline and cell.by_seed() and baseline.by_seed():
            column = f"{cell.labels['optimizer']} minus {baseline.labels['optimizer']}"
            row = rows.setdefault(place, {"": label(tuple(others), place)})
            row[column] = points(paired_difference(cell.by_seed(), baseline.by_seed()))
    # The first row of a table names its columns, so it must be a complete one.
    return sorted(rows.values(), key=len, reverse=True)


def plot_grid(grid: Grid) -> Figure:
    """Final top-1, the mean over seeds and its interval; cells without ended runs (not all are) stay empty."""
    values = np.full((len(grid.rows), len(grid.columns)), np.nan)
    for (row, column), contestant in grid.cells.items():
        values[grid.rows.index(row), grid.columns.index(column)] = contestant.interval().mean
    size = (3.5 + 1.7 * len(grid.columns), 1.6 + 0.5 * len(grid.rows))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(values, cmap="viridis", aspect="auto", vmin=0)
    axis.set_xticks(range(len(grid.columns)), [label(grid.across, c).replace(", ", "\n") for c in grid.columns])
    axis.set_yticks(range(len(grid.rows)), [label(grid.down, row) for row in grid.rows])
    middle = np.nanmax(values) / 2
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            contestant = grid.cells[grid.rows[i], grid.columns[j]]
            failed = f"\n{len(contestant.failed)} failed" if contestant.failed else ""
            text = percent(contestant.interval()).replace(" (", "\n(") + failed
            axis.text(j, i, text, ha="center", va="center", color="white" if value < middle else "black", fontsize=9)
    figure.colorbar(image, format=PercentFormatter(1.0), label="final test top-1")
    return figure
