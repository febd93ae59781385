"""Trains a ResNet on pictures of cars: Stanford Cars where you have them, drawn cars where you have not.

    python -m experiments.cars --opt adabound                    # draws its own cars: ResNet-101, minutes on a CPU
    python -m experiments.cars --opt adabound --data DIR         # Stanford Cars, grey 96x96 crops (preset cars96)
    python -m experiments.cars --compare jax,torch --epochs 1    # in turn, and their curves over one another

A run leaves a folder with its settings, metrics, curves, some predictions and the weights.
"""

from __future__ import annotations

from experiments.machine import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # before all that would be imported twice

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import exit_code, parse_image_size
from experiments.data.augment import Augmentation, augment, normalize, to_unit_range
from experiments.data.dataset import (
    DataError,
    Dataset,
    balanced_subset,
    channel_statistics,
    draw_classes,
    hold_out,
    limit_test,
)
from experiments.data.drawn_cars import drawn_cars
from experiments.data.layouts import LAYOUTS
from experiments.data.stanford_cars import load_stanford_cars
from experiments.frameworks.common import TITLES, Recipe, State, Training, make_training, resnet_network, weights_dtype
from experiments.frameworks.optimizers import make_schedule
from experiments.machine import use_compilation_cache
from experiments.training import step_sizes
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
from experiments.training.run_folder import STEP_SIZES, refuse_earlier_run
from experiments.training.settings import DATA_VARIABLE, Settings, parse_settings
from experiments.training.side_by_side import train_and_compare
from jax_resnet import resnet, weights

DRAWINGS = dict(train_count=1500, test_count=600)
CONTESTANTS = {name: {"framework": name, "model": "torch_ref"} for name in TITLES} | {
    "torchvision": {"framework": "torch", "model": "torchvision"}
}


def load_data(settings: Settings) -> Dataset:
    """Stanford Cars, or drawn cars for the demo; --classes, --holdout, --limit and --test-limit take parts of them.

    Raises:
      DataError: if the folder holds nothing usable.
      ValueError: for parts that there are not.
    """
    size = parse_image_size(settings.image_size)
    if settings.preset == "demo":
        dataset = drawn_cars(size, **DRAWINGS, grey=settings.grey, seed=settings.seed)
    elif settings.data is None:
        raise DataError(
            f"--preset {settings.preset} needs pictures: pass --data DIR or set ${DATA_VARIABLE}. Layouts:\n{LAYOUTS}"
        )
    else:
        dataset = load_stanford_cars(
            settings.data, size, settings.grey, skip_bad=settings.skip_bad, decode=settings.decode
        )
    if settings.classes is not None:
        dataset = draw_classes(dataset, settings.classes)
    if settings.holdout is not None:
        dataset = hold_out(dataset, settings.holdout)
    if settings.limit is not None:
        dataset = dataclasses.replace(dataset, train=balanced_subset(dataset.train, settings.limit, settings.seed))
    return dataset if settings.test_limit is None else limit_test(dataset, settings.test_limit)


def initial_weights(settings: Settings, config: resnet.ResNetConfig, key: jax.Array) -> tuple[Any, Any]:
    """Draws the weights, or reads them from --init; a new dense layer or a grey stem where the file's differ.

    Returns:
      params and batch_stats, NumPy arrays in float32: the same whatever computes, in which precision.
    """
    if settings.init is None:
        return jax.tree.map(np.asarray, resnet.init(config, key, jnp.float32))
    arrays = weights.read_arrays(settings.init)
    dense, kernel = arrays.get("fc.weight", np.empty(0)), arrays.get("conv1.weight", np.empty(0))
    head = "new" if dense.ndim == 2 and len(dense) != config.num_classes else "strict"
    stem = "grey" if kernel.ndim == 4 and kernel.shape[1] == 3 and config.in_channels == 1 else "strict"
    if head == "new":
        print(f"{settings.init} has {len(dense)} classes: a new dense layer is drawn for {config.num_classes}")
    if stem == "grey":
        print(f"{settings.init} has a stem for three channels: summed into one for grey pictures")
    loaded = weights.load(settings.init, config, head=head, stem=stem, key=key)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), loaded)


def prepare(settings: Settings, dataset: Dataset) -> tuple[Training, dict[str, Any]]:
    """Network, optimizer and the two steps for a run, in the framework that the settings name.

    Returns:
      the training, and what a weight file must tell about its network and its input.
    """
    channels = dataset.train.images.shape[-1]
    mean, std = (
        channel_statistics(dataset.train.images) if settings.normalize else (np.zeros(channels), np.ones(channels))
    )
    shape = dict(num_classes=len(dataset.class_names), in_channels=channels, batch_norm=settings.batch_norm)
    config = getattr(resnet, settings.arch)(**shape, zero_gamma=settings.zero_gamma)
    weights_key, augment_key = jax.random.split(jax.random.key(settings.seed))
    params, batch_stats = initial_weights(settings, config, weights_key)
    torchvision = settings.model == "torchvision"
    network = resnet_network(settings.arch, params, batch_stats, **shape, torchvision=torchvision)
    changes = Augmentation(place=settings.augmentation)

    def preprocess_test(images):
        return normalize(to_unit_range(images, weights_dtype(settings.precision)), mean, std)

    @jax.jit  # for NumPy and PyTorch; JAX's step traces through it
    def augmented(images, step):
        key = jax.random.fold_in(augment_key, step)  # by the step: a resumed run sees the same pictures
        return normalize(augment(changes, key, to_unit_range(images, weights_dtype(settings.precision))), mean, std)

    def preprocess_train(images, step):
        return preprocess_test(images) if settings.augmentation == "none" else augmented(images, step)

    steps_per_epoch = count_steps(dataset.train, settings.batch_size)
    steps = settings.epochs * steps_per_epoch
    warmup_steps = round(settings.warmup_epochs * steps_per_epoch)
    recipe = Recipe(
        settings.opt,
        make_schedule(settings.schedule, settings.learning_rate, steps, warmup_steps),
        steps,
        base_lr=settings.learning_rate,
        preprocess_train=preprocess_train,
        preprocess_test=preprocess_test,
        final_lr=settings.final_lr,
        gamma=settings.gamma,
        momentum=settings.momentum,
        dampening=settings.dampening,
        weight_decay=settings.weight_decay,
        label_smoothing=settings.label_smoothing,
        loss_scale=settings.loss_scale,
        freeze_backbone=settings.freeze == "backbone",
        **system_options(settings),
    )
    return make_training(settings.framework, network, recipe), describe_input(settings.arch, dataset, mean, std)


def write_report(
    settings: Settings,
    dataset: Dataset,
    title: str,
    training: Training,
    description: dict[str, Any],
    path: Path,
    state: State,
    results: Results | None,
) -> None:
    """Writes the weights and the pictures of a run into its folder: curves, predictions, and step sizes."""
    write_weights(path, training, state, description)
    plot_report(path, title, dataset, results)
    if settings.opt != "sgd" and int(state.step):
        steps = step_sizes.layer_steps(training.moments(state), **bounds_of(settings))
        (path / "step_sizes.json").write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
        step_sizes.plot_layer_steps(path / STEP_SIZES, steps, title)


def bounds_of(settings: Settings) -> dict[str, float]:
    """What AdaBound's bounds follow from, as `step_sizes` takes it."""
    return dict(base_lr=settings.learning_rate, final_lr=settings.final_lr, gamma=settings.gamma, b1=settings.momentum)


def observe(settings: Settings, training: Training, state: State) -> dict[str, float]:
    """What an epoch's row of metrics says of the steps that the weights get."""
    if settings.opt == "sgd" or not int(state.step):
        return {}
    bounded = settings.opt in step_sizes.BOUNDED
    return step_sizes.summarize_steps(training.moments(state), **bounds_of(settings), bounded=bounded)


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
    steps_per_epoch = count_steps(dataset.train, settings.batch_size)  # before weights are drawn for nothing
    if settings.gamma_times_steps is not None:
        settings = dataclasses.replace(settings, gamma=settings.gamma_times_steps / (settings.epochs * steps_per_epoch))
    network = f"torchvision's {settings.arch}" if settings.model == "torchvision" else settings.arch
    if settings.framework != "jax":
        network += f" in {TITLES[settings.framework]}"
    title = title_of(network, settings.opt, dataset, settings.limit)
    with jax.enable_x64(settings.precision == "float64"):
        training, description = prepare(settings, dataset)
        compiles = "; the first step compiles" if settings.framework == "jax" else ""
        print(f"{title}: {len(dataset.train):,} pictures to train, {settings.epochs} epochs{compiles}")
        return train_and_report(
            settings,
            dataset,
            training,
            title=title,
            name=f"{dataset.title}-{network}-{settings.opt}".replace("'", ""),
            description=description,
            write_report=functools.partial(write_report, settings, dataset, title, training, description),
            observe=functools.partial(observe, settings, training),
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse_settings(arguments)))


if __name__ == "__main__":
    use_compilation_cache()
    sys.exit(main())
