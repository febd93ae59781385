"""Runs a protocol to its end: `python -m experiments.study experiments/protocols/cars64_small.toml --data DIR`.

If the command is killed, run it again to continue. A second start while the first still runs, on this machine or on
another one that sees the same folder, adds a worker.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

try:
    import optuna  # noqa: F401 (an extra that may be missing)
except ImportError as error:
    raise SystemExit(f'error: experiments.study needs Optuna ({error}): pip install -e ".[study]"') from error
else:
    from experiments.cli import exit_code, parse
    from experiments.study.cores import own_cores
    from experiments.study.ledger import Ledger
    from experiments.study.progress import print_progress
    from experiments.study.protocol import read_protocol
    from experiments.study.worker import work, write_trials
    from experiments.study_files import PROTOCOL
    from experiments.training.run_folder import replace


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """Run a protocol: tune each of its contestants, train each on several seeds, and keep all results."""

    protocol: tyro.conf.Positional[Path]
    """The protocol, a .toml file."""
    data: Path | None = None
    """Folder of Stanford Cars; protocols on drawn cars need none."""
    out: Path | None = None
    """The study's folder [default: results/ and the protocol's name]."""
    runs: int | None = None
    """End after this many runs."""
    dry_run: bool = False
    """Only print what is left to run, and how long it takes, estimated from ended runs."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(StudySettings, arguments, "study")))


def run(settings: StudySettings) -> int | None:
    """Runs what is left; returns the signal that ended it, if one did."""
    if settings.runs is not None and settings.runs < 1:
        raise ValueError(f"--runs must be at least 1, got {settings.runs}")
    protocol = read_protocol(settings.protocol)
    drawn = all(contestant.settings.get("preset") == "demo" for contestant in protocol.contestants)
    if settings.data is None and not drawn:
        raise ValueError(f"{protocol.name} trains on Stanford Cars: pass --data DIR")
    if settings.data is not None and not settings.data.is_dir():
        raise ValueError(f"--data {settings.data} is no folder")
    out = settings.out or Path("results") / protocol.name
    ledger = Ledger(protocol, out)
    ledger.check()
    print(f"{protocol.name}, in {out}\n{protocol.about}")
    print_progress(ledger, plan=settings.dry_run)
    if settings.dry_run:
        print("nothing was trained: --dry-run")
        return None
    with ledger.exclusive():  # the protocol is kept beside its results
        replace(out / PROTOCOL, protocol.text)
    with own_cores(protocol.cores) as locks:
        ended_by = work(ledger, settings.data, locks, most=settings.runs)
    write_trials(ledger, settings.data)
    return ended_by


if __name__ == "__main__":
    sys.exit(main())
