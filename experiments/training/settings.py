"""What the programs that train can be told, and `experiments.cars`: dataclasses, which are also the command lines."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from pathlib import Path
from typing import Literal

import tyro

from experiments.cli import Arch, parse_image_size
from experiments.frameworks.common import FrameworkName, Precision
from experiments.frameworks.optimizers import LEARNING_RATES, OptimizerName, ScheduleName

DATA_VARIABLE = "STANFORD_CARS_DIR"
MAX_EPOCHS, MAX_WORKERS = 1_000_000, 256  # more is a slip of the finger
JAX_ONLY = (
    "resume",
    "checkpoint_steps",
    "checkpoint_minutes",
    "deterministic",
    "devices",
    "coordinator",
    "accumulate",
    "clip_norm",
    "ema",
    "skip_nonfinite",
    "remat",
    "profile",
)


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What every program that trains can be told."""

    epochs: int = 1
    """Passes over the training pictures."""
    batch_size: int = 32
    """Pictures a step; a last, partial batch of an epoch is left out."""
    learning_rate: float | None = None
    """The peak of the schedule [default: 1e-3, for sgd 0.05]."""
    seed: int = 0
    """Of all that is random: the weights, the order of the pictures and their augmentation, --limit."""
    limit: int | None = None
    """Train on this many pictures only, drawn by --seed, balanced by class."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl within an epoch."""
    test_every: int = 1
    """Epochs between two tests; the last epoch is always tested."""
    test_limit: int | None = None
    """Test on this many pictures only, balanced by class: always the same ones."""
    out: Path | None = None
    """The run's folder [default: runs/ and a name made of settings and time]."""
    overwrite: bool = False
    """Replace an earlier run in --out."""
    framework: FrameworkName = "jax"
    """What computes: the same from the same weights on the same pictures, up to rounding."""
    precision: Precision = "float32"
    """Of weights and all that is computed; float64 is for comparisons. bfloat16 is that of activations: the weights,
    BatchNorm's statistics and the loss stay float32."""
    compare: str | None = None
    """Train in several frameworks in turn, such as jax,torch, and lay the curves over one another: --out holds a run of
    each and comparison.png, and every step is logged unless --log-every says otherwise."""
    resume: bool = False
    """Go on with the run in --out from its last good checkpoint, bit for bit; with none, begin."""
    dry_run: bool = False
    """Check data, memory and folder, print what was found, and end."""
    keep: int = 2
    """Checkpoints: so many of the last ones stay, and the best. 0: none are written."""
    checkpoint_steps: int | None = None
    """Steps between two checkpoints."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints."""
    workers: int = 0
    """Processes that read and decode pictures ahead; 0: threads do."""
    devices: str = "1"
    """How many of JAX's devices share each batch, or all."""
    coordinator: str | None = None
    """HOST:PORT of process 0, to train in several processes; or auto, for what the cluster tells."""
    process_id: int | None = None
    """The number of this process, from 0."""
    num_processes: int | None = None
    """How many processes there are."""
    accumulate: int = 1
    """Compute each batch in so many parts, for less memory. BatchNorm then sees the parts, not the batch."""
    clip_norm: float | None = None
    """Shorten the gradients, all taken together, to this length."""
    ema: float | None = None
    """Keep moving averages of the weights with this decay, such as 0.999; they are tested and saved besides."""
    skip_nonfinite: int = 0
    """Leave out up to so many steps whose loss or gradients are not finite; one more ends the run."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits each time; --resume needs it there to be exact."""
    profile: int | None = None
    """Record so many steps with jax.profiler, into profile/ in the run's folder."""

    def check(self) -> None:
        """Raises a ValueError for values out of range, or that contradict one another."""
        least_values = dict(epochs=1, batch_size=2, log_every=1, test_every=1, limit=1, test_limit=1, seed=0)
        for name, least in least_values.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.epochs > MAX_EPOCHS:
            raise ValueError(f"--epochs must be at most {MAX_EPOCHS:,}, got {self.epochs}")
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be below 2^32, got {self.seed}")
        require_positive(self, "learning_rate", "checkpoint_minutes", "clip_norm")
        self._check_system()

    def _check_system(self) -> None:
        """What has to do with how a training is run, not with what is trained."""
        for name, least in dict(
            keep=0, checkpoint_steps=1, workers=0, accumulate=1, skip_nonfinite=0, profile=1
        ).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.workers > MAX_WORKERS:
            raise ValueError(f"--workers must be at most {MAX_WORKERS}, got {self.workers}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"--ema must be between 0 and 1, such as 0.999, got {self.ema}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"--batch-size {self.batch_size} must be a multiple of --accumulate {self.accumulate}")
        if self.devices != "all" and not (self.devices.isdecimal() and int(self.devices)):
            raise ValueError(f"--devices is a number or all, got {self.devices}")
        if self.coordinator is None and (self.process_id is not None or self.num_processes is not None):
            raise ValueError("--process-id and --num-processes need --coordinator HOST:PORT")
        if self.coordinator is not None and self.out is None:
            raise ValueError("--coordinator needs --out: a folder that all processes see")
        if self.resume and self.out is None:
            raise ValueError("--resume needs --out: the folder of the run to go on with")
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on with a run and --overwrite replaces it: choose one")
        if self.resume and not self.keep:
            raise ValueError("--resume needs checkpoints, and --keep 0 writes none")
        if self.compare is not None and (self.resume or self.coordinator is not None):
            raise ValueError("--compare trains anew in one process: leave --resume and --coordinator out")
        if self.framework != "jax":
            self._refuse_beyond_jax()

    def _refuse_beyond_jax(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(RunSettings)}
        for name in JAX_ONLY:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name.replace('_', '-')} is for --framework jax, not for {self.framework}")
        if self.precision == "bfloat16":
            raise ValueError(f"--precision bfloat16 is for --framework jax, not for {self.framework}")


def require_positive(settings: RunSettings, *names: str) -> None:
    """Raises a ValueError if one of the named settings is given and not positive, or infinite."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive and finite, got {value}")


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """Train a ResNet on pictures of cars: drawn ones, or Stanford Cars with --data. All defaults depend on --preset."""

    opt: OptimizerName = "adabound"
    """The optimizer. adabound, amsbound, adam, amsgrad, sgd: L2 decay; adaboundw, adamw: decoupled decay."""
    preset: Literal["demo", "cars96", "cars224"] = "demo"
    """Where all other defaults come from: demo draws its own cars, cars96 (what --data alone selects) and cars224 need
    pictures. `--preset NAME --help` shows its defaults."""
    data: Path | None = None
    """Folder of Stanford Cars in one of the layouts that people have [default: $STANFORD_CARS_DIR]."""
    arch: Arch = "resnet101"
    """The network."""
    zero_gamma: bool = False
    """Start each block as its shortcut: the weight of its last BatchNorm is 0."""
    batch_norm: bool = True
    """BatchNorm after each convolution; without it they have biases."""
    image_size: str = "96"
    """A side, or HEIGHTxWIDTH: 96, 64x96."""
    model: Literal["torch_ref", "torchvision"] = "torch_ref"
    """Whose network, with --framework torch."""
    grey: bool = True
    """Grey pictures instead of colour."""
    normalize: bool = True
    """Subtract each channel's mean over the training pictures and divide by its deviation."""
    classes: int | None = None
    """So many of the classes only, drawn at random but always the same ones."""
    holdout: float | None = None
    """Test on this share of each class's training pictures, drawn at random but always the same ones, in place of the
    test pictures: to choose settings by."""
    augmentation: Literal["shift", "crop", "none"] = "shift"
    """Flips, brightness, contrast and: shifts by up to 10%, or random resized crops. none: no change at all."""
    schedule: ScheduleName = "cosine"
    """Of the learning rate: cosine to 0, step (a tenth after one half and after three quarters), onecycle, constant."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the schedule."""
    final_lr: float = 0.1
    """AdaBound: the SGD rate at which it ends."""
    gamma: float = 1e-3
    """AdaBound: how fast its bounds close."""
    gamma_times_steps: float | None = None
    """AdaBound: gamma times the run's number of updates, in place of --gamma. The bounds then close alike in runs of
    any length: at 1 they have come half the way, at 100 they are nearly closed."""
    momentum: float = 0.9
    """SGD's momentum; b1 of all others."""
    dampening: float = 0.0
    """SGD takes (1 - dampening) of the gradient into its momentum; equal to --momentum it is AdaBound's limit."""
    weight_decay: float = 0.0
    """Of kernels only, not of biases and BatchNorm."""
    label_smoothing: float = 0.1
    """The share of each target that is spread over all classes."""
    loss_scale: float = 1.0
    """Multiply all gradients by this, as if the loss were: Adam would not mind, AdaBound at its bounds does."""
    init: Path | None = None
    """Weights to start from, .safetensors, .npz or .pth; another number of classes draws a new dense layer."""
    freeze: Literal["none", "backbone"] = "none"
    """backbone: train the dense layer alone; all before it, from --init, runs as in evaluation."""
    decode: Literal["cache", "lazy"] = "cache"
    """cache: decode all pictures once, into a memory-mapped file; lazy: each when it is needed, for sets too large for
    that."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read."""

    def check(self) -> None:
        super().check()
        parse_image_size(self.image_size)
        if self.model == "torchvision" and self.framework != "torch":
            raise ValueError(f"--model torchvision needs --framework torch, got {self.framework}")
        if self.freeze == "backbone" and self.init is None:
            raise ValueError("--freeze backbone needs --init FILE: drawn weights know nothing of pictures")
        if self.model == "torchvision" and not self.batch_norm:
            raise ValueError("--model torchvision has BatchNorm: --no-batch-norm is for --model torch_ref")
        if self.zero_gamma and not self.batch_norm:
            raise ValueError("--zero-gamma is of BatchNorm: pass --no-zero-gamma with --no-batch-norm")
        if self.loss_scale != 1 and self.framework != "jax":
            raise ValueError(f"--loss-scale is for --framework jax, not for {self.framework}")
        if self.classes is not None and self.classes < 2:
            raise ValueError(f"--classes must be at least 2, got {self.classes}")
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise ValueError(f"--holdout must be between 0 and 1, such as 0.1, got {self.holdout}")
        if self.dampening and self.opt != "sgd":
            raise ValueError(f"--dampening is SGD's: it would do nothing for {self.opt}")
        if self.momentum == 1:
            raise ValueError("--momentum must be below 1: at 1 no gradient would be forgotten")
        for name in ("momentum", "dampening", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be within 0 and 1, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"--{name.replace('_', '-')} must not be negative or infinite, got {getattr(self, name)}"
                )
        require_positive(self, "final_lr", "gamma", "gamma_times_steps", "loss_scale")


PRESETS = {
    # python -m experiments.cars: runs anywhere, on drawn cars; 87.5% of 600 drawings in 2 to 4 minutes on two cores.
    # AdaBound's final_lr is 1.0 since it averages gradients where SGD adds them up: that is SGD at 0.1 with momentum
    # 0.9, and the usual 0.1 would be SGD at 0.01.
    "demo": Settings(
        preset="demo",
        image_size="64",
        zero_gamma=True,
        epochs=2,
        batch_size=16,
        final_lr=1.0,
        label_smoothing=0.0,
    ),
    # python -m experiments.cars --data DIR: the grey 96x96 box crops of the project's origins; an epoch takes some ten
    # minutes on two cores, and two of them reach 0.6% to 0.9% from scratch. The 30 have not been run. No weight decay:
    # as L2 it would be as large as the gradients, which are 1e-5 and less in most layers and which Adam divides by.
    "cars96": Settings(preset="cars96", epochs=30, batch_size=16, zero_gamma=True),
    # python -m experiments.cars --preset cars224 --data DIR --init FILE: for fine-tuning. Built and tested as plumbing,
    # no accuracy is claimed for it.
    "cars224": Settings(
        preset="cars224",
        image_size="224",
        grey=False,
        augmentation="crop",
        epochs=20,
        warmup_epochs=1.0,
        weight_decay=1e-4,
    ),
}


def read_ahead(arguments: list[str] | None, *names: str) -> argparse.Namespace:
    """Reads single options ahead of the whole command line, whose defaults, also those in --help, depend on them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="?")  # without a value: tyro says what is missing
    return parser.parse_known_args(arguments)[0]


def logging_all(settings: RunSettings, compare: str | None) -> RunSettings:
    """The defaults for a comparison log every step: means over many would hide where curves part."""
    return dataclasses.replace(settings, log_every=1) if compare else settings


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Reads the command line; what it does not name comes from the preset.

    Raises:
      ValueError: for values out of range or that contradict one another.
    """
    named = read_ahead(arguments, "preset", "data", "compare")
    if named.data == "":  # a variable of the shell that is not set
        raise ValueError("--data is empty: name a folder, or leave it out")
    data = named.data or os.environ.get(DATA_VARIABLE) or None
    preset = named.preset or ("cars96" if data else "demo")
    program = "python -m experiments.cars"
    # A preset that there is not is refused here.
    default = logging_all(PRESETS.get(preset, PRESETS["demo"]), named.compare)
    settings = tyro.cli(Settings, args=arguments, default=default, prog=program)
    settings.check()
    if preset == "demo" and named.data:
        raise ValueError("--preset demo draws its own cars: leave --data out, or take --preset cars96 or cars224")
    learning_rate = settings.learning_rate or LEARNING_RATES[settings.opt]
    folder = Path(data) if data and preset != "demo" else None
    return dataclasses.replace(settings, data=folder, learning_rate=learning_rate)
