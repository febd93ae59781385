"""Prepares a training: data, network, optimizer, steps, and the preprocessing of pictures."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import parse_image_size
from experiments.data import dataset as data
from experiments.data.augment import augment, normalize, to_unit_range
from experiments.data.dataset import DataError, Dataset
from experiments.data.drawn_cars import drawn_cars
from experiments.data.layouts import LAYOUTS
from experiments.data.stanford_cars import load_stanford_cars
from experiments.frameworks.common import Network, Recipe, Training, make_training, resnet_network
from experiments.frameworks.experiment import Experiment
from experiments.frameworks.schedules import make_schedule
from experiments.training.loop import count_steps
from experiments.training.processes import choose_devices
from experiments.training.settings import DATA_VARIABLE, RunSettings, Settings
from jax_resnet import resnet, weights

DRAWINGS = dict(train_count=1500, test_count=600)


def take_parts(experiment: Experiment, dataset: Dataset) -> Dataset:
    """Reduces a data set to the pictures that --limit and --test-limit select."""
    if experiment.limit is not None:
        part = data.balanced_subset(dataset.train, experiment.limit, experiment.seed)
        dataset = dataclasses.replace(dataset, train=part)
    return dataset if experiment.test_limit is None else data.limit_test(dataset, experiment.test_limit)


def prepare_training(
    settings: RunSettings, arch: str, dataset: Dataset, network: Network, augment_key: jax.Array | None = None
) -> tuple[Training, dict[str, Any]]:
    """Makes the optimizer, the training and evaluation steps, and the preprocessing of pictures.

    Args:
      arch: the network's name.
      network: with its initial weights.

    Returns:
      the training, and what `describe_input` returns.

    Raises:
      ValueError: the framework or its optimizer is missing, or there are too few devices.
    """
    experiment, place = settings.experiment, settings.experiment.augmentation
    mean, std = data.channel_statistics(dataset.train.images)
    if not experiment.normalize:
        mean, std = np.zeros_like(mean), np.ones_like(std)

    def preprocess_test(images):
        return normalize(to_unit_range(images, experiment.weights_dtype), mean, std)

    @jax.jit  # for NumPy and PyTorch; JAX's step traces through it
    def augmented(images, step):
        changed = augment(place, jax.random.fold_in(augment_key, step), to_unit_range(images, experiment.weights_dtype))
        return normalize(changed, mean, std)  # random by step: a resumed run sees the same pictures

    def preprocess_train(images, step):
        return preprocess_test(images) if place == "none" else augmented(images, step)

    steps_per_epoch = count_steps(dataset.train, experiment.batch_size)
    steps, warmup_steps = experiment.epochs * steps_per_epoch, round(experiment.warmup_epochs * steps_per_epoch)
    in_jax = experiment.framework == "jax"
    recipe = Recipe(
        experiment,
        make_schedule(experiment.schedule, experiment.learning_rate, steps, warmup_steps),
        steps,
        preprocess_train,
        preprocess_test,
        experiment.freeze == "backbone",
        settings.system.skip_nonfinite,
        choose_devices(settings.system.devices, experiment.batch_size) if in_jax else 1,
    )
    preparation = {"mean": mean.tolist(), "std": std.tolist(), "pad": experiment.pad}
    return make_training(network, recipe), describe_input(arch, dataset, preparation)


def describe_input(arch: str, dataset: Dataset, preparation: dict[str, Any]) -> dict[str, Any]:
    """What a weight file must record about its network and its input, as plain JSON values.

    Args:
      preparation: "mean" and "std" of the channels; "pad", the pixels of background around a picture, if there are any.

    Returns:
      the names of network, classes and data; preparation; "image_size", to which a picture is stretched, padding
      included; "grey"; "margin", by how many pixels a box was widened before its picture was cut to it, None for whole
      pictures; "white", if the set has pictures of more than 8 bits: the value of white in all of them, by kind.
    """
    *_, height, width, channels = dataset.train.images.shape
    described = {"arch": arch, "class_names": dataset.class_names, "data": dataset.title}
    described |= {"image_size": (height, width), "grey": channels == 1}
    described |= {"margin": dataset.source.get("margin"), "pad": 0}
    white = dataset.source.get("white")
    return described | ({"white": white} if white else {}) | preparation


def load_cars(settings: Settings) -> Dataset:
    """Loads Stanford Cars, or draws cars for the demo; --classes, --holdout, --limit and --test-limit select parts.

    Raises:
      ValueError: the folder holds nothing usable, or a part exceeds the data.
    """
    experiment, system = settings.experiment, settings.system
    size = parse_image_size(experiment.image_size)
    if experiment.preset == "demo":
        dataset = drawn_cars(size, **DRAWINGS, grey=experiment.grey, seed=experiment.seed)
    elif system.data is None:
        raise DataError(
            f"--preset {experiment.preset} needs pictures: pass --data DIR or set ${DATA_VARIABLE}. Layouts:\n{LAYOUTS}"
        )
    else:
        dataset = load_stanford_cars(system.data, size, experiment.grey, skip_bad=system.skip_bad)
    if experiment.classes is not None:
        dataset = data.draw_classes(dataset, experiment.classes)
    if experiment.holdout is not None:
        dataset = data.hold_out(dataset, experiment.holdout)
    return take_parts(experiment, dataset)


def prepare_cars(settings: Settings, dataset: Dataset) -> tuple[Training, dict[str, Any]]:
    """Makes the network and its training for a run; see `prepare_training`."""
    experiment, channels = settings.experiment, dataset.train.images.shape[-1]
    shape = dict(num_classes=len(dataset.class_names), in_channels=channels, batch_norm=experiment.batch_norm)
    config = getattr(resnet, experiment.arch)(**shape, zero_gamma=experiment.zero_gamma)
    weights_key, augment_key = jax.random.split(jax.random.key(experiment.seed))
    params, batch_stats = initial_weights(settings, config, weights_key)
    network = resnet_network(experiment.arch, params, batch_stats, **shape)
    return prepare_training(settings, experiment.arch, dataset, network, augment_key)


def initial_weights(settings: Settings, config: resnet.ResNetConfig, key: jax.Array) -> tuple[Any, Any]:
    """Draws the weights, or reads those of --init and fits their dense layer and stem to the network.

    Returns:
      params and batch_stats as float32 NumPy arrays, the same for every framework and precision.
    """
    path = settings.experiment.init
    if path is None or settings.system.has_checkpoint:
        return jax.tree.map(np.asarray, resnet.init(config, key, jnp.float32))
    file = weights.read_file(path, settings.experiment.entry)
    dense, kernel = file.arrays.get("fc.weight"), file.arrays.get("conv1.weight", np.empty(0))
    matrix = dense is not None and dense.ndim == 2
    fits = matrix and len(dense) == config.num_classes and "fc.bias" in file.arrays
    new = dense is None or (matrix and not fits)  # "strict" refuses a dense layer that is not a matrix
    grey = kernel.ndim == 4 and kernel.shape[1] == 3 and config.in_channels == 1
    loaded = weights.fit(file, config, head="new" if new else "strict", stem="grey" if grey else "strict", key=key)
    notes = [f": {note}" for note in file.notes]
    if file.left_out:
        notes.append(f": left out {', '.join(file.left_out[:8])}{' …' if len(file.left_out) > 8 else ''}")
    if new:
        has = "no dense layer" if dense is None else f"{len(dense)} classes"
        notes.append(f" has {has}: a new dense layer is drawn for {config.num_classes}")
    if grey:
        notes.append(" has a stem for three channels: summed into one for grey pictures")
    for note in notes:
        print(f"{path}{note}")
    return jax.tree.map(lambda a: np.asarray(a, np.float32), loaded)
