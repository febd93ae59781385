"""Measures speed and memory on this machine: `python -m experiments.bench NAME`.

Contestants take turns on the same number of cores, each in its own process. Ratios come first, then medians and
quartiles. --json keeps every measured time.
"""

from __future__ import annotations

from experiments.machine import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # the contestants' processes inherit the setting

import json
import sys

import tyro

from experiments.bench.benchmark import BenchSettings
from experiments.bench.layers import LayersBench
from experiments.bench.networks import CompileBench, MemoryBench, StepBench
from experiments.cli import exit_code, expanded
from experiments.machine import describe_machine
from experiments.output.tables import print_table
from experiments.training.run_folder import replace

BENCHES: dict[str, type[BenchSettings]] = {
    "step": StepBench,
    "layers": LayersBench,
    "compile": CompileBench,
    "memory": MemoryBench,
}


def run(bench: BenchSettings) -> None:
    """Measures and prints; writes --json after each table, so that an interrupted run keeps its tables."""
    bench.check()
    name = next(name for name, settings in BENCHES.items() if type(bench) is settings)
    machine, tables = describe_machine(), []
    print(machine)
    print(bench)

    def write_json(*, complete: bool) -> None:
        if bench.json:
            written = {"benchmark": name, "machine": machine, "settings": bench.as_json(), "complete": complete}
            written["tables"] = [table.as_json() for table in tables]
            replace(bench.json, json.dumps(written, indent=1) + "\n")

    for table in bench.run():
        print(f"\n{table.title}")
        print_table(table.rows)
        tables.append(table)
        write_json(complete=False)
    write_json(complete=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = dict(description=__doc__, prog="python -m experiments.bench")
    parse = tyro.extras.subcommand_cli_from_dict
    return exit_code(lambda: run(parse(BENCHES, args=expanded(arguments), **options)))


if __name__ == "__main__":
    sys.exit(main())
