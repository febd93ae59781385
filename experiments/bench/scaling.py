"""How a training step grows with batch, pictures, depth and devices: `python -m experiments.bench scaling`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np

from experiments.bench.benchmark import NetworkBench, Table, ratios_to_best_torch
from experiments.bench.contestants import TASKS, Case, Task
from experiments.bench.turns import Result
from experiments.cli import Arch
from experiments.output.tables import Cell

Axis = Literal["batch-size", "image-size", "depth", "devices"]
GROWTH: dict[Axis, list[dict[str, Any]]] = {  # what is replaced in the case, row by row
    "batch-size": [{"batch_size": size} for size in (1, 2, 4, 8, 16, 32)],
    "image-size": [{"height": side, "width": side} for side in (64, 96, 128, 160, 224)],
    "depth": [{"arch": arch} for arch in get_args(Arch)],
    "devices": [{"devices": count} for count in (1, 2, 4)],
}
VIRTUAL = "--xla_force_host_platform_device_count={}"  # of a CPU


@dataclasses.dataclass(frozen=True)
class ScalingBench(NetworkBench):
    """Time a training step (or inference) while one thing grows: batch size, image size, depth, devices.

    The rest stays what the flags say. Ratios are to the fastest form of PyTorch in the row. Devices are for JAX alone,
    which splits one batch among them. On a CPU they are virtual and share its cores, so their table shows the cost of
    splitting.
    """

    over: tuple[Axis, ...] = get_args(Axis)
    """What grows, a table each."""
    tasks: tuple[Task, ...] = ("training",)
    """What is run."""
    rounds: int = 5
    """The contestants take turns this often."""
    steps: int = 1
    """Steps a turn, after one to warm up."""

    def tables(self, names: list[str], case: Case) -> Iterator[Table]:
        for axis in self.over:
            taking_part = [name for name in names if axis != "devices" or name == "jax"]
            if not taking_part:
                continue
            rows, seconds = {}, {}
            for change in GROWTH[axis]:
                grown = case._replace(**change)
                flags = os.environ.get("XLA_FLAGS", "")
                environment = {"XLA_FLAGS": f"{flags} {VIRTUAL.format(grown.devices)}".strip()} if grown.devices else {}
                try:
                    results = self.measure(
                        taking_part, grown, rounds=self.rounds, steps=self.steps, environment=environment
                    )
                except ValueError:  # too large for all of them, too small, or indivisible, and each has said so
                    continue
                label = f"{axis.replace('-', ' ')} {'x'.join(map(str, change.values()))}"
                rows[label] = row_of(grown, results)
                seconds |= {f"{label}, {name}": result.seconds for name, result in results.items()}
            plotted = [f"{name} images/s" for name in taking_part]
            yield Table(f"{case}, {TASKS[case.task]}: {axis}", rows, plotted, seconds)


def row_of(case: Case, results: dict[str, Result]) -> dict[str, Cell]:
    """Ratios to the fastest form of PyTorch, medians and images/s, by contestant."""
    ratios = ratios_to_best_torch({name: np.median(result.seconds, 1) for name, result in results.items()})
    row: dict[str, Cell] = {f"{name} ratio": ratio for name, ratio in ratios.items() if name != "torch"}
    for name, result in results.items():
        median = float(np.median(result.seconds))
        row |= {f"{name} ms": 1e3 * median, f"{name} images/s": case.batch_size / median}
    return row
