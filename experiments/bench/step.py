"""A training step and inference in all frameworks: `python -m experiments.bench step`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from experiments.bench.benchmark import BenchSettings, Table, ratios_to_best_torch, times
from experiments.bench.contestants import CONTESTANTS, TASKS, Case, ContestantName
from experiments.bench.turns import Result, available, measure
from experiments.cli import Arch
from experiments.output.tables import Cell

CASES = (Case("resnet101", 8, 96, 96), Case("resnet18", 32, 64, 64))


@dataclasses.dataclass(frozen=True)
class StepBench(BenchSettings):
    """Time training steps and inference; without --arch in two cases: ResNet-101 (8 of 96x96), ResNet-18 (32 of 64x64).

    Ratios are to the fastest form of PyTorch in the table. Memory is that of a contestant's process: the most it has
    held (libraries, weights, compilation), and the part of it that came after its libraries were imported.
    """

    arch: Arch | None = None
    """The network, in place of the two cases."""
    batch_size: int | None = None
    """With --arch [default: 8]."""
    image_size: str | None = None
    """With --arch: a side, or HEIGHTxWIDTH [default: 96]."""
    contestants: tuple[ContestantName, ...] = tuple(name for name in CONTESTANTS if name != "jax.remat")
    """Who takes part."""
    steps: int = 3
    """Steps a turn, after a tenth of them, at least one, to warm up."""

    def check(self) -> None:
        if self.arch is None and (self.batch_size, self.image_size) != (None, None):
            raise ValueError("--batch-size and --image-size go with --arch")
        BenchSettings.check(self._with_defaults())

    def _with_defaults(self) -> StepBench:
        """With values in place of the defaults that depend on --arch."""
        batch_size = 8 if self.batch_size is None else self.batch_size
        arch, image_size = self.arch or "resnet101", self.image_size or "96"
        return dataclasses.replace(self, arch=arch, batch_size=batch_size, image_size=image_size)

    def run(self) -> Iterator[Table]:
        """Two tables per case: training and inference. Each has new processes, since peaks of memory only grow."""
        names = available(self.contestants)
        cases = [case._replace(precision=self.precision) for case in CASES]
        for case in cases if self.arch is None else [self._with_defaults().case]:
            for task, contents in TASKS.items():
                make_steps = {name: functools.partial(CONTESTANTS[name], case._replace(task=task)) for name in names}
                results = measure(make_steps, self.rounds, self.steps, self.threads)
                seconds = {name: result.seconds for name, result in results.items()}
                yield Table(f"{case}, {contents}", rows(results), ("median ms",), seconds)


def rows(results: dict[str, Result]) -> dict[str, dict[str, Cell]]:
    """The rows of a table; ratios are between medians of a round."""
    ratios = ratios_to_best_torch({name: np.median(result.seconds, 1) for name, result in results.items()})
    rows = {}
    for name, result in results.items():
        rows[name] = {"ratio": ratios[name]} if ratios else {}
        rows[name] |= times(result.seconds)
        rows[name]["first step s"] = result.first_step
        rows[name]["peak MB"] = result.peak_memory
        rows[name]["above libraries MB"] = result.peak_memory - result.memory_before
    return rows
