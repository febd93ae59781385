"""Lays the curves of several runs over one another: `python -m experiments.compare runs/adam runs/adabound`."""

from __future__ import annotations

import sys

import tyro

from experiments.cli import exit_code
from experiments.training.side_by_side import compare


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: tyro.cli(compare, args=arguments, prog="python -m experiments.compare"))


if __name__ == "__main__":
    sys.exit(main())
