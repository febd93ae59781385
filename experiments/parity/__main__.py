"""Prints how closely JAX, NumPy and PyTorch agree: `python -m experiments.parity --arch resnet101`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Literal, get_args

from experiments.cli import Arch, FailedError, check_output_file, exit_code, parse, parse_image_size
from experiments.machine import describe_machine
from experiments.output.tables import print_table

Framework = Literal["numpy", "torch_ref", "torchvision"]
Section = Literal["layers", "network", "trajectories"]
Optimizer = Literal["sgd", "adam", "adamw", "adabound", "amsbound"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare layers, a ResNet and its training in NumPy and PyTorch with JAX, from the same weights.

    Errors are relative: the largest difference divided by the largest entry, for each array. The exit code is 1 if an
    error exceeds its bound, 2 for settings that make no sense, else 0.
    """

    arch: Arch = "resnet101"
    """The network whose pass is compared: outputs, activations, every gradient, running statistics."""
    in_channels: int = 3
    """Channels of the images: 3 for colour, 1 for grey."""
    image_size: str = "64"
    """The side of a square, or HEIGHTxWIDTH: 96, 64x96."""
    batch_size: int = 8
    """Images in the batch."""
    stride_in: Literal["conv2", "conv1"] = "conv2"
    """Which convolution of a bottleneck has the stride: conv2, its 3x3 (v1.5, torchvision), or conv1, its first 1x1
    (v1, the paper)."""
    batch_norm: bool = True
    """Whether the network has BatchNorm."""
    seed: int = 0
    """The seed of all weights and images."""
    dtype: Literal["float64", "float32", "both"] = "both"
    """The dtype of layers and networks; trajectories are always in float64."""
    sections: tuple[Section, ...] = get_args(Section)
    """What to compare."""
    frameworks: tuple[Framework, ...] = get_args(Framework)
    """What to compare with JAX. Trajectories leave torchvision out, because its networks equal those of torch_ref."""
    trajectory_arch: Arch = "resnet18"
    """The network whose trajectories are compared; a step of a deeper one takes several times as long."""
    optimizers: tuple[Optimizer, ...] = get_args(Optimizer)
    """The optimizers of the trajectories."""
    steps: int = 20
    """The steps of each training, on batches of 8 images of 64x64."""
    html: Path | None = None
    """Write the tables and plots to this HTML page."""
    json: Path | None = None
    """Write the tables to this file."""


def check(settings: Settings) -> None:
    """Raises a ValueError for settings that make no sense."""
    if settings.in_channels < 1 or settings.steps < 1 or settings.seed < 0:
        raise ValueError("--in-channels and --steps must be at least 1, --seed at least 0")
    if not (settings.sections and settings.frameworks and settings.optimizers):
        raise ValueError("--sections, --frameworks and --optimizers must not be empty")
    if "trajectories" in settings.sections and set(settings.frameworks) == {"torchvision"}:
        raise ValueError(
            "torchvision has no part in trajectories: add torch_ref to --frameworks, or name other --sections"
        )
    parse_image_size(settings.image_size)
    for flag, path in (("--html", settings.html), ("--json", settings.json)):
        if path is not None:
            check_output_file(flag, path)


def run(settings: Settings) -> int | None:
    """Compares and prints; returns the signal that ended it, if one did. Raises a FailedError for a broken bound."""
    check(settings)
    import jax

    from experiments.parity.checks import module_of
    from experiments.parity.comparison import Report, choose_frameworks, compare_all

    frameworks, left_out = choose_frameworks(settings)
    report = Report(f"Parity of {', '.join(frameworks)} with JAX", describe_machine(), left_out)
    print(report.machine)
    one_thread = contextlib.nullcontext() if frameworks == ["numpy"] else module_of("torch").exact_on_one_thread()
    ended_by = None
    with jax.enable_x64(True), jax.default_matmul_precision("highest"), one_thread:
        try:
            compare_all(settings, frameworks, report)
        except KeyboardInterrupt:
            ended_by = signal.SIGINT
            report.left_out.append("everything after Ctrl-C")
    for title, rows in report.tables.items():
        print(f"\n{title}")
        print_table({row.name: row.columns for row in rows})
    print("", *report.conclusions, sep="\n")
    if settings.html is not None:
        from experiments.parity.html_report import write_page

        write_page(settings.html, report)
        print(f"wrote {settings.html}")
    if settings.json is not None:
        settings.json.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {settings.json}")
    if "BROKEN" in report.verdicts:
        raise FailedError(report.conclusions[-1])
    return ended_by


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(Settings, arguments, "parity")))


if __name__ == "__main__":
    sys.exit(main())
