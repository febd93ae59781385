"""Lays the curves of several runs over one another: `python -m experiments.compare runs/adam runs/adabound`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tyro

from experiments.plots import plot_comparison
from experiments.run_folder import CONFIG, METRICS, read_metrics


def compare(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("comparison.png")) -> None:
    """Compare runs.

    Args:
      runs: folders that experiments.cars or experiments.mnist left.
      out: the picture to write.

    Raises:
      ValueError: if a folder holds no run, or there is none.
    """
    if not runs:
        raise ValueError("name one folder of a run, or more")
    for run in runs:
        if not (run / METRICS).is_file() or not (run / CONFIG).is_file():
            raise ValueError(f"{run} holds no run: there is no {METRICS} or no {CONFIG}")
    names = [run.name for run in runs]
    rows = {str(run) if names.count(run.name) > 1 else run.name: read_metrics(run) for run in runs}
    configs = [json.loads((run / CONFIG).read_text(encoding="utf-8")) for run in runs]
    try:
        titles = {f"{config['input']['arch']} on {config['data']['title']}" for config in configs}
    except (KeyError, TypeError) as error:
        raise ValueError(f"a {CONFIG} is not that of a training run: it has no {error}") from error
    plot_comparison(out, rows, ", ".join(sorted(titles)))
    for name, run_rows in rows.items():
        tested = [row for row in run_rows if "test_top1" in row]
        reached = (
            f"test top-1 {tested[-1]['test_top1']:.2%}, top-5 {tested[-1]['test_top5']:.2%}, "
            f"loss {tested[-1]['test_loss']:.3f} after {tested[-1]['epoch']:g} epochs"
            if tested
            else "not tested yet"
        )
        print(f"{name}: {reached}")
    print(f"curves are in {out}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        tyro.cli(compare, args=arguments, prog="python -m experiments.compare")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
