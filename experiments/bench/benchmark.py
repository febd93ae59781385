"""What all benchmarks share: settings, tables of results, and the ratios and times in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.bench.contestants import Case, Precision
from experiments.bench.turns import framework
from experiments.cli import Arch, check_output_file, parse_image_size
from experiments.machine import cores
from experiments.output.tables import Cell


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results.

    title: what was measured.
    rows: {name: {column: cell}}; a column's name ends with its unit, if any. A row may lack columns.
    seconds: {name: (rounds, steps)}, every measured time, for JSON.
    """

    title: str
    rows: dict[str, dict[str, Cell]]
    seconds: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        seconds = {name: np.asarray(times).tolist() for name, times in self.seconds.items()}
        return {"title": self.title, "rows": self.rows, "seconds": seconds}


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """The settings that all benchmarks share; each benchmark has its own defaults."""

    arch: Arch = "resnet101"
    """The network."""
    batch_size: int = 8
    """Images in a batch."""
    image_size: str = "96"
    """The side of a square, or HEIGHTxWIDTH."""
    precision: Precision = "float32"
    """The type of images, kernels and activations in the network; stored parameters and statistics stay float32."""
    rounds: int = 7
    """How often the contestants take turns."""
    threads: int = dataclasses.field(default_factory=cores)
    """Cores for each contestant [default: all]."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write all tables and measured times to this file."""

    def check(self) -> None:
        """Raises a ValueError for settings that make no sense."""
        for name, value in dataclasses.asdict(self).items():
            flag = f"--{name.replace('_', '-')}"
            values = value if isinstance(value, tuple) else (value,)
            if not values or len(set(values)) < len(values):
                got = " ".join(map(str, values)) or "nothing"
                raise ValueError(f"{flag} takes one or more values, each once, got {got}")
            for number in values:
                if type(number) is int and number < 1:
                    raise ValueError(f"{flag} must be at least 1, got {number}")
        if self.json is not None:
            check_output_file("--json", self.json)
        if self.threads > cores():
            raise ValueError(f"--threads {self.threads}: there are {cores()} cores to use")
        parse_image_size(self.image_size)

    @property
    def case(self) -> Case:
        """The network and its input, for training."""
        return Case(self.arch, self.batch_size, *parse_image_size(self.image_size), precision=self.precision)

    def run(self) -> Iterator[Table]:
        """Measures, and yields each table as soon as it is complete."""
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """The settings that affect a measurement, by field name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "json"}

    def __str__(self) -> str:
        words = {name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in self.as_json().items()}
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in words.items())


def ratios_to_best_torch(seconds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Each contestant's time relative to the fastest mode of PyTorch, the one with the smallest median.

    Args:
      seconds: by contestant's name, (rounds,).

    Returns:
      the median over rounds of the ratio within a round, by name; {} if PyTorch did not take part.
    """
    torch = [name for name in seconds if framework(name) == "torch"]
    if not torch:
        return {}
    best = min(torch, key=lambda name: np.median(seconds[name]))
    return {name: float(np.median(seconds[name] / seconds[best])) for name in seconds}


def times(seconds: np.ndarray) -> dict[str, Cell]:
    """The median and the quartiles of all seconds in an array, in ms."""
    low, middle, high = (float(t) for t in 1e3 * np.percentile(seconds, [25, 50, 75]))
    return {"median ms": middle, "quartiles ms": (low, high)}
