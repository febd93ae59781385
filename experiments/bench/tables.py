"""What the benchmarks measured, as they print it and as they write it to JSON."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from experiments.bench.processes import framework
from experiments.machine import processor
from experiments.malloc import describe_pages

Cell = float | str | tuple[float, float]  # a number, a word, or quartiles


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results.

    title: what was measured.
    rows: {name: {column: cell}}; a column's name ends with its unit. A row may lack columns.
    plotted: the columns to draw, side by side.
    seconds: {name: (rounds, steps)}, every time that was taken, for JSON.
    """

    title: str
    rows: dict[str, dict[str, Cell]]
    plotted: Sequence[str] = ()
    seconds: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        seconds = {name: np.asarray(times).tolist() for name, times in self.seconds.items()}
        return {"title": self.title, "rows": self.rows, "seconds": seconds}


def ratios_to_best_torch(seconds: dict[str, np.ndarray]) -> dict[str, float]:
    """Each contestant's time over that of the fastest form of PyTorch, the one with the smallest median.

    Args:
      seconds: by contestant's name, (rounds,).

    Returns:
      the median over rounds of the ratio within a round, by name; nothing where PyTorch took no part.
    """
    torch = [name for name in seconds if framework(name) == "torch"]
    if not torch:
        return {}
    best = min(torch, key=lambda name: np.median(seconds[name]))
    return {name: float(np.median(seconds[name] / seconds[best])) for name in seconds}


def times_in_ms(seconds: np.ndarray) -> dict[str, Cell]:
    """The median of any number of times and their quartiles."""
    low, middle, high = (float(t) for t in 1e3 * np.percentile(seconds, [25, 50, 75]))
    return {"median ms": middle, "quartiles ms": (low, high)}


def as_text(cell: Cell) -> str:
    """Three digits that say something: 0.05, 1.06, 15.3, 405, 1,234.

    >>> [as_text(cell) for cell in (0.049, 1.0649, 15.26, 404.6, 1234.5, (14.0, 130.2), "no")]
    ['0.05', '1.06', '15.3', '405', '1,234', '14.0-130', 'no']
    """
    if isinstance(cell, str):
        return cell
    if isinstance(cell, tuple):
        return "-".join(map(as_text, cell))
    decimals = 0 if abs(cell) >= 99.95 or isinstance(cell, int) else 1 if abs(cell) >= 9.995 else 2
    return f"{cell:,.{decimals}f}"


def print_table(rows: dict[str, dict[str, Cell]]) -> None:
    """Prints rows aligned; a column that nobody has is left out."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns]]
    lines += [[name, *(as_text(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("   ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip(), flush=True)


def describe_machine(packages: Sequence[str] = ("numpy", "jax", "torch", "torchvision")) -> str:
    """Processor, cores, pages and versions, in a line."""
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()}, {describe_pages()}; {', '.join(versions)}"
