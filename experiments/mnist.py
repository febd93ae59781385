"""Trains a small network or a ResNet on MNIST, in NumPy or in JAX: the same weights, the same batches, the same curve.

    python -m experiments.mnist --model cnn                # 3 epochs with Adam; NumPy
    python -m experiments.mnist --model resnet101          # a tenth of the training set, one epoch; NumPy
    python -m experiments.mnist --framework jax --data DIR # the four idx files instead of TFDS

A run leaves a folder with its settings, metrics, curves, some predictions and the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jax_resnet.resnet
import jax_resnet.train
import jax_resnet.weights
import numpy_ref.resnet
import numpy_ref.train
import numpy_ref.weights
from experiments import cnn
from experiments.data.augment import normalize, to_unit_range
from experiments.data.dataset import Dataset, Split, balanced_subset, channel_statistics
from experiments.data.mnist import load_mnist
from experiments.malloc import keep_freed_memory
from experiments.optimizers import (
    LEARNING_RATES,
    NumpyOptimizerName,
    cosine_decay,
    make_numpy_optimizer,
    make_optimizer,
    make_schedule,
)
from experiments.run_folder import jax_device, numpy_device, refuse_earlier_run
from experiments.settings import RunSettings, read_ahead
from experiments.training import Results, State, count_steps
from experiments.training_run import (
    describe_input,
    exit_code,
    plot_report,
    title_of,
    train_and_report,
    write_weights,
)

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
FRAMEWORKS = {"numpy": "NumPy", "jax": "JAX"}
Step = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Settings(RunSettings):
    """Train a small network or a ResNet on MNIST, in NumPy or JAX. The defaults depend on --model."""

    model: Literal["cnn", *RESNETS] = "cnn"
    """cnn: one convolution, ReLU, a dense layer. A ResNet gets the pictures padded to 32x32. `--model NAME --help`
    shows its defaults."""
    framework: Literal["numpy", "jax"] = "numpy"
    """What computes; the curves are the same up to rounding."""
    data: Path | None = None
    """Folder with the four idx files, .gz or not [default: TFDS's mnist, downloaded once]."""
    opt: NumpyOptimizerName = "adam"
    """The optimizer; its learning rate falls to 0 as a cosine."""


CNN = Settings(epochs=3, batch_size=64)
RESNET = Settings(epochs=1, batch_size=32, limit=6000, log_every=1)


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Reads the command line; what it does not name depends on --model.

    Raises:
      ValueError: for values out of range.
    """
    model = read_ahead(arguments, "model").model
    default = dataclasses.replace(RESNET, model=model) if model in RESNETS else CNN  # others are refused by tyro
    settings = tyro.cli(Settings, args=arguments, default=default, prog="python -m experiments.mnist")
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
    if settings.model == "cnn":
        return dataset
    return dataclasses.replace(dataset, train=padded(dataset.train), test=padded(dataset.test))


def padded(split: Split) -> Split:
    return Split(np.pad(split.images, ((0, 0), (2, 2), (2, 2), (0, 0))), split.labels)


def prepare(settings: Settings, dataset: Dataset) -> tuple[State, Step, Step, dict[str, Any]]:
    """Network, optimizer and the two steps for a run, in the framework that the settings name.

    The weights are NumPy's draw in either case.

    Returns:
      state, train_step, eval_step, and what a weight file must tell about its network and its input.
    """
    rng = np.random.default_rng(settings.seed)
    if settings.model == "cnn":
        config = jax_config = cnn.CNNConfig()
        params, batch_stats = cnn.init(config, rng), {}
        apply, jax_apply = cnn.apply_numpy, cnn.apply_jax
    else:
        # Not with zero_gamma: shortcuts alone carry a picture's first pixel on, which is background in all of them. The
        # last stage would start at 0, without a gradient, and stay there for two thirds of the epoch.
        config, jax_config = (
            getattr(module, settings.model)(num_classes=10, in_channels=1)
            for module in (numpy_ref.resnet, jax_resnet.resnet)
        )
        params, batch_stats = numpy_ref.resnet.init(config, rng)
        apply, jax_apply = numpy_ref.resnet.apply, jax_resnet.resnet.apply
    mean, std = channel_statistics(dataset.train.images)

    def preprocess(images, step=None):
        return normalize(to_unit_range(images), mean, std)

    steps = settings.epochs * count_steps(dataset.train, settings.batch_size)
    hyperparameters = dict(base_lr=settings.learning_rate, final_lr=0.1, gamma=1e-3, momentum=0.9)
    hyperparameters["weight_decay"] = 1e-4 if settings.opt == "adamw" else 0.0
    if settings.framework == "numpy":
        train = numpy_ref.train
        optimizer = make_numpy_optimizer(settings.opt, cosine_decay(settings.learning_rate, steps), **hyperparameters)
    else:
        train, config, apply = jax_resnet.train, jax_config, jax_apply
        schedule = make_schedule("cosine", settings.learning_rate, steps, warmup_steps=0)
        optimizer = make_optimizer(settings.opt, schedule, **hyperparameters, dampening=0.0)
        params, batch_stats = jax.tree.map(jnp.asarray, (params, batch_stats))
    return (
        train.create_train_state(params, batch_stats, optimizer),
        train.make_train_step(config, optimizer, preprocess=preprocess, apply=apply),
        train.make_eval_step(config, preprocess=preprocess, apply=apply),
        describe_input(settings.model, dataset, mean, std),
    )


def write_report(
    settings: Settings,
    dataset: Dataset,
    title: str,
    description: dict[str, Any],
    path: Path,
    state: State,
    results: Results | None,
) -> None:
    """Writes the weights and the pictures of a run into its folder: curves and predictions."""
    weights = numpy_ref.weights if settings.framework == "numpy" else jax_resnet.weights
    params = cnn.channels_first(cnn.CNNConfig(), state.params) if settings.model == "cnn" else state.params
    write_weights(path, weights.save, params, state.batch_stats, description)
    plot_report(path, title, dataset, results)


def run(settings: Settings) -> bool:
    """Trains as the settings say and leaves the run's folder; False if Ctrl-C ended it.

    Raises:
      ValueError, OSError: for bad input, with a message for the person who gave it.
      DivergedError: when the loss is not finite.
    """
    refuse_earlier_run(settings.out, settings.overwrite)
    dataset = load_data(settings)
    title = title_of(f"{settings.model} in {FRAMEWORKS[settings.framework]}", settings.opt, dataset, settings.limit)
    state, train_step, eval_step, description = prepare(settings, dataset)
    print(f"{title}: {len(dataset.train):,} pictures to train, {settings.epochs} epochs")
    return train_and_report(
        settings,
        dataset,
        state,
        train_step,
        eval_step,
        title=title,
        name=f"mnist-{settings.model}-{settings.framework}-{settings.opt}",
        description=description,
        device=numpy_device() if settings.framework == "numpy" else jax_device(),
        write_report=functools.partial(write_report, settings, dataset, title, description),
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse_settings(arguments)))


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
