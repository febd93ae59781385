"""A worker takes one run after the other and trains each with experiments.cars in its own process."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from experiments.cli import FAILED, FailedError, leaving_stops_to_a_child
from experiments.frameworks.experiment import flag
from experiments.study.ledger import COLUMNS, Ledger, Run
from experiments.study.progress import print_progress
from experiments.study_files import TRIALS
from experiments.training.run_folder import AVERAGED_WEIGHTS, CHECKPOINTS, CONFIG, ERROR, WEIGHTS, replace

CARS = (sys.executable, "-m", "experiments.cars")
WAIT_SECONDS = 5.0  # between two checks of what other workers are doing


def work(ledger: Ledger, data: Path | None, locks: Sequence[TextIO] = (), *, most: int | None) -> int | None:
    """Trains all that is left of a study, alone or beside other workers.

    Args:
      data: the folder of pictures.
      locks: what else a training keeps locked if this worker is killed.
      most: runs to train before it ends; None for all.

    Returns:
      the signal that ended it; None if nothing is left to do here.

    Raises:
      FailedError: a run failed for lack of memory, of data, or the like; it will be tried again.
    """
    ended, waiting = 0, False
    while most is None or ended < most:
        taken = ledger.take()
        if taken is None:
            rest = [run for run in ledger.runs() if not run.ended]
            # Another worker's last tuning run makes final runs ready.
            if all(run.ready for run in rest) or not any(ledger.busy(run) for run in rest):
                return None
            if not waiting:
                print("waiting for other workers: the runs that are left depend on theirs", flush=True)
            waiting = True
            time.sleep(WAIT_SECONDS)
            continue
        waiting = False
        run, held = taken
        with held:
            stopped = train(ledger, run, data, [held, *locks])
        if stopped is not None:
            return stopped
        ended += 1
        write_trials(ledger, data)
        print_progress(ledger)
    return None


def train(ledger: Ledger, run: Run, data: Path | None, locks: Sequence[TextIO]) -> int | None:
    """Trains a run to its end; continues it if it was begun.

    Args:
      locks: the run's and others. The child has them too: if this worker is killed, nobody begins the run a second
        time while its child still trains.

    Returns:
      the signal that told it to stop; None if there was none.
    """
    folder = ledger.folder / run.folder
    drawn = [f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in run.drawn.items()]
    print(f"\n{run.contestant.name}, {', '.join([folder.name, *drawn])}", flush=True)
    # Only runs in JAX can be continued; those of other frameworks start again.
    goes_on = run.settings.get("framework", "jax") == "jax"
    arguments = [*CARS, *command(run.settings, data), f"--out={folder}"]
    arguments += ["--resume", "--keep=1"] if goes_on else ["--overwrite"]
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
    elif code:
        raise FailedError(
            f"the run in {folder} ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}: see above. Once "
            "the cause is removed, the same command continues it"
        )
    tidy(folder)
    if not ledger.with_state(run).ended:
        raise FailedError(f"the run in {folder} ended without a test after epoch {run.epochs}")
    return came[0] if came else None


def tidy(folder: Path) -> None:
    """Prepares an ended run for publication: removes large files and this machine's paths."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for where, names in dict(settings=("data", "out"), data=("directory", "cache")).items():
        for name in names:
            if config[where].get(name):
                config[where][name] = Path(config[where][name]).name
    replace(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for name in (WEIGHTS, AVERAGED_WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    # Last: as long as they exist, the run has not ended, and another worker would take it.
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def command(settings: Mapping[str, Any], data: str | Path | None) -> list[str]:
    """The arguments of experiments.cars for these settings; adds `data` where pictures are needed."""
    arguments = []
    for field, value in settings.items():
        if isinstance(value, bool):
            arguments.append(flag(field if value else f"no_{field}"))
        else:
            arguments.append(f"{flag(field)}={value}")
    if data is not None and settings.get("preset") != "demo":
        arguments.append(f"--data={data}")
    return arguments


def write_trials(ledger: Ledger, data: Path | None) -> None:
    """Writes all runs of the protocol, including failures and open runs, to trials.csv in the study's folder."""
    with ledger.exclusive():  # so the later of two workers writes what both have done
        runs = ledger.runs()
        rows = [_trial(ledger, run, data) for run in runs]
        axes = dict.fromkeys(axis for run in runs for axis in run.contestant.labels)
        searched = dict.fromkeys(field for run in runs for field in run.contestant.search)
        columns = ["contestant", "block", "stage", "number", "state", *axes, "seed", "epochs", *searched, *COLUMNS]
        text = io.StringIO()
        writer = csv.DictWriter(text, [*columns, "error", "folder", "command"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        replace(ledger.folder / TRIALS, text.getvalue())


def _trial(ledger: Ledger, run: Run, data: Path | None) -> dict[str, Any]:
    contestant, error, cores = run.contestant, ledger.folder / run.folder / ERROR, ledger.protocol.cores
    row = {"contestant": contestant.name, "block": contestant.block, "stage": run.stage, "number": run.number}
    row |= {"state": run.state} | contestant.labels | {"seed": run.seed, "epochs": run.epochs} | run.drawn
    if run.state == "done":
        row |= {name: round(value, 5) for name, value in run.outcome.items()}
    elif error.exists():
        row["error"] = error.read_text(encoding="utf-8").strip()
    row["folder"] = run.folder
    if run.drawn or contestant.tuned_as is None:  # otherwise the settings are not known yet
        # The number of cores affects the last digits.
        program = f"{f'taskset -c 0-{cores - 1} ' if cores else ''}python -m experiments.cars"
        row["command"] = " ".join([program, *command(run.settings, "DIR" if data else None)])
    return row
