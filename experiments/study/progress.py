"""Where a study stands, and how long the rest will take."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.output.tables import Cell, print_table
from experiments.study.ledger import Ledger, Run, outcome_of

NETWORK = (
    "preset",
    "arch",
    "framework",
    "batch_norm",
    "image_size",
    "grey",
    "batch_size",
    "precision",
    "classes",
)


def network_of(run: Run) -> tuple[Any, ...]:
    """The settings that the time of an epoch depends on."""
    return tuple(run.settings.get(field) for field in NETWORK)


def measured_seconds(ledger: Ledger, runs: list[Run]) -> dict[tuple[Any, ...], float]:
    """Seconds of an epoch in the runs that have ended, by `network_of`; start and compiling are spread over epochs."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        if run.state == "done":
            found.setdefault(network_of(run), []).append(ledger.rows(run)[-1]["seconds"] / run.epochs)
    return {network: float(np.median(seconds)) for network, seconds in found.items()}


def seconds_left(runs: list[Run], seconds: dict[tuple[Any, ...], float]) -> float | None:
    """What all runs that have not ended will take one after the other; None where some network was not measured."""
    rest = [run for run in runs if run.state in ("open", "begun")]
    if any(network_of(run) not in seconds for run in rest):
        return None
    return sum(run.epochs * seconds[network_of(run)] for run in rest)


def print_progress(ledger: Ledger) -> None:
    """Prints how far each contestant is, and the time left."""
    runs = ledger.runs()
    busy = {run.folder for run in runs if ledger.busy(run)}
    table: dict[str, dict[str, Cell]] = {}
    for contestant in ledger.protocol.contestants:
        of_it = [run for run in runs if run.contestant is contestant]
        row: dict[str, Cell] = {}
        for stage, best in (("tuning", True), ("final", False)):
            of_stage = [run for run in of_it if run.stage == stage]
            if not of_stage:
                continue
            ended = [run for run in of_stage if run.state in ("done", "failed")]
            reached = [outcome_of(ledger.rows(run)).top1 for run in of_stage if run.state == "done"]
            row[stage] = f"{len(ended)}/{len(of_stage)}"
            if reached:
                row["best held out" if best else "mean top-1"] = f"{(max if best else np.mean)(reached):.1%}"
        row["running"] = str(sum(run.folder in busy for run in of_it) or "")
        row["failed"] = str(sum(run.state == "failed" for run in of_it) or "")
        table[contestant.name] = row
    ended = sum(run.state in ("done", "failed") for run in runs)
    print(f"\n{ledger.protocol.name}: {ended} of {len(runs)} runs")
    print_table(table)
    left = seconds_left(runs, measured_seconds(ledger, runs))
    if left:
        workers = max(1, len(busy))
        print(f"about {duration(left / workers)} left with {workers} worker{'s' * (workers > 1)}", flush=True)


def duration(seconds: float) -> str:
    """
    >>> duration(59), duration(3660), duration(200_000)
    ('1 min', '1 h 01 min', '56 h')
    """
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 24 * 60 else f"{minutes / 60:.0f} h"
