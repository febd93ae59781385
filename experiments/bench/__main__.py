"""Measures this machine: `python -m experiments.bench NAME`.

Contestants take turns on the same number of cores, those of several frameworks each in a process of its own; ratios
come first, then medians and quartiles. --json keeps every single time, --plot draws them.
"""

from __future__ import annotations

from experiments.machine import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # which the contestants' processes inherit

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import tyro

from experiments.bench.compile import CompileBench, run_compile_bench
from experiments.bench.conv2d import Conv2dBench, run_conv2d_bench
from experiments.bench.feed import FeedBench, run_feed_bench
from experiments.bench.layers import LayersBench, run_layers_bench
from experiments.bench.memory import MemoryBench, run_memory_bench
from experiments.bench.options import BenchSettings
from experiments.bench.remat import RematBench, run_remat_bench
from experiments.bench.results import Table
from experiments.bench.scaling import ScalingBench, run_scaling_bench
from experiments.bench.step import StepBench, run_step_bench
from experiments.machine import describe_machine
from experiments.output.tables import print_table

BENCHES = {
    "step": (StepBench, run_step_bench),
    "layers": (LayersBench, run_layers_bench),
    "compile": (CompileBench, run_compile_bench),
    "memory": (MemoryBench, run_memory_bench),
    "scaling": (ScalingBench, run_scaling_bench),
    "feed": (FeedBench, run_feed_bench),
    "conv2d": (Conv2dBench, run_conv2d_bench),
    "remat": (RematBench, run_remat_bench),
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    bench = tyro.extras.subcommand_cli_from_dict(
        {name: settings for name, (settings, _) in BENCHES.items()},
        args=arguments,
        description=__doc__,
        prog="python -m experiments.bench",
    )
    name, run = next((name, run) for name, (settings, run) in BENCHES.items() if type(bench) is settings)
    try:
        bench.check()
        machine = describe_machine()
        print(machine)
        print(described(bench))
        tables = []
        for table in run(bench):
            print(f"\n{table.title}")
            print_table(table.rows)
            tables.append(table)
            keep(bench, name, machine, tables)  # after each, so that an interrupted run leaves what it has
        write_json(bench, name, machine, tables, complete=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def settings_of(bench: BenchSettings) -> dict[str, Any]:
    """Those that shape a measurement, by their flags' names."""
    values = {
        name: v for name, v in dataclasses.asdict(bench).items() if name not in ("json", "plot") and v is not None
    }
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def described(bench: BenchSettings) -> str:
    """The settings in a line."""
    words = {name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in settings_of(bench).items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in words.items())


def keep(bench: BenchSettings, name: str, machine: str, tables: list[Table]) -> None:
    """Writes --json and --plot."""
    write_json(bench, name, machine, tables, complete=False)
    if bench.plot:
        from experiments.bench.drawing import plot_tables

        plot_tables(bench.plot, tables, f"{name}: {machine}")


def write_json(bench: BenchSettings, name: str, machine: str, tables: list[Table], *, complete: bool) -> None:
    """Writes --json, with a word on whether there is more to come."""
    if bench.json:
        written = {"benchmark": name, "machine": machine, "settings": settings_of(bench), "complete": complete}
        write_whole(
            bench.json, json.dumps(written | {"tables": [table.as_json() for table in tables]}, indent=1) + "\n"
        )


def write_whole(path: Path, text: str) -> None:
    """Aside, then renamed: a reader never sees half of it."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
