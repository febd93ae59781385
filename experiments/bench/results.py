"""What the benchmarks measured, as they print it and as they write it to JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from experiments.bench.turns import framework
from experiments.output.tables import Cell


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


def times(seconds: np.ndarray, unit: Literal["ms", "us"] = "ms") -> dict[str, Cell]:
    """The median of any number of times and their quartiles."""
    scale = {"ms": 1e3, "us": 1e6}[unit]
    low, middle, high = (float(t) for t in scale * np.percentile(seconds, [25, 50, 75]))
    return {f"median {unit}": middle, f"quartiles {unit}": (low, high)}
