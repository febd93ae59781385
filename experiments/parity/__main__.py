"""Prints how far JAX, NumPy and PyTorch agree: `python -m experiments.parity --arch resnet101`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from tqdm import tqdm

from experiments.cli import Arch, parse_image_size
from experiments.machine import describe_machine
from experiments.parity import in_jax
from experiments.parity.cases import Network, check_batch, draw_batch, draw_weights, layer_cases
from experiments.parity.checks import FLOAT32_NOTE, compare_layer, compare_network, compare_trainings, torch_module
from experiments.parity.summary import Report, print_report, write_page

Framework = Literal["numpy", "torch_ref", "torchvision"]
PACKAGES = {"numpy": [], "torch_ref": ["torch"], "torchvision": ["torch", "torchvision"]}
TRAINING_BATCH = (8, 64, 64)  # images, height, width


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare layers, a ResNet and its training in NumPy and PyTorch with JAX, from the same weights.

    Errors are relative: the largest difference over the largest entry, array by array. The exit code is 1 if one is
    over its bound, 2 for settings that make no sense, else 0.
    """

    arch: Arch = "resnet101"
    """The network whose pass is compared: outputs, activations, every gradient, running statistics."""
    in_channels: int = 3
    """Channels of the images: 3 for colour, 1 for grey."""
    image_size: str = "64"
    """A side, or HEIGHTxWIDTH: 96, 64x96."""
    batch_size: int = 8
    """Images in the batch."""
    stride_in: Literal["conv2", "conv1"] = "conv2"
    """Which convolution of a bottleneck has the stride: conv2, its 3x3 (v1.5, torchvision), or conv1, its first 1x1
    (v1, the paper)."""
    batch_norm: bool = True
    """Whether the network has BatchNorm."""
    seed: int = 0
    """Of all weights and images."""
    dtype: Literal["float64", "float32", "both"] = "both"
    """Of layers and networks; trajectories are compared in float64."""
    sections: tuple[Literal["layers", "network", "trajectories"], ...] = ("layers", "network", "trajectories")
    """What is compared."""
    frameworks: tuple[Framework, ...] = ("numpy", "torch_ref", "torchvision")
    """What is compared with JAX. Trajectories leave torchvision out: its networks are those of torch_ref."""
    trajectory_arch: Arch = "resnet18"
    """The network whose trajectories are compared; of the deeper ones each step takes several times as long."""
    optimizers: tuple[Literal["sgd", "adam", "adamw", "adabound", "amsbound"], ...] = (
        "sgd",
        "adam",
        "adamw",
        "adabound",
        "amsbound",
    )
    """With which it is trained."""
    steps: int = 20
    """Of each training, on batches of 8 images of 64x64."""
    html: Path | None = None
    """Write the tables and plots as a page."""


def check(settings: Settings) -> None:
    """Refuses settings that make no sense, before the work.

    Raises:
      ValueError: with what to change.
    """
    if settings.in_channels < 1 or settings.steps < 1 or settings.seed < 0:
        raise ValueError("--in-channels and --steps must be at least 1, --seed at least 0")
    if not (settings.sections and settings.frameworks and settings.optimizers):
        raise ValueError("--sections, --frameworks and --optimizers must name something")
    if "trajectories" in settings.sections and set(settings.frameworks) == {"torchvision"}:
        raise ValueError(
            "torchvision has no part in trajectories: add torch_ref to --frameworks, or name other --sections"
        )
    check_batch(_network(settings), settings.batch_size, *parse_image_size(settings.image_size))
    if settings.html is not None and settings.html.is_dir():
        raise ValueError(f"--html {settings.html} is a folder: name the page to write")
    if settings.html is not None and not settings.html.parent.is_dir():
        raise ValueError(f"--html {settings.html}: there is no folder {settings.html.parent}")


def _network(settings: Settings) -> Network:
    return Network(settings.arch, settings.in_channels, settings.stride_in, settings.batch_norm)


def choose_frameworks(settings: Settings) -> tuple[list[Framework], list[str]]:
    """Those that can be compared, and why the others cannot.

    Raises:
      ValueError: if there is none.
    """
    found, left_out = [], []
    for framework in dict.fromkeys(settings.frameworks):
        missing = [package for package in PACKAGES[framework] if importlib.util.find_spec(package) is None]
        reason = f"{' and '.join(missing)} not installed" if missing else ""
        if framework == "torchvision" and not missing:
            reason = torch_module().why_not_torchvision(_network(settings))
        if reason:
            left_out.append(f"{framework}: {reason}")
        else:
            found.append(framework)
    if not found:
        raise ValueError(f"nothing to compare with JAX, {'; '.join(left_out)}")
    return found, left_out


def compare_all(settings: Settings, frameworks: Sequence[Framework], report: Report) -> None:
    """Fills the report; a bar on stderr shows where it is."""
    dtypes = ["float64", "float32"] if settings.dtype == "both" else [settings.dtype]
    trained = [name for name in frameworks if name != "torchvision"]
    counts = {
        "layers": len(layer_cases(settings.seed)) * len(dtypes),
        "network": 2 * len(dtypes) * (1 + len(frameworks)),
        "trajectories": len(settings.optimizers) * settings.steps if trained else 0,
    }
    with tqdm(total=sum(counts[section] for section in settings.sections), unit="", dynamic_ncols=True) as progress:
        if "layers" in settings.sections:
            compare_layers(settings, frameworks, dtypes, report, progress)
        if "network" in settings.sections:
            compare_passes(settings, frameworks, dtypes, report, progress)
        if "trajectories" in settings.sections and trained:
            compare_trajectories(settings, trained, report, progress)


def compare_layers(
    settings: Settings, frameworks: Sequence[Framework], dtypes: Sequence[str], report: Report, progress: tqdm
) -> None:
    """Each layer of the design; PyTorch takes part with torch.nn.functional, whichever of its networks do."""
    names = [name for name in ("numpy", "torch") if any(name in framework for framework in frameworks)]
    rows = report.tables.setdefault("Layers: outputs and all gradients", [])
    for dtype in dtypes:
        for case in layer_cases(settings.seed):
            progress.set_description(f"{case.layer}, {dtype}")
            rows += compare_layer(case, dtype, names)
            progress.update()


def compare_passes(
    settings: Settings, frameworks: Sequence[Framework], dtypes: Sequence[str], report: Report, progress: tqdm
) -> None:
    """A forward and backward pass of the network, in training and in evaluation."""
    network = _network(settings)
    height, width = parse_image_size(settings.image_size)
    weights = draw_weights(network, settings.seed)
    rng = np.random.default_rng([settings.seed, 1])
    images, labels = draw_batch(network, settings.batch_size, height, width, rng)
    title = f"{network}: {settings.batch_size} images of {height}x{width}x{settings.in_channels}"
    table = report.tables.setdefault(title, [])
    for mode in ("train", "eval"):
        progress.set_description(f"{network}, {mode}")
        for rows, profile in compare_network(network, weights, images, labels, dtypes, mode, frameworks):
            table += rows
            report.profiles += profile
            progress.update()
    if settings.dtype == "both":
        report.notes.append(FLOAT32_NOTE)


def compare_trajectories(settings: Settings, frameworks: Sequence[Framework], report: Report, progress: tqdm) -> None:
    """Trains the network with each optimizer."""
    network = Network(settings.trajectory_arch, settings.in_channels, settings.stride_in, settings.batch_norm)
    weights = draw_weights(network, settings.seed)
    count, height, width = TRAINING_BATCH
    title = f"{network} trained: {settings.steps} steps of {count} images of {height}x{width}, float64"
    table = report.tables.setdefault(title, [])
    trainer = in_jax.Trainer(network)
    for optimizer in settings.optimizers:
        progress.set_description(f"{network}, {optimizer}")
        rows, growth = compare_trainings(
            network,
            weights,
            optimizer,
            settings.steps,
            TRAINING_BATCH,
            frameworks,
            trainer,
            settings.seed,
            after_step=progress.update,
        )
        table += rows
        report.growths.append(growth)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    settings = tyro.cli(Settings, args=arguments, prog="python -m experiments.parity")
    try:
        check(settings)
        frameworks, left_out = choose_frameworks(settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = Report(f"Parity of {', '.join(frameworks)} with JAX", describe_machine(), left_out)
    print(report.machine)
    torch_settings = contextlib.nullcontext() if frameworks == ["numpy"] else torch_module().exact_on_one_thread()
    stopped = False
    with jax.enable_x64(True), jax.default_matmul_precision("highest"), torch_settings:
        try:
            compare_all(settings, frameworks, report)
        except KeyboardInterrupt:
            stopped = True
            report.left_out.append("all after Ctrl-C")
    print_report(report)
    if settings.html is not None:
        write_page(settings.html, report)
        print(f"wrote {settings.html}")
    if report.is_broken:
        return 1
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
