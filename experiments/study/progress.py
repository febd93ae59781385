"""What a study has left to run, how far it is, and how long the rest takes."""

from __future__ import annotations

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from experiments.output.tables import Cell, print_table
from experiments.study.cores import room_for_workers
from experiments.study.ledger import Ledger, Run

# The settings that the time of an epoch depends on.
NETWORK = ("preset", "arch", "framework", "batch_norm", "image_size", "grey", "batch_size")
NETWORK += ("precision", "classes")


def print_plan(ledger: Ledger) -> None:
    """Prints what is left to run: --dry-run."""
    runs = ledger.runs()
    table: dict[str, dict[str, Cell]] = {}
    for contestant in ledger.protocol.contestants:
        row: dict[str, Cell] = {"group": contestant.group}
        for stage in ("tuning", "final"):
            rest = [run for run in runs if run.contestant is contestant and run.stage == stage and not run.ended]
            if rest:
                row[f"{stage} runs"], row[f"{stage} epochs"] = len(rest), sum(run.epochs for run in rest)
        row["searched"] = ", ".join(f"{field} {describe(space)}" for field, space in contestant.search.items())
        table[contestant.name] = row
    print(f"{ledger.protocol.about}\n")
    print_table(table)
    print(f"\n{len(runs)} runs, {sum(run.ended for run in runs)} of them ended; nothing was trained: --dry-run")
    if all(run.ended for run in runs):
        print("nothing is left to run")
        return
    workers = room_for_workers(ledger.protocol.cores)
    many = f"{workers} workers (start the command {workers} times)" if workers > 1 else "one worker"
    if left := seconds_left(runs):
        print(f"about {duration(left / workers)} with {many} here, by the runs that have ended")
    else:
        print("how long it takes is not known before a run of each network has ended")


def print_progress(ledger: Ledger) -> None:
    """Prints how far each contestant is, and the time left."""
    runs = ledger.runs()
    busy = {run.folder for run in runs if not run.ended and ledger.busy(run)}
    table: dict[str, dict[str, Cell]] = {}
    for contestant in ledger.protocol.contestants:
        of_it = [run for run in runs if run.contestant is contestant]
        row: dict[str, Cell] = {}
        for stage, title, summary in (("tuning", "best held out", max), ("final", "mean top-1", np.mean)):
            of_stage = [run for run in of_it if run.stage == stage]
            if of_stage:
                row[stage] = f"{sum(run.ended for run in of_stage)}/{len(of_stage)}"
            if reached := [run.outcome["top1"] for run in of_stage if run.state == "done"]:
                row[title] = f"{summary(reached):.1%}"
        row["running"] = str(sum(run.folder in busy for run in of_it) or "")
        row["failed"] = str(sum(run.state == "failed" for run in of_it) or "")
        table[contestant.name] = row
    print(f"\n{ledger.protocol.name}: {sum(run.ended for run in runs)} of {len(runs)} runs")
    print_table(table)
    if left := seconds_left(runs):
        workers = max(1, len(busy))
        print(f"about {duration(left / workers)} left with {workers} worker{'s' * (workers > 1)}", flush=True)


def seconds_left(runs: list[Run]) -> float | None:
    """What all runs that have not ended take one after the other; None if nothing is left or nothing tells.

    Measured by the runs of the same network that have ended, the time of starting and compiling included.
    """
    measured: dict[tuple, list[float]] = {}
    for run in runs:
        if run.state == "done":
            measured.setdefault(_network(run), []).append(run.outcome["seconds"] / run.epochs)
    rest = [run for run in runs if not run.ended]
    if any(_network(run) not in measured for run in rest):
        return None
    return sum(run.epochs * float(np.median(measured[_network(run)])) for run in rest) or None


def _network(run: Run) -> tuple:
    return tuple(run.settings.get(field) for field in NETWORK)


def describe(space: BaseDistribution) -> str:
    """What may be drawn, in words."""
    if isinstance(space, CategoricalDistribution):
        return " or ".join(map(str, space.choices))
    return f"{space.low:g} to {space.high:g}{' (log)' if space.log else ''}"


def duration(seconds: float) -> str:
    """
    >>> duration(59), duration(3660), duration(200_000)
    ('1 min', '1 h 01 min', '56 h')
    """
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 24 * 60 else f"{minutes / 60:.0f} h"
