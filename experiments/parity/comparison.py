"""The sections of the comparison: layers, a network's pass, trainings. Each adds a table to the report."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tqdm import tqdm

from experiments.cli import parse_image_size
from experiments.frameworks.common import ResNet
from experiments.parity.cases import check_batch, draw_batch, draw_weights, layer_cases
from experiments.parity.checks import (
    FLOAT32_NOTE,
    Growth,
    Profile,
    compare_layer,
    compare_network,
    compare_trainings,
)
from experiments.parity.errors import Row

if TYPE_CHECKING:
    from experiments.parity.__main__ import Settings

PACKAGES = {"numpy": [], "torch_ref": ["torch"], "torchvision": ["torch", "torchvision"]}
Item = TypeVar("Item")
TRAINING_BATCH = (8, 64, 64)  # images, height, width


@dataclasses.dataclass
class Report:
    """What was found.

    title: which frameworks are compared.
    machine: the machine and the versions.
    left_out: what was not compared, and why.
    tables: rows by title.
    profiles: errors along the network.
    growths: how trainings diverge.
    notes: how to read the tables.
    """

    title: str
    machine: str
    left_out: list[str]
    tables: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
    profiles: list[Profile] = dataclasses.field(default_factory=list)
    growths: list[Growth] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def verdicts(self) -> list[str]:
        return [row.verdict for rows in self.tables.values() for row in rows if row.bound is not None]

    @property
    def conclusions(self) -> list[str]:
        """Notes, what was left out, and as the last line how many bounds hold."""
        broken, count = self.verdicts.count("BROKEN"), len(self.verdicts)
        conclusion = f"{broken} of {count} bounds are BROKEN" if broken else f"all {count} bounds hold"
        return [*self.notes, *(f"left out: {what}" for what in self.left_out), conclusion]

    def as_json(self) -> dict[str, Any]:
        """The tables, row by row, with the machine and the conclusions."""
        tables = {title: [row._asdict() for row in rows] for title, rows in self.tables.items()}
        return {"title": self.title, "machine": self.machine, "tables": tables, "conclusions": self.conclusions}


def network_of(settings: Settings, arch: str) -> ResNet:
    """The network of the settings, with this architecture."""
    options = dict(in_channels=settings.in_channels, stride_in=settings.stride_in, batch_norm=settings.batch_norm)
    return ResNet(arch, **options)


def choose_frameworks(settings: Settings) -> tuple[list[str], list[str]]:
    """The frameworks that can be compared, and why the others cannot.

    Raises:
      ValueError: no framework can be compared, or the batch is too small for any two to agree.
    """
    network = network_of(settings, settings.arch)
    check_batch(network, settings.batch_size, *parse_image_size(settings.image_size))
    found, left_out = [], []
    for framework in dict.fromkeys(settings.frameworks):
        missing = [package for package in PACKAGES[framework] if importlib.util.find_spec(package) is None]
        reason = f"{' and '.join(missing)} not installed" if missing else ""
        if framework == "torchvision" and not missing:
            reason = network.why_not_torchvision
        if reason:
            left_out.append(f"{framework}: {reason}")
        else:
            found.append(framework)
    if not found:
        raise ValueError(f"nothing to compare with JAX, {'; '.join(left_out)}")
    return found, left_out


def compare_all(settings: Settings, frameworks: Sequence[str], report: Report) -> None:
    """Fills the report; bars on stderr show the progress."""
    dtypes = ["float64", "float32"] if settings.dtype == "both" else [settings.dtype]
    if "layers" in settings.sections:
        # Both of PyTorch's networks stand for torch.nn.functional here.
        names = [name for name in ("numpy", "torch") if any(name in framework for framework in frameworks)]
        rows = report.tables.setdefault("Layers: outputs and all gradients", [])
        for dtype, case in progress(list(itertools.product(dtypes, layer_cases(settings.seed))), "layers"):
            rows += compare_layer(case, dtype, names)
    if "network" in settings.sections:
        compare_passes(settings, frameworks, dtypes, report)
    if "trajectories" in settings.sections and (trained := [name for name in frameworks if name != "torchvision"]):
        compare_trajectories(settings, trained, report)


def progress(iterable: Iterable[Item], name: str, total: int | None = None) -> Iterable[Item]:
    """The same items, with a progress bar."""
    return tqdm(iterable, name, total, unit="", dynamic_ncols=True)


def compare_passes(settings: Settings, frameworks: Sequence[str], dtypes: Sequence[str], report: Report) -> None:
    """Compares a forward and backward pass of the network, in training and in evaluation."""
    network = network_of(settings, settings.arch)
    height, width = parse_image_size(settings.image_size)
    weights = draw_weights(network, settings.seed)
    rng = np.random.default_rng([settings.seed, 1])
    batch = draw_batch(network, (settings.batch_size, height, width), rng)
    title = f"{network}: {settings.batch_size} images of {height}x{width}x{settings.in_channels}"
    table = report.tables.setdefault(title, [])
    total = len(dtypes) * (len(frameworks) + 1) - 1  # JAX's float32 is compared with its float64
    for mode in ("train", "eval"):
        compared = compare_network(network, weights, batch, dtypes, mode, frameworks)
        for rows, profile in progress(compared, f"{network}, {mode}", total):
            table += rows
            report.profiles.append(profile)
    if settings.dtype == "both":
        report.notes.append(FLOAT32_NOTE)


def compare_trajectories(settings: Settings, frameworks: Sequence[str], report: Report) -> None:
    """Compares trainings of the network, with each optimizer."""
    network = network_of(settings, settings.trajectory_arch)
    weights = draw_weights(network, settings.seed)
    count, height, width = TRAINING_BATCH
    title = f"{network} trained: {settings.steps} steps of {count} images of {height}x{width}, float64"
    table = report.tables.setdefault(title, [])
    for optimizer in settings.optimizers:
        steps = progress(range(1, settings.steps + 1), f"{network}, {optimizer}")
        rows, growth = compare_trainings(network, weights, optimizer, steps, TRAINING_BATCH, frameworks, settings.seed)
        table += rows
        report.growths.append(growth)
