"""A worker: takes one run after the other, trains it by experiments.cars in its own process, records how it ended."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from experiments.cli import FAILED
from experiments.study.ledger import Ledger, Run, outcome_of, replace
from experiments.study.progress import print_progress
from experiments.study.protocol import bookkeeping, command
from experiments.study_files import TRIALS
from experiments.training.processes import leaving_stops_to_a_child
from experiments.training.run_folder import AVERAGED_WEIGHTS, CHECKPOINTS, CONFIG, ERROR, WEIGHTS

CARS = (sys.executable, "-m", "experiments.cars")
WAIT_SECONDS = 5.0  # between two looks at what other workers are doing


class RunError(RuntimeError):
    """A run could not be trained, and not for anything that it is meant to show."""


def work(
    ledger: Ledger, data: Path | None, locks: Sequence[TextIO] = (), *, most: int | None, keep_weights: bool
) -> int | None:
    """Trains all that is left of a study, with others or alone.

    Args:
      ledger: of the study.
      data: the folder of pictures.
      locks: what else a training shall keep from other workers if this one is killed.
      most: runs to train before it ends; None for all.
      keep_weights: whether the weights of ended runs stay.

    Returns:
      the signal that ended it; None if nothing is left to do here.

    Raises:
      RunError: a run failed for want of memory, of data, or the like; it will be tried again.
    """
    for run in ledger.runs():  # whose worker was killed right after it had ended
        folder = ledger.folder / run.folder
        if run.state in ("done", "failed") and (folder / CHECKPOINTS).exists():
            tidy(folder, keep_weights)
    ended, waiting = 0, False
    while most is None or ended < most:
        taken = ledger.take()
        if taken is None:
            runs = ledger.runs()
            # Who waits for another worker's last tuning run has final runs to do afterwards.
            if not any(run.state == "open" for run in runs) or not any(ledger.busy(run) for run in runs):
                return None
            if not waiting:
                print("waiting for other workers: what is left to begin depends on runs that they are at", flush=True)
            waiting = True
            time.sleep(WAIT_SECONDS)
            continue
        run, held = taken
        waiting = False
        with held:
            stopped = train(ledger, run, data, [held, *locks], keep_weights)
        if stopped is not None:
            return stopped
        ended += 1
        write_trials(ledger, data)
        print_progress(ledger)
    return None


def train(ledger: Ledger, run: Run, data: Path | None, locks: Sequence[TextIO], keep_weights: bool) -> int | None:
    """Trains a run to its end, from where it stands.

    Args:
      locks: the run's and others. The child has them too: if this worker is killed, nobody begins the run a second
        time while its child still trains.

    Returns:
      the signal that ended it before its end, None if there was none.
    """
    folder = ledger.folder / run.folder
    drawn = ", ".join(
        f"{field} {value:.4g}" if isinstance(value, float) else f"{field} {value}" for field, value in run.drawn.items()
    )
    print(f"\n{run.contestant.name}, {folder.name}{f': {drawn}' if drawn else ''}", flush=True)
    arguments = [*CARS, *command(run.settings, data), *bookkeeping(run.settings, folder)]
    child: subprocess.Popen | None = None

    def terminate() -> None:
        if child is not None:
            child.terminate()

    with leaving_stops_to_a_child(terminate) as came:
        child = subprocess.Popen(arguments, pass_fds=[file.fileno() for file in locks] if os.name == "posix" else [])
        if came:
            child.terminate()
        code = child.wait()
    if code > 128 or (code < 0 and came):
        return code - 128 if code > 0 else -code
    if code == FAILED and (folder / ERROR).exists():
        replace(folder / ERROR, (folder / ERROR).read_text(encoding="utf-8").replace(f"{folder}/", ""))
        ledger.end(run, failed=True)
    elif code:
        raise RunError(
            f"the run in {folder} ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}: see above. Once "
            "that is mended, the same command goes on with it"
        )
    else:
        rows = ledger.rows(run)
        if not rows or rows[-1]["epoch"] != run.epochs:
            raise RunError(f"the run in {folder} has no row for epoch {run.epochs} in its metrics")
        ledger.end(run)
    tidy(folder, keep_weights)
    return came[0] if came else None


def tidy(folder: Path, keep_weights: bool) -> None:
    """Makes an ended run fit to be published: without what fills disks, and without this machine's paths."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for where, names in dict(settings=("data", "out"), data=("directory", "cache")).items():
        for name in names:
            if config[where].get(name):
                config[where][name] = Path(config[where][name]).name
    replace(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if not keep_weights:
        for name in (WEIGHTS, AVERAGED_WEIGHTS):
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(
        folder / CHECKPOINTS, ignore_errors=True
    )  # last: by it the next worker sees that this was not reached


def write_trials(ledger: Ledger, data: Path | None) -> None:
    """Writes all runs of the protocol, failures and those to come too, to trials.csv in the study's folder."""
    with ledger.exclusive():  # of two workers the later one writes what both have done
        replace(ledger.folder / TRIALS, _trials_text(ledger, data))


def _trials_text(ledger: Ledger, data: Path | None) -> str:
    runs, cores = ledger.runs(), ledger.protocol.cores
    # How many cores compute decides about the last digits.
    program = f"{f'taskset -c 0-{cores - 1} ' if cores else ''}python -m experiments.cars"
    searched = list(dict.fromkeys(field for run in runs for field in run.drawn))
    axes = list(dict.fromkeys(axis for run in runs for axis in run.contestant.labels))
    rows = []
    for run in runs:
        folder = ledger.folder / run.folder
        row = {"contestant": run.contestant.name, "stage": run.stage, "number": run.number, "state": run.state}
        row |= run.contestant.labels | {"seed": run.seed, "epochs": run.epochs} | run.drawn
        if run.state == "done":
            outcome = outcome_of(ledger.rows(run))
            row |= {name: round(value, 5) for name, value in vars(outcome).items()}
        elif (folder / ERROR).exists():
            row["error"] = (folder / ERROR).read_text(encoding="utf-8").strip()
        row["folder"] = run.folder
        if run.drawn or not run.contestant.is_tuned:  # else it would train at settings that were not drawn
            row["command"] = " ".join([program, *command(run.settings, Path("DIR") if data else None)])
        rows.append(row)
    columns = ["contestant", "stage", "number", "state", *axes, "seed", "epochs", *searched]
    columns += ["top1", "top5", "macro_f1", "loss", "best_top1", "best_epoch", "seconds", "error", "folder", "command"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
