"""The settings of all programs that train, and of `experiments.cars`: dataclasses that are also command lines."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from tyro.conf import OmitArgPrefixes

from experiments.cli import Arch, parse, parse_image_size
from experiments.frameworks.experiment import LEARNING_RATES, Experiment, flag, is_positive, jax_only, require
from experiments.from_table import check_types
from experiments.training.run_folder import CHECKPOINTS

DATA_VARIABLE = "STANFORD_CARS_DIR"


@dataclasses.dataclass(frozen=True)
class System:
    """Settings that say how a run is executed. A run may be resumed with other ones."""

    out: Path | None = None
    """The run's folder [default: runs/ and a name made from settings and time]."""
    overwrite: bool = False
    """Replace an earlier run in --out."""
    compare: str | None = None
    """Train in several frameworks in turn, such as jax,torch, and overlay their curves: --out holds a run of each and
    comparison.png, and every step is logged unless --log-every says otherwise."""
    resume: bool = jax_only(False)
    """Continue the run in --out from its last good checkpoint, bit for bit; without a checkpoint, start it."""
    dry_run: bool = False
    """Check data, memory and folder, print what was found, and end."""
    keep: int = 2
    """How many of the last checkpoints are kept, besides the best. 0: none are written."""
    checkpoint_steps: int | None = jax_only(None)
    """Steps between two checkpoints."""
    checkpoint_minutes: float = jax_only(10.0)
    """Minutes between two checkpoints."""
    devices: str = jax_only("1")
    """How many of JAX's devices share each batch, or all."""
    coordinator: str | None = jax_only(None)
    """HOST:PORT of process 0, to train in several processes; or auto, to ask the cluster."""
    process_id: int | None = None
    """The number of this process, from 0."""
    num_processes: int | None = None
    """How many processes there are."""
    skip_nonfinite: int = jax_only(0)
    """How many steps with a non-finite loss or gradients are skipped; one more ends the run."""
    profile: int | None = jax_only(None)
    """How many steps jax.profiler records, into profile/ in the run's folder."""

    @property
    def has_checkpoint(self) -> bool:
        """Whether --resume has a checkpoint in --out, from which the weights then come."""
        folder = (self.out or Path()) / CHECKPOINTS
        return self.resume and any(path.name.isdecimal() for path in folder.glob("*"))

    def check(self) -> None:
        """Raises a ValueError for values that are out of range or contradict one another."""
        require(self, "be at least 0", lambda value: value >= 0, "keep", "skip_nonfinite")
        require(self, "be at least 1", lambda value: value >= 1, "checkpoint_steps", "profile")
        require(self, "be positive and finite", is_positive, "checkpoint_minutes")
        if self.devices != "all" and not (self.devices.isdecimal() and int(self.devices)):
            raise ValueError(f"--devices is a number or all, got {self.devices}")
        if self.coordinator is None and (self.process_id is not None or self.num_processes is not None):
            raise ValueError("--process-id and --num-processes need --coordinator HOST:PORT")
        if self.coordinator is not None and self.out is None:
            raise ValueError("--coordinator needs --out: a folder that all processes see")
        if self.resume and self.out is None:
            raise ValueError("--resume needs --out: the folder of the run to resume")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite replaces it: choose one")
        if self.resume and not self.keep:
            raise ValueError("--resume needs checkpoints, and --keep 0 writes none")
        if self.compare is not None and (self.resume or self.coordinator is not None):
            raise ValueError("--compare starts new runs, one process each: leave --resume and --coordinator out")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The settings of every program that trains."""

    experiment: OmitArgPrefixes[Experiment] = dataclasses.field(default_factory=Experiment)
    system: OmitArgPrefixes[System] = dataclasses.field(default_factory=System)

    def check(self) -> None:
        """Raises a ValueError for values that are out of range or contradict one another."""
        self.experiment.check()
        self.system.check()
        framework = self.experiment.framework
        for part in (self.experiment, self.system):
            for field in dataclasses.fields(part) if framework != "jax" else ():
                if field.metadata.get("jax_only") and getattr(part, field.name) != field.default:
                    raise ValueError(f"{flag(field.name)} is for --framework jax, not for {framework}")

    def checked(self) -> Self:
        """These settings, with the optimizer's default learning rate if none is given; raises what `check` raises."""
        self.check()
        experiment = self.experiment
        return self.replace(learning_rate=experiment.learning_rate or LEARNING_RATES[experiment.opt])

    def replace(self, **changes: Any) -> Self:
        """These settings with some replaced by name, whichever part they belong to.

        Raises:
          ValueError: for an unknown name.
        """
        parts = {}
        for name, part in (("experiment", self.experiment), ("system", self.system)):
            own = {field.name: changes.pop(field.name) for field in dataclasses.fields(part) if field.name in changes}
            parts[name] = dataclasses.replace(part, **own)
        if changes:
            raise ValueError(f"unknown setting {min(changes)}")
        return dataclasses.replace(self, **parts)

    def flat(self) -> dict[str, Any]:
        """All settings by name, as plain JSON values, for config.json."""
        values = dataclasses.asdict(self.experiment) | dataclasses.asdict(self.system)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class CarsExperiment(Experiment):
    """Settings that decide the result. Their defaults are those of --preset."""

    preset: Literal["demo", "cars96", "cars224"] = "demo"
    """Where all other defaults come from: demo draws its own cars; cars96 (the default with --data) and cars224 need
    pictures. `--preset NAME --help` shows its defaults."""
    arch: Arch = "resnet101"
    """The network."""
    zero_gamma: bool = False
    """Start each block as its shortcut: the weight of its last BatchNorm is 0."""
    batch_norm: bool = True
    """BatchNorm after each convolution; without it, convolutions have biases."""
    image_size: str = "96"
    """One side, or HEIGHTxWIDTH, in pixels: 96, 64x96."""
    grey: bool = True
    """Grey pictures instead of colour."""
    normalize: bool = True
    """Subtract each channel's mean over the training pictures and divide by its standard deviation."""
    classes: int | None = None
    """Use only this many classes, drawn at random but always the same ones."""
    holdout: float | None = None
    """Test on this share of each class's training pictures, drawn at random but always the same ones, instead of
    the test pictures: a held-out set to choose settings with."""
    augmentation: Literal["shift", "crop", "none"] = "shift"
    """Flips, brightness and contrast, with shifts by up to 10% (shift) or random resized crops (crop); or none."""
    gamma_times_steps: float | None = None
    """AdaBound: gamma times the run's number of updates, instead of --gamma. The bounds then close alike in runs of
    any length: they end half closed at 1, nearly closed at 100."""
    init: Path | None = None
    """Weights to start from, in any format that experiments.convert reads. If the number of classes differs, a new
    dense layer is drawn. --resume does not read them again."""
    entry: str | None = None
    """Which network of --init to take if it holds several, such as model_ema or teacher."""
    freeze: Literal["none", "backbone"] = "none"
    """backbone: train only the dense layer; the layers before it, from --init, run as in evaluation."""

    @property
    def bounds(self) -> dict[str, Any] | None:
        if self.opt == "sgd":
            return None
        return dict(base_lr=self.learning_rate, final_lr=self.final_lr, gamma=self.gamma, b1=self.momentum)

    def check(self) -> None:
        super().check()
        parse_image_size(self.image_size)
        if self.framework == "torchvision" and not self.batch_norm:
            raise ValueError("--framework torchvision has BatchNorm: --no-batch-norm is for the others")
        if self.zero_gamma and not self.batch_norm:
            raise ValueError("--zero-gamma needs BatchNorm: pass --no-zero-gamma with --no-batch-norm")
        require(self, "be at least 2", lambda value: value >= 2, "classes")
        require(self, "be between 0 and 1, such as 0.1", lambda value: 0 < value < 1, "holdout")
        require(self, "be positive and finite", is_positive, "gamma_times_steps")


@dataclasses.dataclass(frozen=True)
class CarsSystem(System):
    """Settings that say how a run is executed. A run may be resumed with other ones."""

    data: Path | None = None
    """Folder of Stanford Cars, in any of the usual layouts [default: $STANFORD_CARS_DIR]."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """Train a ResNet on pictures of cars: drawn ones, or Stanford Cars with --data. All defaults depend on --preset."""

    experiment: OmitArgPrefixes[CarsExperiment] = dataclasses.field(default_factory=CarsExperiment)
    system: OmitArgPrefixes[CarsSystem] = dataclasses.field(default_factory=CarsSystem)

    def check(self) -> None:
        super().check()
        experiment = self.experiment
        if experiment.freeze == "backbone" and experiment.init is None and not self.system.has_checkpoint:
            raise ValueError("--freeze backbone needs --init FILE: a randomly initialized backbone must be trained")


PRESETS = {
    # python -m experiments.cars: runs anywhere, on drawn cars. The README has its accuracy and its time.
    # AdaBound's final_lr is 1.0 since it averages gradients and SGD adds them up: its limit is SGD at 0.1 with
    # momentum 0.9; the usual final_lr of 0.1 would give SGD at 0.01.
    "demo": CarsExperiment(preset="demo", image_size="64", zero_gamma=True, epochs=2, batch_size=16, final_lr=1.0),
    # python -m experiments.cars --data DIR: the grey 96x96 crops of the project's origins. docs/cars.md says what to
    # expect; nobody has run all 30 epochs. Blocks do not start as the identity: with zero_gamma a ResNet-18
    # learns more slowly, with AdaBound most (results/zero_gamma). No weight decay: L2 decay would be as large as the
    # gradients, which are small in most layers and by whose size Adam divides.
    "cars96": CarsExperiment(preset="cars96", epochs=30, batch_size=16, label_smoothing=0.1),
    # python -m experiments.cars --preset cars224 --data DIR --init FILE: for fine-tuning. Tests run it on small
    # data; no accuracy is claimed for it.
    "cars224": CarsExperiment(
        preset="cars224",
        image_size="224",
        grey=False,
        augmentation="crop",
        epochs=20,
        warmup_epochs=1.0,
        weight_decay=1e-4,
        label_smoothing=0.1,
    ),
}


def read_ahead(arguments: list[str] | None, *names: str) -> argparse.Namespace:
    """Reads single options before the whole command line, whose defaults (and --help) depend on them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="?")  # tyro reports a missing value
    return parser.parse_known_args(arguments)[0]


def logging_all(settings: RunSettings, compare: str | None) -> RunSettings:
    """Makes a comparison log every step by default: means over many steps would hide where curves separate."""
    return settings.replace(log_every=1) if compare else settings


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Reads the command line; what it does not name comes from the preset. Raises a ValueError for bad values."""
    named = read_ahead(arguments, "preset", "data", "compare", "model")
    if named.model is not None:
        framework = "torchvision" if named.model == "torchvision" else "torch"
        raise ValueError(f"--model was removed: use --framework {framework} instead of --model {named.model}")
    if named.data == "":  # an unset shell variable
        raise ValueError("--data is empty: name a folder, or leave it out")
    data = named.data or os.environ.get(DATA_VARIABLE)
    preset = named.preset or ("cars96" if data else "demo")
    default = Settings(PRESETS.get(preset, PRESETS["demo"]))  # tyro refuses an unknown preset
    settings = parse(Settings, arguments, "cars", default=logging_all(default, named.compare))
    if preset == "demo" and named.data:
        raise ValueError("--preset demo draws its own cars: leave --data out, or take --preset cars96 or cars224")
    if preset != "demo" and data and settings.system.data is None:
        settings = settings.replace(data=Path(data))
    return settings.checked()


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Settings from {name: value}, as in protocols; what is not named comes from the preset.

    Raises:
      ValueError: for an unknown name, or values of the wrong type, out of range or that contradict one another.
    """
    preset = values.get("preset", "cars96")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    settings = Settings(PRESETS[preset])
    for part in (settings.experiment, settings.system):
        check_types(type(part), values)
    return settings.replace(**values).checked()
