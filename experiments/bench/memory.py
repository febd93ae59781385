"""The most memory that a step holds: `python -m experiments.bench memory`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Annotated

import tyro

from experiments.bench.benchmark import NetworkBench, Table, times
from experiments.bench.compile import CACHE_VARIABLES
from experiments.bench.contestants import TASKS, Case, ContestantName
from experiments.bench.turns import NOBODY_LEFT, framework
from experiments.output.tables import Cell


@dataclasses.dataclass(frozen=True)
class MemoryBench(NetworkBench):
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

    def tables(self, names: list[str], case: Case) -> Iterator[Table]:
        """A row for each contestant and batch size; one contestant after the other, since together they hold much."""
        rows: dict[str, dict[str, Cell]] = {}
        with tempfile.TemporaryDirectory() as cache:
            for size in self.batch_size:
                of_size = {name: self._row(name, case._replace(batch_size=size), cache) for name in names}
                for name, row in of_size.items():
                    if row:
                        ratio = {"ratio": row["MB"] / of_size["torch"]["MB"]} if of_size.get("torch") else {}
                        rows[f"{name}, batch {size}"] = ratio | row
        if not rows:
            raise ValueError(NOBODY_LEFT)
        size = f"{case.height}x{case.width}x{case.channels}"
        yield Table(f"{case.arch}, batches of {size}, {case.precision}, {TASKS[case.task]}", rows, ("MB",))

    def _row(self, name: str, case: Case, cache: str) -> dict[str, Cell]:
        """Empty if the contestant fails, which it has printed."""
        options = dict(steps=1, environment={CACHE_VARIABLES["jax"]: cache})
        compiling = {}
        try:
            if framework(name) == "jax":
                result = self.measure([name], case, rounds=1, **options)[name]
                compiling["with compiling MB"] = result.above_libraries
            result = self.measure([name], case, rounds=self.rounds, **options)[name]
        except ValueError:
            return {}
        return {"MB": result.above_libraries} | compiling | times(result.seconds)
