"""Overlays the curves of several runs: `python -m experiments.compare runs/adam runs/adabound`.

Also trains in several frameworks in turn: --compare of experiments.cars and experiments.mnist.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from experiments.cli import check_output_file, exit_code, leaving_stops_to_a_child, parse
from experiments.training.run_folder import CONFIG, METRICS, ends_epoch, read_metrics, refuse_earlier_run
from experiments.training.settings import RunSettings

Train = Callable[[Any], int | None]
Rows = Sequence[dict[str, Any]]  # of metrics.jsonl
PARTINGS = (1e-12, 1e-9, 1e-6, 1e-4, 1e-2)  # relative distances; the first step beyond each is printed


def compare(
    runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("comparison.png"), against: str | None = None
) -> None:
    """Compare runs.

    Args:
      runs: folders of runs of experiments.cars or experiments.mnist.
      out: the picture to write.
      against: one run's name: also plot and print how far the other runs' training losses are from its losses.
    """
    from experiments.training.plots import plot_comparison

    if not runs:
        raise ValueError("name at least one run folder")
    check_output_file("--out", out)
    out = out.with_suffix(out.suffix or ".png")
    check_output_file("--out", out)
    names = [run.resolve().name for run in runs]  # also of "."
    found = {str(run) if names.count(name) > 1 else name: read_run(run) for run, name in zip(runs, names, strict=True)}
    rows = {name: run_rows for name, (run_rows, _) in found.items()}
    if against is not None and against not in rows:
        raise ValueError(f"--against {against} is none of {', '.join(rows)}")
    others = [name for name in rows if against not in (None, name)]
    distances = {name: loss_distances(rows[name], rows[against]) for name in others}
    plot_comparison(out, rows, ", ".join(sorted({title for _, title in found.values()})), against, distances)
    for name, run_rows in rows.items():
        print(f"{name}: {describe_outcome(run_rows)}")
    for name, of_run in distances.items():
        print(f"{name} from {against}: {describe_distances(of_run)}")
    print(f"curves are in {out}")


def read_run(run: Path) -> tuple[Rows, str]:
    """The rows of a run's metrics, and a title with network and data; raises a ValueError for any other folder."""
    if not (run / METRICS).is_file() or not (run / CONFIG).is_file():
        raise ValueError(f"{run} holds no run: {METRICS} or {CONFIG} is missing")
    file = run / METRICS
    try:
        rows = read_metrics(run)
        for row in rows:
            row |= {name: math.nan for name in ("train_loss", "test_loss") if row.get(name, 0) is None}  # NaN is null
            tested = ("test_loss", "test_top1", "test_top5") if "test_loss" in row else ()
            if wrong := [n for n in ("epoch", "step", "train_loss", *tested) if not isinstance(row[n], int | float)]:
                raise TypeError(f"{wrong[0]} is {row[wrong[0]]!r}")
        file = run / CONFIG
        config = json.loads(file.read_text(encoding="utf-8"))
        return rows, f"{config['input']['arch']} on {config['data']['title']}"
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file} is not from a training run: {reason}") from error


def describe_outcome(rows: Rows) -> str:
    """A run's last test result, as text."""
    tested = [row for row in rows if "test_top1" in row]
    if not tested:
        return "not tested yet"
    top1, top5, loss, epoch = (tested[-1][name] for name in ("test_top1", "test_top5", "test_loss", "epoch"))
    return f"test top-1 {top1:.2%}, top-5 {top5:.2%}, loss {loss:.3f} after {epoch:g} epochs"


def loss_distances(rows: Rows, reference: Rows) -> Rows:
    """The relative distances of training losses from the reference's, at the steps that both runs logged.

    Rows at the ends of epochs, whose losses are means, are left out where there are rows in between.
    """

    def by_step(rows: Rows) -> dict[int, dict[str, Any]]:
        return {row["step"]: row for row in [row for row in rows if not ends_epoch(row)] or rows}

    theirs = {step: row["train_loss"] for step, row in by_step(reference).items() if row["train_loss"]}
    return [
        {"epoch": row["epoch"], "step": step, "distance": abs(row["train_loss"] / theirs[step] - 1)}
        for step, row in by_step(rows).items()
        if step in theirs
    ]


def describe_distances(distances: Rows) -> str:
    """Says in one line how far training losses differ, and the first step beyond each limit."""
    if not distances:
        return "no step was logged by both"
    if strange := [row["step"] for row in distances if math.isnan(row["distance"])]:
        return f"a training loss is not a number at step {strange[0]}"
    most = max(distances, key=lambda row: row["distance"])
    text = f"training losses differ by at most {most['distance']:.1e} (step {most['step']} of {distances[-1]['step']})"
    beyond = {limit: [row["step"] for row in distances if not row["distance"] <= limit] for limit in PARTINGS}
    parted = [f"{limit:.0e} first at step {steps[0]}" for limit, steps in beyond.items() if steps]
    return f"{text}, by more than {', '.join(parted)}" if parted else text


def start(train: Train, settings: RunSettings, frameworks: Sequence[str]) -> int | None:
    """Trains as the settings say; with --compare in several of the program's frameworks.

    Args:
      train: a function at the top level of a module: settings -> the signal that ended the training, or None.
    """
    system = settings.system
    if system.compare is not None:
        return train_and_compare(train, settings, frameworks)
    refuse_earlier_run(system.out, system.overwrite or system.resume)
    from experiments.training.processes import start_processes

    with start_processes(system):
        return train(settings)


def train_and_compare(train: Train, settings: RunSettings, frameworks: Sequence[str]) -> int | None:
    """Trains in the frameworks of --compare in turn, each in its own process, and overlays their curves.

    Returns:
      the signal that ended a run, after which the runs so far were compared; None if no signal came.

    Raises:
      SystemExit: with the exit code of a run that failed, which has printed why.
    """
    from experiments.frameworks.common import adapter_for

    system = settings.system
    names = list(dict.fromkeys(system.compare.split(",")))
    if len(names) < 2 or set(names) - set(frameworks):
        raise ValueError(
            f"--compare takes two or more of {', '.join(frameworks)}, such as {','.join(frameworks[:2])}; "
            f"got {system.compare}"
        )
    out = system.out or Path("runs") / f"compare-{'-'.join(names)}-{time.strftime('%Y%m%d-%H%M%S')}"
    children = {name: settings.replace(compare=None, out=out / name, framework=name) for name in names}
    for child in children.values():  # errors must show before the first run trains for hours
        child.check()
        refuse_earlier_run(child.system.out, child.system.overwrite)
        adapter_for(child.experiment)
    code = 0
    for name, child in children.items():
        print(f"{name}:", flush=True)
        code = _run_in_a_process(train, child)
        if code > 128:
            break
        if code:
            print(f"{name} ended with exit code {code}: the runs are not compared", file=sys.stderr)
            raise SystemExit(code)
    if folders := [out / name for name in names if (out / name / METRICS).is_file() and read_metrics(out / name)]:
        compare(tuple(folders), out / "comparison.png", folders[0].name)
    return code - 128 if code else None


def _run_in_a_process(train: Train, settings: RunSettings) -> int:
    """Trains in a separate process, whose memory is freed when it ends; returns its exit code."""
    process = multiprocessing.get_context("spawn").Process(target=_run_alone, args=(train, settings))
    with leaving_stops_to_a_child(process.terminate):
        process.start()
        process.join()
    return process.exitcode


def _run_alone(train: Train, settings: RunSettings) -> None:
    sys.exit(exit_code(lambda: start(train, settings, ())))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: parse(compare, arguments, "compare"))


if __name__ == "__main__":
    sys.exit(main())
