"""Measures this machine: `python -m experiments.bench step`, `conv2d`, `remat`."""

from __future__ import annotations

import sys

import tyro

from experiments.bench.conv2d import Conv2dBench, run_conv2d_bench
from experiments.bench.remat import RematBench, run_remat_bench
from experiments.bench.step import StepBench, run_step_bench


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    bench = tyro.extras.subcommand_cli_from_dict(
        {"step": StepBench, "conv2d": Conv2dBench, "remat": RematBench},
        args=arguments,
        description=__doc__,
        prog="python -m experiments.bench",
    )
    try:
        match bench:
            case StepBench():
                run_step_bench(bench)
            case Conv2dBench():
                run_conv2d_bench(bench)
            case RematBench():
                run_remat_bench(bench)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
