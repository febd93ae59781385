"""The most memory that a step holds: `python -m experiments.bench memory`."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from typing import Annotated

import tyro

from experiments.bench.compile import CACHE_VARIABLES
from experiments.bench.contestants import CONTESTANTS, ContestantName, Task
from experiments.bench.options import NetworkSettings
from experiments.bench.results import Table
from experiments.bench.step import TASKS
from experiments.bench.turns import MakeStep, available, compete, started
from experiments.output.tables import Cell


@dataclasses.dataclass(frozen=True)
class MemoryBench(NetworkSettings):
    """Measure the peak memory of training steps and of inference, by batch size.

    On a CPU that is what a contestant's process has held at most above what it held with its libraries imported:
    weights, gradients, activations; JAX's program comes from a cache, and a column tells the peak with compiling. On a
    GPU it is what the framework has allocated there. Ratios are to torch, eager.
    """

    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N...")] = (1, 8, 32)
    """Images at a time, one table row for each."""
    contestants: tuple[ContestantName, ...] = ("jax", "numpy", "torch", "torch.channels_last")
    """Who takes part."""
    rounds: int = 3
    """Steps of each."""
    tasks: tuple[Task, ...] = ("training", "inference")
    """What is run."""

    def check(self) -> None:
        super().check()
        if not self.batch_size or min(self.batch_size) < 1:
            raise ValueError("--batch-size must be at least 1")


def run_memory_bench(bench: MemoryBench) -> Iterator[Table]:
    """A table each for training and inference, a row for each contestant and batch size."""
    names = available(bench.contestants)
    with tempfile.TemporaryDirectory() as cache:
        environment = {CACHE_VARIABLES["jax"]: cache}
        for task in bench.tasks:
            case = bench.case._replace(task=task)
            rows: dict[str, dict[str, Cell]] = {}
            for batch_size in bench.batch_size:
                used = {}
                for name in names:
                    make_step = functools.partial(CONTESTANTS[name], case._replace(batch_size=batch_size))
                    try:
                        if name == "jax":
                            compiling = _peak(name, make_step, 1, bench.threads, environment)
                        used[name] = _peak(name, make_step, bench.rounds, bench.threads, environment)
                    except ValueError:  # it failed, and has said so
                        continue
                for name, megabytes in used.items():
                    row = rows[f"{name}, batch {batch_size}"] = {}
                    if "torch" in used:
                        row["ratio"] = megabytes / used["torch"]
                    row["MB"] = megabytes
                    if name == "jax":
                        row["with compiling MB"] = compiling
            if not rows:
                raise ValueError("nobody is left to measure")
            size = f"{case.height}x{case.width}x{case.channels}"
            yield Table(f"{case.arch}, batches of {size}, {case.precision}, {TASKS[task]}", rows, ("MB",))


def _peak(name: str, make_step: MakeStep, rounds: int, threads: int, environment: dict[str, str]) -> float:
    """MB above what the process held with its libraries imported; on a GPU what is allocated there."""
    with started([name], threads, environment) as contestants:
        (result,) = compete(contestants, {name: make_step}, rounds, steps=1).values()
    return result.peak_memory - result.memory_before
