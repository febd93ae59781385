"""What every benchmark can be told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from experiments.bench.contestants import Case, Precision
from experiments.cli import Arch, parse_image_size
from experiments.machine import cores


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """The flags that all benchmarks share; each sets its own defaults."""

    rounds: int = 7
    """The contestants take turns this often."""
    threads: int = dataclasses.field(default_factory=cores)
    """Cores for each contestant [default: all]."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write all that was measured here, each turn of it."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw it here: .png, .svg or .pdf."""

    def check(self) -> None:
        """Raises ValueError for settings that make no sense."""
        for name, value in dataclasses.asdict(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
            if isinstance(value, tuple) and (not value or len(set(value)) < len(value)):
                got = " ".join(map(str, value)) or "nothing"
                raise ValueError(f"--{name.replace('_', '-')} must be one or more, none twice, got {got}")
        if self.threads > cores():
            raise ValueError(f"--threads {self.threads}: there are {cores()} cores to use")
        for name, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{name} {path}: there is no folder {path.parent}")
        if self.plot is not None and self.plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot {self.plot} must end in .png, .svg or .pdf")


@dataclasses.dataclass(frozen=True)
class NetworkSettings(BenchSettings):
    """The flags of those that measure a network or its layers."""

    arch: Arch = "resnet101"
    """The network."""
    batch_size: int = 8
    """Images at a time."""
    image_size: str = "96"
    """A side, or HEIGHTxWIDTH."""
    precision: Precision = "float32"
    """Of images, kernels and activations; parameters and statistics stay float32."""

    def check(self) -> None:
        super().check()
        parse_image_size(self.image_size)

    @property
    def case(self) -> Case:
        """The network and its input, for training."""
        return Case(self.arch, self.batch_size, *parse_image_size(self.image_size), precision=self.precision)
