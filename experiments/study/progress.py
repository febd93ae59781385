"""How far a study is, what it searches, and how long the rest takes."""

from __future__ import annotations

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from experiments.machine import cores
from experiments.output.tables import Cell, print_table
from experiments.study.ledger import Ledger, Run

# The settings that the time of an epoch depends on.
NETWORK = ("preset", "arch", "framework", "batch_norm", "image_size", "grey", "batch_size", "precision", "classes")


def print_progress(ledger: Ledger, *, plan: bool = False) -> None:
    """Prints how far each contestant is, and the time left with the busy workers; with plan also what is searched, and
    the time left with as many workers as there is room for."""
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
        if plan:
            row["searched"] = ", ".join(f"{field} {describe(space)}" for field, space in contestant.search.items())
        table[contestant.name] = row
    print(f"\n{ledger.protocol.name}: {sum(run.ended for run in runs)} of {len(runs)} runs have ended")
    print_table(table)
    of_each = ledger.protocol.cores or cores()
    workers = max(1, cores() // of_each if plan else len(busy))
    if all(run.ended for run in runs):
        print("nothing is left to run")
    elif left := seconds_left(runs):
        print(f"about {duration(left / workers)} left with {workers} worker{'s' * (workers > 1)}, based on ended runs")
    elif plan:
        print("how long it takes is not known before a run of each network has ended")


def seconds_left(runs: list[Run]) -> float | None:
    """The time of all runs that have not ended, one after the other; None if it cannot be estimated.

    Estimated from the ended runs of the same network, without the time before the first step.
    """

    def network(run: Run) -> tuple:
        return tuple(run.settings.get(field) for field in NETWORK)

    measured: dict[tuple, list[float]] = {}
    for run in runs:
        if run.state == "done":
            measured.setdefault(network(run), []).append(run.outcome["seconds"] / run.epochs)
    rest = [run for run in runs if not run.ended]
    if any(network(run) not in measured for run in rest):
        return None
    return sum(run.epochs * float(np.median(measured[network(run)])) for run in rest)


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
