"""Trains a small network or a ResNet on MNIST, in NumPy, JAX or PyTorch: the same weights, batches and curve.

    python -m experiments.mnist --model cnn                # 3 epochs with Adam; NumPy
    python -m experiments.mnist --model resnet101          # a tenth of the training set, one epoch; NumPy
    python -m experiments.mnist --framework jax --data DIR # the four idx files instead of TFDS
    python -m experiments.mnist --compare numpy,jax,torch  # in turn, and their curves over one another

A run leaves a folder with its settings, metrics, curves, some predictions and the weights.
"""

from __future__ import annotations

from experiments.machine import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # before all that would be imported twice

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
import tyro

import numpy_ref.resnet
from experiments.cli import Arch, exit_code
from experiments.data.augment import normalize, to_unit_range
from experiments.data.dataset import Dataset, Split, balanced_subset, channel_statistics, limit_test
from experiments.data.digits import load_mnist
from experiments.frameworks import cnn
from experiments.frameworks.common import (
    TITLES,
    FrameworkName,
    Recipe,
    State,
    Training,
    make_training,
    resnet_network,
    weights_dtype,
)
from experiments.frameworks.optimizers import LEARNING_RATES, CommonOptimizerName, make_schedule
from experiments.machine import use_compilation_cache
from experiments.training.loop import Results, count_steps
from experiments.training.processes import start_processes
from experiments.training.run import (
    describe_input,
    plot_report,
    system_options,
    title_of,
    train_and_report,
    write_weights,
)
from experiments.training.run_folder import refuse_earlier_run
from experiments.training.settings import RunSettings, logging_all, read_ahead
from experiments.training.side_by_side import train_and_compare

CONTESTANTS = {name: {"framework": name} for name in TITLES}


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """Train a small network or a ResNet on MNIST, in NumPy, JAX or PyTorch. The defaults depend on --model."""

    model: Literal["cnn", *get_args(Arch)] = "cnn"
    """cnn: one convolution, ReLU, a dense layer. A ResNet gets the pictures padded to 32x32. `--model NAME --help`
    shows its defaults."""
    framework: FrameworkName = "numpy"
    """What computes; the curves are the same up to rounding."""
    data: Path | None = None
    """Folder with the four idx files, .gz or not [default: TFDS's mnist, downloaded once]."""
    opt: CommonOptimizerName = "adam"
    """The optimizer; its learning rate falls to 0 as a cosine."""


CNN = Settings(epochs=3, batch_size=64)
RESNET = Settings(epochs=1, batch_size=32, limit=6000, log_every=1)


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Reads the command line; what it does not name depends on --model.

    Raises:
      ValueError: for values out of range.
    """
    named = read_ahead(arguments, "model", "compare")
    model = named.model
    default = dataclasses.replace(RESNET, model=model) if model in get_args(Arch) else CNN  # others are refused by tyro
    default = logging_all(default, named.compare)
    settings = tyro.cli(Settings, args=arguments, default=default, prog="python -m experiments.mnist")
    settings.check()
    return dataclasses.replace(settings, learning_rate=settings.learning_rate or LEARNING_RATES[settings.opt])


def load_data(settings: Settings) -> Dataset:
    """MNIST, or a part of its training pictures; padded by two pixels of background for a ResNet, which needs 32x32.

    Raises:
      DataError: if there is nothing usable.
      ValueError: for a limit beyond the data.
    """
    dataset = load_mnist(settings.data)
    if settings.limit is not None:
        dataset = dataclasses.replace(dataset, train=balanced_subset(dataset.train, settings.limit, settings.seed))
    if settings.test_limit is not None:
        dataset = limit_test(dataset, settings.test_limit)
    if settings.model == "cnn":
        return dataset
    return dataclasses.replace(dataset, train=padded(dataset.train), test=padded(dataset.test))


def padded(split: Split) -> Split:
    return Split(np.pad(split.images, ((0, 0), (2, 2), (2, 2), (0, 0))), split.labels)


def prepare(settings: Settings, dataset: Dataset) -> tuple[Training, dict[str, Any]]:
    """Network, optimizer and the two steps for a run, in the framework that the settings name.

    The weights are NumPy's draw in any case.

    Returns:
      the training, and what a weight file must tell about its network and its input.
    """
    rng = np.random.default_rng(settings.seed)
    if settings.model == "cnn":
        config = cnn.CNNConfig()
        network = cnn.network(config, cnn.init(config, rng))
    else:
        # Not with zero_gamma: shortcuts alone carry a picture's first pixel on, which is background in all of them. The
        # last stage would start at 0, without a gradient, and stay there for two thirds of the epoch.
        shape = dict(num_classes=len(dataset.class_names), in_channels=1)
        weights = numpy_ref.resnet.init(getattr(numpy_ref.resnet, settings.model)(**shape), rng)
        network = resnet_network(settings.model, *weights, **shape)
    mean, std = channel_statistics(dataset.train.images)

    def preprocess(images, step=None):
        return normalize(to_unit_range(images, weights_dtype(settings.precision)), mean, std)

    steps = settings.epochs * count_steps(dataset.train, settings.batch_size)
    recipe = Recipe(
        settings.opt,
        make_schedule("cosine", settings.learning_rate, steps, warmup_steps=0),
        steps,
        base_lr=settings.learning_rate,
        preprocess_train=preprocess,
        preprocess_test=preprocess,
        weight_decay=1e-4 if settings.opt == "adamw" else 0.0,
        **system_options(settings),
    )
    return make_training(settings.framework, network, recipe), describe_input(settings.model, dataset, mean, std)


def write_report(
    dataset: Dataset,
    title: str,
    training: Training,
    description: dict[str, Any],
    path: Path,
    state: State,
    results: Results | None,
) -> None:
    """Writes the weights and the pictures of a run into its folder: curves and predictions."""
    write_weights(path, training, state, description)
    plot_report(path, title, dataset, results)


def run(settings: Settings) -> int | None:
    """Trains as the settings say and leaves the run's folder; returns the signal that ended it, if one did.

    Raises:
      ValueError, OSError: for bad input, with a message for the person who gave it.
      DivergedError: when the loss or gradients are not finite.
    """
    if settings.compare is not None:
        return train_and_compare(run, settings, CONTESTANTS)
    refuse_earlier_run(settings.out, settings.overwrite or settings.resume)
    with start_processes(settings):
        return train(settings)


def train(settings: Settings) -> int | None:
    """`run` for one framework, once the processes have met."""
    dataset = load_data(settings)
    title = title_of(f"{settings.model} in {TITLES[settings.framework]}", settings.opt, dataset, settings.limit)
    with jax.enable_x64(settings.precision == "float64"):
        training, description = prepare(settings, dataset)
        print(f"{title}: {len(dataset.train):,} pictures to train, {settings.epochs} epochs")
        return train_and_report(
            settings,
            dataset,
            training,
            title=title,
            name=f"mnist-{settings.model}-{settings.framework}-{settings.opt}",
            description=description,
            write_report=functools.partial(write_report, dataset, title, training, description),
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse_settings(arguments)))


if __name__ == "__main__":
    use_compilation_cache()
    sys.exit(main())
