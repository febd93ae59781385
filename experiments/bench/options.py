"""The settings that benchmarks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.bench.contestants import Case, Precision
from experiments.bench.results import Table
from experiments.cli import Arch, parse_image_size
from experiments.machine import cores


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """The settings of every benchmark that measures a network or its layers; each sets its own defaults."""

    arch: Arch = "resnet101"
    """The network."""
    batch_size: int = 8
    """Images at a time."""
    image_size: str = "96"
    """A side, or HEIGHTxWIDTH."""
    precision: Precision = "float32"
    """Of images, kernels and activations; parameters and statistics stay float32."""
    rounds: int = 7
    """The contestants take turns this often."""
    threads: int = dataclasses.field(default_factory=cores)
    """Cores for each contestant [default: all]."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every measurement of every turn here."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the tables here: .png, .svg or .pdf."""

    def check(self) -> None:
        """Raises a ValueError for settings that make no sense."""
        for name, value in dataclasses.asdict(self).items():
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, tuple) and (not value or len(set(value)) < len(value)):
                got = " ".join(map(str, value)) or "nothing"
                raise ValueError(f"{flag} must be one or more, none twice, got {got}")
            for number in value if isinstance(value, tuple) else (value,):
                if type(number) is int and number < 1:
                    raise ValueError(f"{flag} must be at least 1, got {number}")
        if self.threads > cores():
            raise ValueError(f"--threads {self.threads}: there are {cores()} cores to use")
        for name, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{name} {path}: there is no folder {path.parent}")
        if self.plot is not None and self.plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot {self.plot} must end in .png, .svg or .pdf")
        parse_image_size(self.image_size)

    @property
    def case(self) -> Case:
        """The network and its input, for training."""
        return Case(self.arch, self.batch_size, *parse_image_size(self.image_size), precision=self.precision)

    def run(self) -> Iterator[Table]:
        """Measures, and yields each table as soon as it is complete."""
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """The settings that shape a measurement, as plain JSON values by the names of their flags."""
        values = {n: v for n, v in dataclasses.asdict(self).items() if n not in ("json", "plot") and v is not None}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def __str__(self) -> str:
        words = {name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in self.as_json().items()}
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in words.items())
