"""How long the first step takes: `python -m experiments.bench compile`.

A cold start has an empty cache of compiled programs, a warm one the cache that the cold start has filled. Each start is
a new process, which has imported its libraries. torch.compile keeps its programs in a folder as well.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from typing import Literal

import numpy as np
from tqdm import tqdm

from experiments.bench.benchmark import NetworkBench, Table, ratios_to_best_torch
from experiments.bench.contestants import CONTESTANTS, TASKS, Case
from experiments.bench.turns import started, who_can
from experiments.output.tables import Cell

CACHE_VARIABLES = {"jax": "JAX_COMPILATION_CACHE_DIR", "torch.compile": "TORCHINDUCTOR_CACHE_DIR"}


@dataclasses.dataclass(frozen=True)
class CompileBench(NetworkBench):
    """Time the first training step and the first inference, cold and with a warm cache, against torch.compile's.

    Ratios are to torch.compile, which takes a minute or more for a deep network: a round takes minutes.
    """

    contestants: tuple[Literal["jax", "torch.compile"], ...] = ("jax", "torch.compile")
    """Who takes part."""
    rounds: int = 3
    """The contestants take turns this often, each from an empty cache."""

    def tables(self, names: list[str], case: Case) -> Iterator[Table]:
        rounds: list[dict[str, tuple[float, float]]] = []
        for _ in tqdm(range(self.rounds), desc="rounds", leave=False):
            rounds.append(who_can(names, lambda name: cold_and_warm(name, case, self.threads)))
            names = list(rounds[-1])
        seconds = {name: np.array([of_round[name] for of_round in rounds]) for name in names}
        yield Table(f"{case}, first {TASKS[case.task]}", rows(seconds), ("cold s", "warm s"), seconds)


def cold_and_warm(name: str, case: Case, threads: int) -> tuple[float, float]:
    """Seconds of the first step in a process that finds nothing compiled, and in a second one with the same cache.

    Raises:
      FailedError: if the step fails.
    """
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        # Small programs are kept as well, as by `experiments.machine`.
        environment = {CACHE_VARIABLES[name]: cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        for _ in range(2):
            with started([name], threads, environment) as (contestant,):
                seconds.append(contestant.build(functools.partial(CONTESTANTS[name], case)))
    cold, warm = seconds
    return cold, warm


def rows(seconds: dict[str, np.ndarray]) -> dict[str, dict[str, Cell]]:
    """By contestant the medians over rounds, and the shortest and longest round."""
    rows: dict[str, dict[str, Cell]] = {name: {} for name in seconds}
    for column, start in enumerate(("cold", "warm")):
        of_start = {name: times[:, column] for name, times in seconds.items()}
        ratios = ratios_to_best_torch(of_start)
        for name, times in of_start.items():
            if ratios:
                rows[name][f"{start} ratio"] = ratios[name]
            rows[name][f"{start} s"] = float(np.median(times))
            rows[name][f"{start} range s"] = (float(times.min()), float(times.max()))
    return rows
