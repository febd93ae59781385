"""Benchmarks in which whole networks compete: `python -m experiments.bench step`, compile and memory."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import tyro
from tqdm import tqdm

from experiments.bench.benchmark import BenchSettings, Table, ratios_to_best_torch, times
from experiments.bench.contestants import CONTESTANTS, TASKS, Case, ContestantName, Task
from experiments.bench.turns import NOBODY_LEFT, Result, available, compete, framework, started, who_can
from experiments.output.tables import Cell

CACHE_VARIABLES = {"jax": "JAX_COMPILATION_CACHE_DIR", "torch.compile": "TORCHINDUCTOR_CACHE_DIR"}


@dataclasses.dataclass(frozen=True)
class NetworkBench(BenchSettings):
    """The settings of every benchmark in which whole networks compete."""

    contestants: tuple[ContestantName, ...] = tuple(name for name in CONTESTANTS if name != "jax.remat")
    """Who takes part."""
    tasks: tuple[Task, ...] = ("training", "inference")
    """What is run."""

    def run(self) -> Iterator[Table]:
        names = available(self.contestants)
        for task in self.tasks:
            yield from self.tables(names, self.case._replace(task=task))

    def tables(self, names: list[str], case: Case) -> Iterator[Table]:
        """The tables of one task, in which these contestants take part."""
        raise NotImplementedError

    def measure(
        self, names: Sequence[str], case: Case, *, rounds: int, steps: int, environment: Mapping[str, str] | None = None
    ) -> dict[str, Result]:
        """Runs `compete` in new processes, with these additional environment variables."""
        make_steps = {name: functools.partial(CONTESTANTS[name], case) for name in names}
        with started(names, self.threads, environment) as contestants:
            return compete(contestants, make_steps, rounds, steps)


@dataclasses.dataclass(frozen=True)
class StepBench(NetworkBench):
    """Time training steps and inference.

    Ratios are to the fastest mode of PyTorch in the table. Memory is that of a contestant's process: its peak
    (libraries, weights, compilation), and the part of the peak that came after importing the libraries.
    """

    steps: int = 3
    """Steps per turn, after a tenth of them (at least one) to warm up."""

    def tables(self, names: list[str], case: Case) -> Iterator[Table]:
        results = self.measure(names, case, rounds=self.rounds, steps=self.steps)
        seconds = {name: result.seconds for name, result in results.items()}
        yield Table(f"{case}, {TASKS[case.task]}", step_rows(results), seconds)


def step_rows(results: dict[str, Result]) -> dict[str, dict[str, Cell]]:
    """The rows of a table; ratios compare the medians within a round."""
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


@dataclasses.dataclass(frozen=True)
class CompileBench(NetworkBench):
    """Time the first training step and the first inference, with a cold and with a warm cache.

    A cold start has an empty cache of compiled programs, a warm start the cache that the cold start has filled. Each
    start is a new process that has imported its libraries. Ratios are to torch.compile, which takes a minute or more
    for a deep network, so a round takes minutes.
    """

    contestants: tuple[Literal["jax", "torch.compile"], ...] = ("jax", "torch.compile")
    """Who takes part."""
    rounds: int = 3
    """How often the contestants take turns, each from an empty cache."""

    def tables(self, names: list[str], case: Case) -> Iterator[Table]:
        rounds: list[dict[str, tuple[float, float]]] = []
        for _ in tqdm(range(self.rounds), desc="rounds", leave=False):
            rounds.append(who_can(names, lambda name: cold_and_warm(name, case, self.threads)))
            names = list(rounds[-1])
        seconds = {name: np.array([of_round[name] for of_round in rounds]) for name in names}
        yield Table(f"{case}, first {TASKS[case.task]}", compile_rows(seconds), seconds)


def cold_and_warm(name: str, case: Case, threads: int) -> tuple[float, float]:
    """Seconds of the first step in a process with an empty cache, and in a second process with the same cache."""
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        # Caches small programs too, as `experiments.machine` does.
        environment = {CACHE_VARIABLES[name]: cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        for _ in range(2):
            with started([name], threads, environment) as (contestant,):
                seconds.append(contestant.build(functools.partial(CONTESTANTS[name], case)))
    cold, warm = seconds
    return cold, warm


def compile_rows(seconds: dict[str, np.ndarray]) -> dict[str, dict[str, Cell]]:
    """The median over rounds, and the shortest and the longest round, by contestant."""
    rows: dict[str, dict[str, Cell]] = {name: {} for name in seconds}
    for column, start in enumerate(("cold", "warm")):
        of_start = {name: of_both[:, column] for name, of_both in seconds.items()}
        ratios = ratios_to_best_torch(of_start)
        for name, taken in of_start.items():
            if ratios:
                rows[name][f"{start} ratio"] = ratios[name]
            rows[name][f"{start} s"] = float(np.median(taken))
            rows[name][f"{start} range s"] = (float(taken.min()), float(taken.max()))
    return rows


@dataclasses.dataclass(frozen=True)
class MemoryBench(NetworkBench):
    """Measure the peak memory of training steps and of inference, by batch size, and their time.

    On a CPU the peak is a process's highest memory use, less what it used with its libraries imported: weights,
    gradients, activations. JAX loads its program from a cache; another column has the peak with compilation. On a GPU
    the peak is what the framework has allocated there. Ratios are to torch, eager. "jax.remat" recomputes each block in
    the backward pass, as --remat does in experiments.cars.
    """

    batch_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N...")] = (1, 8, 32)
    """Images in a batch, a table row for each size."""
    contestants: tuple[ContestantName, ...] = ("jax", "jax.remat", "numpy", "torch", "torch.channels_last")
    """Who takes part."""
    rounds: int = 3
    """Measured steps of each contestant."""

    def tables(self, names: list[str], case: Case) -> Iterator[Table]:
        """A row for each contestant and batch size; one contestant after the other, because together they need much."""
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
        yield Table(f"{case.arch}, batches of {size}, {case.precision}, {TASKS[case.task]}", rows)

    def _row(self, name: str, case: Case, cache: str) -> dict[str, Cell]:
        """The cells of a row; empty if the contestant fails, which has been printed."""
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
