"""The most memory that a step holds: `python -m experiments.bench memory`."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from typing import Annotated

import tyro

from experiments.bench.benchmark import BenchSettings, Table, times
from experiments.bench.compile import CACHE_VARIABLES
from experiments.bench.contestants import CONTESTANTS, TASKS, Case, ContestantName, Task
from experiments.bench.turns import NOBODY_LEFT, Result, available, framework, measure
from experiments.output.tables import Cell


@dataclasses.dataclass(frozen=True)
class MemoryBench(BenchSettings):
    """Measure the peak memory of training steps and of inference, by batch size, and their time.

    On a CPU the peak is what a contestant's process has held at most above what it held with its libraries imported:
    weights, gradients, activations. JAX's program comes from a cache; a column has the peak with compilation. On a GPU
    it is what the framework has allocated there. Ratios are to torch, eager. "jax.remat" recomputes each block in the
    backward pass, as --remat does in experiments.cars.
    """

    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N...")] = (1, 8, 32)
    """Images at a time, one table row for each."""
    contestants: tuple[ContestantName, ...] = ("jax", "jax.remat", "numpy", "torch", "torch.channels_last")
    """Who takes part."""
    rounds: int = 3
    """Steps of each."""
    tasks: tuple[Task, ...] = ("training", "inference")
    """What is run."""

    def run(self) -> Iterator[Table]:
        """A table each for training and inference, a row for each contestant and batch size."""
        names = available(self.contestants)
        with tempfile.TemporaryDirectory() as cache:
            for task in self.tasks:
                case = self.case._replace(task=task)
                rows: dict[str, dict[str, Cell]] = {}
                for size in self.batch_size:
                    of_size = {}
                    for name in names:
                        if row := self._row(name, case._replace(batch_size=size), cache):
                            of_size[name] = row
                    for name, row in of_size.items():
                        ratio = {"ratio": row["MB"] / of_size["torch"]["MB"]} if "torch" in of_size else {}
                        rows[f"{name}, batch {size}"] = ratio | row
                if not rows:
                    raise ValueError(NOBODY_LEFT)
                size = f"{case.height}x{case.width}x{case.channels}"
                yield Table(f"{case.arch}, batches of {size}, {case.precision}, {TASKS[task]}", rows, ("MB",))

    def _row(self, name: str, case: Case, cache: str) -> dict[str, Cell]:
        """Empty if the contestant fails, which it has printed."""
        make_step = functools.partial(CONTESTANTS[name], case)

        def result(rounds: int) -> Result:
            return measure({name: make_step}, rounds, 1, self.threads, {CACHE_VARIABLES["jax"]: cache})[name]

        compiling = {}
        try:
            if framework(name) == "jax":
                compiling["with compiling MB"] = megabytes(result(1))
            measured = result(self.rounds)
        except ValueError:
            return {}
        return {"MB": megabytes(measured)} | compiling | times(measured.seconds)


def megabytes(result: Result) -> float:
    """Above what the process held with its libraries imported; on a GPU what is allocated there."""
    return result.peak_memory - result.memory_before
