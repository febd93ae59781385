"""A training step and inference in all frameworks: `python -m experiments.bench step`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from experiments.bench.benchmark import NetworkBench, Table, ratios_to_best_torch, times
from experiments.bench.contestants import CONTESTANTS, TASKS, Case, ContestantName
from experiments.bench.turns import Result
from experiments.output.tables import Cell


@dataclasses.dataclass(frozen=True)
class StepBench(NetworkBench):
    """Time training steps and inference.

    Ratios are to the fastest form of PyTorch in the table. Memory is that of a contestant's process: the most it has
    held (libraries, weights, compilation), and the part of it that came after its libraries were imported.
    """

    contestants: tuple[ContestantName, ...] = tuple(name for name in CONTESTANTS if name != "jax.remat")
    """Who takes part."""
    steps: int = 3
    """Steps a turn, after a tenth of them, at least one, to warm up."""

    def tables(self, names: list[str], case: Case) -> Iterator[Table]:
        results = self.measure(names, case, rounds=self.rounds, steps=self.steps)
        seconds = {name: result.seconds for name, result in results.items()}
        yield Table(f"{case}, {TASKS[case.task]}", rows(results), ("median ms",), seconds)


def rows(results: dict[str, Result]) -> dict[str, dict[str, Cell]]:
    """The rows of a table; ratios are between medians of a round."""
    ratios = ratios_to_best_torch({name: np.median(result.seconds, 1) for name, result in results.items()})
    return {
        name: ({"ratio": ratios[name]} if ratios else {})
        | times(result.seconds)
        | {
            "first step s": result.first_step,
            "peak MB": result.peak_memory,
            "above libraries MB": result.above_libraries,
        }
        for name, result in results.items()
    }
