"""Trains a small network or a ResNet on MNIST, in NumPy, JAX or PyTorch: same weights, batches and curve.

    python -m experiments.mnist --model cnn                # 3 epochs with Adam; NumPy
    python -m experiments.mnist --model resnet101          # a tenth of the training set, one epoch; NumPy
    python -m experiments.mnist --framework jax --data DIR # the four idx files instead of TFDS
    python -m experiments.mnist --compare numpy,jax,torch  # in turn; overlays their curves

A run leaves a folder with its settings, metrics, curves, some predictions and the weights.
"""

from __future__ import annotations

from experiments.machine import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # before imports that the restart would repeat

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tyro.conf import OmitArgPrefixes

from experiments.cli import Arch, exit_code, parse
from experiments.compare import start
from experiments.frameworks.experiment import TITLES, CommonOptimizerName, Experiment
from experiments.training.settings import RunSettings, System, logging_all, read_ahead

if TYPE_CHECKING:
    from experiments.data.dataset import Dataset
    from experiments.frameworks.common import Training


@dataclasses.dataclass(frozen=True)
class MnistExperiment(Experiment):
    """Settings that decide the result. Their defaults depend on --model."""

    model: Literal["cnn", *get_args(Arch)] = "cnn"
    """cnn: one convolution, ReLU, a dense layer. A ResNet gets the pictures padded to 32x32. `--model NAME --help`
    shows its defaults."""
    framework: Literal["numpy", "jax", "torch"] = "numpy"
    """The framework that computes; the curves are the same up to rounding."""
    opt: CommonOptimizerName = "adam"
    """The optimizer. adam, sgd, adabound, amsbound: L2 decay; adamw: decoupled decay, 1e-4 by default."""

    @property
    def pad(self) -> int:
        """Pixels of background around a picture of 28x28: a ResNet needs 32x32."""
        return 0 if self.model == "cnn" else 2


@dataclasses.dataclass(frozen=True)
class MnistSystem(System):
    """Settings that say how a run is executed. A run may be resumed with other ones."""

    data: Path | None = None
    """Folder with the four idx files, .gz or not [default: TFDS's mnist, downloaded once]."""


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """Train a small network or a ResNet on MNIST, in NumPy, JAX or PyTorch. The defaults depend on --model."""

    experiment: OmitArgPrefixes[MnistExperiment] = dataclasses.field(default_factory=MnistExperiment)
    system: OmitArgPrefixes[MnistSystem] = dataclasses.field(default_factory=MnistSystem)


CNN = MnistExperiment(epochs=3, batch_size=64)
RESNET = MnistExperiment(epochs=1, batch_size=32, limit=6000, log_every=1)


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Reads the command line; what it does not name depends on --model. Raises a ValueError for bad values."""
    named = read_ahead(arguments, "model", "compare", "opt")
    # tyro refuses an unknown model
    default = dataclasses.replace(RESNET, model=named.model) if named.model in get_args(Arch) else CNN
    default = dataclasses.replace(default, weight_decay=1e-4 if named.opt == "adamw" else 0.0)
    return parse(Settings, arguments, "mnist", default=logging_all(Settings(default), named.compare)).checked()


def load_data(settings: Settings) -> Dataset:
    """MNIST, or a part of it; padded for a ResNet."""
    import numpy as np

    from experiments.data.digits import load_mnist
    from experiments.training.prepare import take_parts

    dataset = take_parts(settings.experiment, load_mnist(settings.system.data))
    pad = settings.experiment.pad
    around = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    splits = [dataclasses.replace(s, images=np.pad(s.images, around)) for s in (dataset.train, dataset.test)]
    return dataclasses.replace(dataset, train=splits[0], test=splits[1])


def prepare(settings: Settings, dataset: Dataset) -> tuple[Training, dict[str, Any]]:
    """Makes the network and its training for a run; NumPy draws the weights for every framework."""
    import numpy as np

    import numpy_ref.resnet
    from experiments.frameworks import cnn
    from experiments.frameworks.common import resnet_network
    from experiments.training.prepare import prepare_training

    model, rng = settings.experiment.model, np.random.default_rng(settings.experiment.seed)
    if model == "cnn":
        network = cnn.network(cnn.init(rng))
    else:
        # zero_gamma is off: with it, only shortcuts would act at first, and pass on a picture's first pixel, which is
        # background. The last stage would start at 0, without a gradient, and stay there for two thirds of the epoch.
        shape = dict(num_classes=len(dataset.class_names), in_channels=1)
        weights = numpy_ref.resnet.init(getattr(numpy_ref.resnet, model)(**shape), rng)
        network = resnet_network(model, *weights, **shape)
    return prepare_training(settings, model, dataset, network)


def train(settings: Settings) -> int | None:
    """Trains in one framework, once the processes are connected; see `train_and_report`."""
    from experiments.training.run import train_and_report

    experiment = settings.experiment
    network = f"{experiment.model} in {TITLES[experiment.framework]}"
    return train_and_report(settings, load_data(settings), network, prepare)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: start(train, parse_settings(arguments), tuple(TITLES)))


if __name__ == "__main__":
    sys.exit(main())
