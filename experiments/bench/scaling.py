"""How a training step grows with batch, pictures, depth and devices: `python -m experiments.bench scaling`."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from experiments.bench.benchmark import BenchSettings, Table, ratios_to_best_torch
from experiments.bench.contestants import CONTESTANTS, TASKS, Case, ContestantName, Task, jax_step
from experiments.bench.turns import Result, available, measure
from experiments.cli import Arch
from experiments.output.tables import Cell

Axis = Literal["batch-size", "image-size", "depth", "devices"]
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
IMAGE_SIZES = (64, 96, 128, 160, 224)
ARCHS = get_args(Arch)
DEVICES = (1, 2, 4)
VIRTUAL = "--xla_force_host_platform_device_count={}"  # of a CPU


@dataclasses.dataclass(frozen=True)
class ScalingBench(BenchSettings):
    """Time a training step (or inference) while one thing grows: batch size, image size, depth, devices.

    The rest stays what the flags say; pictures larger than --image-size come in batches of 4. Ratios are to the fastest
    form of PyTorch in the row. Devices are for JAX alone, which splits one batch among them. On a CPU they are virtual
    and share its cores, so their table shows the cost of splitting.
    """

    over: tuple[Axis, ...] = ("batch-size", "image-size", "depth", "devices")
    """What grows, a table each."""
    contestants: tuple[ContestantName, ...] = ("jax", "torch")
    """Who takes part."""
    task: Task = "training"
    """What is run."""
    rounds: int = 5
    """The contestants take turns this often."""
    steps: int = 1
    """Steps a turn, after one to warm up."""

    def run(self) -> Iterator[Table]:
        """A table for each of self.over."""
        base = self.case._replace(task=self.task)
        names = available(self.contestants)
        for axis in self.over:
            if axis == "devices":
                if "jax" in names:
                    yield self._devices_table(base)
                continue
            rows, seconds = {}, {}
            for label, case in cases(base, axis):
                make_steps = {name: functools.partial(CONTESTANTS[name], case) for name in names}
                try:
                    results = measure(make_steps, self.rounds, self.steps, self.threads)
                except ValueError:  # too large for all of them, or too small, and each has said so
                    continue
                rows[label] = row_of(case, results)
                seconds |= {f"{label}, {name}": result.seconds for name, result in results.items()}
            yield Table(f"{base}, {TASKS[base.task]}: {axis}", rows, [f"{name} images/s" for name in names], seconds)

    def _devices_table(self, base: Case) -> Table:
        """One batch on 1, 2, 4 devices: the machine's, or virtual ones of the CPU."""
        rows: dict[str, dict[str, Cell]] = {}
        all_seconds = {}
        for count in DEVICES:
            if base.batch_size % count:
                print(f"left out: {count} devices, which do not divide a batch of {base.batch_size}")
                continue
            environment = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {VIRTUAL.format(count)}".strip()}
            make_steps = {"jax": functools.partial(jax_step, base, devices=count)}
            try:
                results = measure(make_steps, self.rounds, self.steps, self.threads, environment)
            except ValueError:  # a GPU cannot act as several, and has said so
                continue
            name = f"{count} device{'s' if count > 1 else ''}"
            row = row_of(base, results)
            one = rows.get("1 device", row)["jax ms"]
            rows[name] = {"to one device": row["jax ms"] / one} | row
            all_seconds[name] = results["jax"].seconds
        return Table(f"{base}, {TASKS[base.task]}: devices that share the batch", rows, ("jax images/s",), all_seconds)


def row_of(case: Case, results: dict[str, Result]) -> dict[str, Cell]:
    """Ratios to the fastest form of PyTorch, medians and images/s, by contestant."""
    seconds = {name: np.median(result.seconds, 1) for name, result in results.items()}
    ratios = ratios_to_best_torch(seconds)
    row: dict[str, Cell] = {f"{name} ratio": ratios[name] for name in seconds if name in ratios and name != "torch"}
    for name, result in results.items():
        median = float(np.median(result.seconds))
        row |= {f"{name} ms": 1e3 * median, f"{name} images/s": case.batch_size / median}
    return row


def cases(base: Case, axis: Axis) -> Sequence[tuple[str, Case]]:
    """The rows' names, and what is measured for each."""
    match axis:
        case "batch-size":
            return [(f"batch {size}", base._replace(batch_size=size)) for size in BATCH_SIZES]
        case "image-size":
            few = min(4, base.batch_size)
            return [
                (f"{size}x{size}, batch {batch_size}", base._replace(height=size, width=size, batch_size=batch_size))
                for size in IMAGE_SIZES
                for batch_size in [base.batch_size if size**2 <= base.height * base.width else few]
            ]
        case _:
            return [(arch, base._replace(arch=arch)) for arch in ARCHS]
