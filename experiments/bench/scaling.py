"""How a training step grows with batch, pictures, depth and devices: `python -m experiments.bench scaling`."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from experiments.bench.contestants import CONTESTANTS, Case, ContestantName, Task, jax_step
from experiments.bench.options import NetworkSettings
from experiments.bench.results import Table, ratios_to_best_torch
from experiments.bench.step import TASKS
from experiments.bench.turns import MakeStep, available, compete, started
from experiments.cli import Arch
from experiments.output.tables import Cell

Axis = Literal["batch-size", "image-size", "depth", "devices"]
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
IMAGE_SIZES = (64, 96, 128, 160, 224)
ARCHS = get_args(Arch)
DEVICES = (1, 2, 4)
VIRTUAL = "--xla_force_host_platform_device_count={}"  # of a CPU


@dataclasses.dataclass(frozen=True)
class ScalingBench(NetworkSettings):
    """Time a training step (or inference) while one thing grows: batch size, image size, depth, devices.

    The rest stays what the flags say; pictures larger than --image-size come in batches of 4. Ratios are to the fastest
    form of PyTorch in the row. Devices are JAX's alone: one batch shared among them, which on a CPU are virtual ones
    that share the same cores, so that the figure to look at is what sharing costs.
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


def run_scaling_bench(bench: ScalingBench) -> Iterator[Table]:
    """A table for each of bench.over."""
    base = bench.case._replace(task=bench.task)
    names = available(bench.contestants)
    if not names:
        raise ValueError("nobody is left to measure")
    for axis in bench.over:
        if axis == "devices":
            if "jax" in names:
                yield _devices_table(bench, base)
            continue
        rows, seconds = {}, {}
        for label, case in cases(base, axis):
            make_steps = {name: functools.partial(CONTESTANTS[name], case) for name in names}
            try:
                row, times = _row(bench, case, make_steps)
            except ValueError:  # too large for all of them, or too small, and each has said so
                continue
            rows[label] = row
            seconds |= {f"{label}, {name}": t for name, t in times.items()}
        yield Table(f"{base}, {TASKS[base.task]}: {axis}", rows, [f"{name} images/s" for name in names], seconds)


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


def _row(
    bench: ScalingBench, case: Case, make_steps: dict[str, MakeStep]
) -> tuple[dict[str, Cell], dict[str, np.ndarray]]:
    with started(list(make_steps), bench.threads) as contestants:
        results = compete(contestants, make_steps, bench.rounds, bench.steps)
    seconds = {name: np.median(result.seconds, 1) for name, result in results.items()}
    ratios = ratios_to_best_torch(seconds)
    row: dict[str, Cell] = {f"{name} ratio": ratios[name] for name in seconds if name in ratios and name != "torch"}
    for name, times in seconds.items():
        row[f"{name} ms"] = 1e3 * float(np.median(times))
        row[f"{name} images/s"] = case.batch_size / float(np.median(times))
    return row, {name: result.seconds for name, result in results.items()}


def _devices_table(bench: ScalingBench, base: Case) -> Table:
    """One batch on 1, 2, 4 devices: those that there are, or virtual ones of the CPU."""
    rows: dict[str, dict[str, Cell]] = {}
    all_seconds = {}
    for count in DEVICES:
        if base.batch_size % count:
            print(f"left out: {count} devices, which do not divide a batch of {base.batch_size}")
            continue
        flags = f"{os.environ.get('XLA_FLAGS', '')} {VIRTUAL.format(count)}".strip()
        with started(["jax"], bench.threads, {"XLA_FLAGS": flags}) as contestants:
            make_step = functools.partial(jax_step, base, devices=count)
            try:
                results = compete(contestants, {"jax": make_step}, bench.rounds, bench.steps)
            except ValueError:  # a GPU is no CPU that can be several; it has said so
                continue
        seconds = results["jax"].seconds
        name = f"{count} device{'s' if count > 1 else ''}"
        median = float(np.median(seconds))
        one = rows.get("1 device", {}).get("jax ms", 1e3 * median)
        rows[name] = {"to one device": 1e3 * median / one, "jax ms": 1e3 * median}
        rows[name]["jax images/s"] = base.batch_size / median
        all_seconds[name] = seconds
    return Table(f"{base}, {TASKS[base.task]}: devices that share the batch", rows, ("jax images/s",), all_seconds)
