"""How the benchmarks print what they measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from experiments.bench.processes import framework


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


def time_columns(seconds: np.ndarray, decimals: int) -> dict[str, str]:
    """The median of any number of times and their quartiles, in ms."""
    low, middle, high = (f"{t * 1e3:.{decimals}f}" for t in np.percentile(seconds, [25, 50, 75]))
    return {"median": middle, "quartiles": f"{low}-{high}"}


def print_table(rows: dict[str, dict[str, str]]) -> None:
    """Prints rows {name: {column: text}} aligned; a row may lack columns, and a column that nobody has is left out."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns], *([name, *(row.get(column, "") for column in columns)] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("   ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip())


def describe_machine(packages: Sequence[str] = ("numpy", "jax", "torch", "torchvision")) -> str:
    """Processor, cores and versions, in a line."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    return f"{model}, {os.cpu_count()} cores, {platform.system()}; {', '.join(versions)}"
