"""A training step and inference in all frameworks: `python -m experiments.bench step`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from experiments.bench.contestants import CONTESTANTS, Case, ContestantName
from experiments.bench.options import NetworkSettings
from experiments.bench.results import Table, ratios_to_best_torch, times_in_ms
from experiments.bench.turns import Result, available, compete, started
from experiments.cli import Arch
from experiments.output.tables import Cell

CASES = (Case("resnet101", 8, 96, 96), Case("resnet18", 32, 64, 64))
TASKS = {"training": "training step: loss, gradients, running statistics", "inference": "inference: logits"}


@dataclasses.dataclass(frozen=True)
class StepBench(NetworkSettings):
    """Time training steps and inference; without --arch in two cases: ResNet-101 (8 of 96x96), ResNet-18 (32 of 64x64).

    Ratios are to the fastest form of PyTorch in the table. Memory is that of a contestant's process: the most it has
    held, libraries, weights, compiling and all, and what of it came after its libraries were imported.
    """

    arch: Arch | None = None
    """The network, instead of the two cases."""
    batch_size: int | None = None
    """With --arch [default: 8]."""
    image_size: str | None = None
    """With --arch: a side, or HEIGHTxWIDTH [default: 96]."""
    contestants: tuple[ContestantName, ...] = tuple(CONTESTANTS)
    """Who takes part."""
    steps: int = 3
    """Steps a turn, after a tenth of them, at least one, to warm up."""

    def check(self) -> None:
        if self.arch is None and (self.batch_size, self.image_size) != (None, None):
            raise ValueError("--batch-size and --image-size go with --arch")
        NetworkSettings.check(_whole(self))

    @property
    def cases(self) -> tuple[Case, ...]:
        if self.arch is None:
            return tuple(case._replace(precision=self.precision) for case in CASES)
        return (_whole(self).case,)


def run_step_bench(bench: StepBench) -> Iterator[Table]:
    """Two tables per case: training and inference."""
    names = available(bench.contestants)
    for case in bench.cases:
        for task, contents in TASKS.items():
            make_steps = {name: functools.partial(CONTESTANTS[name], case._replace(task=task)) for name in names}
            with started(names, bench.threads) as contestants:  # new processes for each: peaks of memory only grow
                results = compete(contestants, make_steps, bench.rounds, bench.steps)
            yield Table(
                f"{case}, {contents}", rows(results), ("median ms",), {n: r.seconds for n, r in results.items()}
            )


def rows(results: dict[str, Result]) -> dict[str, dict[str, Cell]]:
    """The rows of a table; ratios are between medians of a round."""
    ratios = ratios_to_best_torch({name: np.median(result.seconds, 1) for name, result in results.items()})
    rows = {}
    for name, result in results.items():
        rows[name] = {"ratio": ratios[name]} if ratios else {}
        rows[name] |= times_in_ms(result.seconds)
        rows[name]["first step s"] = result.first_step
        rows[name]["peak MB"] = result.peak_memory
        rows[name]["above libraries MB"] = result.peak_memory - result.memory_before
    return rows


def _whole(bench: StepBench) -> StepBench:
    """With values in place of the defaults that depend on --arch."""
    return dataclasses.replace(
        bench,
        arch=bench.arch or "resnet101",
        batch_size=8 if bench.batch_size is None else bench.batch_size,
        image_size=bench.image_size or "96",
    )
