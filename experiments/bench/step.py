"""A training step (loss, gradients, running statistics; no optimizer) of this project's ResNet and of PyTorch's."""

from __future__ import annotations

import dataclasses
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import numpy as np
from tqdm import tqdm

from experiments.bench.contestants import Case, Contestant, available
from experiments.settings import parse_image_size

CASES = (Case("resnet101", 8, 96, 96), Case("resnet18", 32, 64, 64))


@dataclasses.dataclass(frozen=True)
class StepBench:
    """Time a training step; without --arch two cases: ResNet-101 (8 of 96x96) and ResNet-18 (32 of 64x64)."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] | None = None
    """The network, instead of the two cases."""
    batch_size: int | None = None
    """With --arch [default: 8]."""
    image_size: str | None = None
    """With --arch: a side, or HEIGHTxWIDTH [default: 96]."""
    contestants: tuple[Literal["jax", "torch", "torch.compile"], ...] = ()
    """Who takes part [default: all that are installed]."""
    rounds: int = 7
    """The contestants take turns this often."""
    steps: int = 3
    """Steps a turn, after one to warm up."""


def run_step_bench(bench: StepBench) -> None:
    """Runs the benchmark and prints a table per case.

    Raises:
      ValueError: for settings that make no sense.
    """
    if min(bench.rounds, bench.steps, 1 if bench.batch_size is None else bench.batch_size) < 1:
        raise ValueError("--rounds, --steps and --batch-size must be at least 1")
    if bench.arch is None and (bench.batch_size, bench.image_size) != (None, None):
        raise ValueError("--batch-size and --image-size go with --arch")
    contestants = list(bench.contestants) or available()
    cases = CASES
    if bench.arch is not None:
        cases = (Case(bench.arch, bench.batch_size or 8, *parse_image_size(bench.image_size or "96")),)
    print(describe_machine())
    print(f"{bench.rounds} rounds in turns, {bench.steps} steps a turn after one to warm up; times in ms")
    for case in cases:
        print(f"\n{case}: loss, gradients, running statistics")
        first, times = measure(case, contestants, bench.rounds, bench.steps)
        print_table(first, times)


def measure(case: Case, names: list[str], rounds: int, steps: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The seconds of each contestant's first step, and of all steps measured, (rounds, steps).

    Contestants that cannot run (no PyTorch, no compiler for torch.compile) are named and left out.
    """
    contestants = []
    try:
        for name in names:  # one after the other: compiling needs all cores
            try:
                contestants.append(Contestant(name, case))
            except RuntimeError as error:
                print(f"left out: {error}")
        if not contestants:
            raise ValueError("nobody is left to measure")
        times = [[c.measure(steps) for c in contestants] for _ in tqdm(range(rounds), desc="rounds", leave=False)]
    finally:
        for contestant in contestants:
            contestant.close()
    first = {c.name: c.first_seconds for c in contestants}
    return first, {c.name: np.array([row[i] for row in times]) for i, c in enumerate(contestants)}


def print_table(first: dict[str, float], times: dict[str, np.ndarray]) -> None:
    """Prints medians, quartiles and the ratio to torch eager: the median over rounds of the ratio within a round."""
    print(f"{'':14}{'ratio':>7}{'median':>9}{'quartiles':>15}{'first step':>13}")
    for name, seconds in times.items():
        ratio = ""
        if "torch" in times:
            ratio = f"{np.median(np.median(seconds, 1) / np.median(times['torch'], 1)):.2f}"
        low, middle, high = np.percentile(seconds, [25, 50, 75]) * 1e3
        print(f"{name:14}{ratio:>7}{middle:9.0f}{f'{low:.0f}-{high:.0f}':>15}{first[name]:11.1f} s")


def describe_machine() -> str:
    """Processor, cores and versions, in a line."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    packages = []
    for name in ("jax", "torch", "torchvision"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"no {name}")
    return f"{model}, {os.cpu_count()} cores, {platform.system()}; {', '.join(packages)}"
