"""What a study will run and what that costs, before anything is run: --dry-run."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from experiments.output.tables import Cell, print_table
from experiments.study.cores import NoCoreError, own_cores, room_for_workers
from experiments.study.ledger import JOURNAL, Ledger, Run
from experiments.study.progress import duration, measured_seconds, network_of, seconds_left
from experiments.study.protocol import Protocol, check_command, command
from experiments.training.loop import count_steps
from experiments.training.prepare import load_cars, prepare_cars
from experiments.training.settings import Settings

TIMED_STEPS = 5


def print_plan(protocol: Protocol, folder: Path, data: Path | None, url: str | None) -> None:
    """Prints what is left to run, and an estimate of its time from runs that have ended, or from some steps."""
    print(protocol.about)
    with _ledger(protocol, folder, url) as ledger:
        runs = ledger.runs()
        table: dict[str, dict[str, Cell]] = {}
        for contestant in protocol.contestants:
            row: dict[str, Cell] = {"group": contestant.group}
            for stage in ("tuning", "final"):
                rest = [run for run in runs if run.contestant is contestant and run.stage == stage]
                rest = [run for run in rest if run.state in ("open", "begun")]
                if rest:
                    row[f"{stage} runs"], row[f"{stage} epochs"] = len(rest), sum(run.epochs for run in rest)
            row["searched"] = ", ".join(f"{field} {describe(space)}" for field, space in contestant.search.items())
            table[contestant.name] = row
        print()
        print_table(table)
        ended = sum(run.state in ("done", "failed") for run in runs)
        print(f"\n{len(runs)} runs, {ended} of them ended; nothing was trained: --dry-run")
        seconds = measured_seconds(ledger, runs)
    sources = ["runs that have ended"] if seconds else []
    untimed: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        if run.state in ("open", "begun") and network_of(run) not in seconds:
            untimed.setdefault(network_of(run), run)
    if untimed:  # if not, no cores are needed, and workers may have them all
        try:
            with own_cores(protocol.cores):
                for network, run in untimed.items():
                    seconds[network] = _time_epoch(_settings(run, data))
                    sources.append(f"{TIMED_STEPS} steps of {run.contestant.name}")
        except NoCoreError as error:
            print(f"how long it takes is not measured: {error}")
            return
    left = seconds_left(runs, seconds)
    if left:
        workers = room_for_workers(protocol.cores)
        many = f"{workers} workers (begin the command {workers} times)" if workers > 1 else "one worker"
        print(f"about {duration(left / workers)} with {many} here, by {', '.join(sources)}")


@contextlib.contextmanager
def _ledger(protocol: Protocol, folder: Path, url: str | None) -> Iterator[Ledger]:
    """The study's, or if it has not begun an empty one that leaves nothing behind."""
    if url is not None or (folder / JOURNAL).exists():
        yield Ledger(protocol, folder, url)
        return
    with tempfile.TemporaryDirectory() as empty:
        yield Ledger(protocol, Path(empty))


def describe(space: BaseDistribution) -> str:
    """What may be drawn, in words."""
    if isinstance(space, CategoricalDistribution):
        return " or ".join(map(str, space.choices))
    return f"{space.low:g} to {space.high:g}{' (log)' if space.log else ''}"


def _settings(run: Run, data: Path | None) -> Settings:
    """Of a run, with the first of what may be drawn where nothing has been drawn yet."""
    first: dict[str, Any] = {
        field: space.choices[0] if isinstance(space, CategoricalDistribution) else space.low
        for field, space in run.contestant.search.items()
    }
    return check_command(command(first | run.settings, data), run.contestant.name)


def _time_epoch(settings: Settings) -> float:
    """Times some steps of a training; returns the seconds of an epoch, a test step being taken for a third of one."""
    dataset = load_cars(settings)
    with jax.enable_x64(settings.experiment.precision == "float64"):
        training, _ = prepare_cars(settings, dataset)
        state, rows = training.state, settings.experiment.batch_size
        images, labels = training.put(np.asarray(dataset.train.images[:rows]), np.asarray(dataset.train.labels[:rows]))
        times = []
        for _ in range(1 + TIMED_STEPS):
            started = time.perf_counter()
            state, metrics = training.train_step(state, images, labels)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - started)
    steps = count_steps(dataset.train, rows) + len(dataset.test) / rows / 3
    return float(np.median(times[1:])) * steps
