"""A training step (loss, gradients, running statistics; no optimizer) and inference of this project's ResNets and of
PyTorch's.

Memory is counted by process: "peak memory" is the most that a contestant's process has held, its libraries, weights,
gradients and activations together, "above libraries" what of it came after the libraries were imported.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from experiments.bench.contestants import CONTESTANTS, Case
from experiments.bench.processes import Result, available, compete, started
from experiments.bench.tables import describe_machine, print_table, ratios_to_best_torch, time_columns
from experiments.settings import parse_image_size

CASES = (Case("resnet101", 8, 96, 96), Case("resnet18", 32, 64, 64))
TASKS = {"training": "training step: loss, gradients, running statistics", "inference": "inference: logits"}
CONTESTANTS_BY_FRAMEWORK = {
    "jax": ("jax", "torch", "torch.compile"),
    "numpy": ("numpy", "torch", "torch.channels_last"),
}


@dataclasses.dataclass(frozen=True)
class StepBench:
    """Time training steps and inference; without --arch in two cases: ResNet-101 (8 of 96x96), ResNet-18 (32 of 64x64).

    Ratios are to the fastest form of PyTorch in the table. Memory, in MB, is that of a contestant's process: the most
    it has held, libraries, weights and all, and what of it came after its libraries were imported.
    """

    framework: Literal["jax", "numpy"] | None = None
    """Whose network runs against PyTorch's: jax against eager and compiled, numpy against eager and channels_last
    [default: jax]."""
    contestants: tuple[Literal["numpy", "jax", "torch", "torch.channels_last", "torch.compile"], ...] = ()
    """Who takes part, in place of --framework."""
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] | None = None
    """The network, instead of the two cases."""
    batch_size: int | None = None
    """With --arch [default: 8]."""
    image_size: str | None = None
    """With --arch: a side, or HEIGHTxWIDTH [default: 96]."""
    rounds: int = 7
    """The contestants take turns this often."""
    steps: int = 3
    """Steps a turn, after a tenth of them, at least one, to warm up."""


def run_step_bench(bench: StepBench) -> None:
    """Runs the benchmark and prints two tables per case: training and inference.

    Raises:
      ValueError: for settings that make no sense.
    """
    if min(bench.rounds, bench.steps, 1 if bench.batch_size is None else bench.batch_size) < 1:
        raise ValueError("--rounds, --steps and --batch-size must be at least 1")
    if bench.arch is None and (bench.batch_size, bench.image_size) != (None, None):
        raise ValueError("--batch-size and --image-size go with --arch")
    if bench.framework and bench.contestants:
        raise ValueError("--framework chooses the contestants and --contestants names them: pass one of the two")
    cases = CASES
    if bench.arch is not None:
        cases = (Case(bench.arch, bench.batch_size or 8, *parse_image_size(bench.image_size or "96")),)
    print(describe_machine())
    names = available(bench.contestants or CONTESTANTS_BY_FRAMEWORK[bench.framework or "jax"])
    print(
        f"{bench.rounds} rounds in turns, {bench.steps} steps a turn after warming up; times in ms, memory in MB, "
        "ratio to the best torch"
    )
    for case in cases:
        for task, contents in TASKS.items():
            print(f"\n{case}, {contents}")
            make_steps = {name: functools.partial(CONTESTANTS[name], case._replace(task=task)) for name in names}
            with started(names) as contestants:  # new processes for each table: peaks of memory only grow
                print_table(table(compete(contestants, make_steps, bench.rounds, bench.steps)))


def table(results: dict[str, Result]) -> dict[str, dict[str, str]]:
    """The rows of a table; ratios are between medians of a round."""
    ratios = ratios_to_best_torch({name: np.median(result.seconds, 1) for name, result in results.items()})
    rows = {}
    for name, result in results.items():
        rows[name] = {"ratio": f"{ratios[name]:.2f}"} if ratios else {}
        rows[name] |= time_columns(result.seconds, decimals=0)
        rows[name]["first step"] = f"{result.first_step:.1f} s"
        rows[name]["peak memory"] = f"{result.peak_memory:.0f}"
        rows[name]["above libraries"] = f"{result.peak_memory - result.memory_before:.0f}"
    return rows
