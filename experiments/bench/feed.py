"""Whether pictures come as fast as a training step takes them: `python -m experiments.bench feed --data DIR`.

The step is that of `experiments.cars`, with augmentation and optimizer. "step alone" gets the same batch each time,
which lies on the device already; the others get theirs as that program does, from the cache in memory or decoded when
they are needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments.bench.options import NetworkSettings
from experiments.bench.results import Table, times_in_ms
from experiments.bench.turns import bound
from experiments.cli import parse_image_size
from experiments.data.augment import Augmentation, augment, normalize, to_unit_range
from experiments.data.dataset import Dataset, channel_statistics
from experiments.data.drawn_cars import drawn_cars
from experiments.data.stanford_cars import load_stanford_cars
from experiments.data.stream import Batches, put_ahead
from experiments.frameworks.common import Recipe, Training, make_training, resnet_network
from experiments.frameworks.optimizers import LEARNING_RATES, OptimizerName, make_schedule
from experiments.training.loop import count_steps
from jax_resnet import resnet

ALONE = "step alone"
DRAWN_CARS = 1500
PAUSE = 0.5  # seconds between turns, in which batches made ahead for the one before are finished


@dataclasses.dataclass(frozen=True)
class FeedBench(NetworkSettings):
    """Time the training step of experiments.cars on one batch, and fed with pictures in each way that there is.

    Ratios are of images/s to the step alone. Everything runs in this process, JAX alone; without --data on drawn cars,
    which are in memory.
    """

    data: Path | None = None
    """Folder of Stanford Cars in one of the layouts that experiments.cars reads."""
    opt: OptimizerName = "adabound"
    """The optimizer."""
    workers: int = 2
    """Processes that decode ahead, in the way that has them."""
    steps: int = 5
    """Steps a turn, after one to warm up."""


def run_feed_bench(bench: FeedBench) -> Iterator[Table]:
    """Its table."""
    with bound(bench.threads), contextlib.ExitStack() as open_batches:
        size = parse_image_size(bench.image_size)
        if bench.data is None:
            dataset = drawn_cars(size, train_count=DRAWN_CARS, test_count=1, grey=True, seed=0)
        else:
            dataset = load_stanford_cars(bench.data, size, grey=True)
        count_steps(dataset.train, bench.batch_size)  # refuses a batch that is too large
        training = make_jax_training(bench, dataset)

        def feed(dataset: Dataset, workers: int = 0) -> Iterator[tuple[Any, Any]]:
            batches = batches_for(bench, dataset, workers)
            return put_ahead(open_batches.enter_context(batches), training.put)

        feeds = {ALONE: itertools.repeat(next(feed(dataset))), "in memory": feed(dataset)}
        if bench.data is not None:
            lazy = load_stanford_cars(bench.data, size, grey=True, decode="lazy")
            feeds["--decode lazy"] = feed(lazy)
            feeds[f"--decode lazy --workers {bench.workers}"] = feed(lazy, bench.workers)
        state, metrics = training.train_step(training.state, *next(feeds[ALONE]))  # which compiles
        jax.block_until_ready(metrics)
        seconds = {name: np.empty((bench.rounds, 1)) for name in feeds}
        for number in tqdm(range(bench.rounds), desc="rounds", leave=False):
            for name, batches in feeds.items():
                time.sleep(PAUSE)
                state, _ = turn(training.train_step, state, batches, 1)
                state, taken = turn(training.train_step, state, batches, bench.steps)
                seconds[name][number] = taken / bench.steps
    rows = {}
    for name, times in seconds.items():
        rows[name] = {"ratio of images/s": float(np.median(seconds[ALONE] / times))}
        rows[name] |= times_in_ms(times)
        rows[name]["images/s"] = bench.batch_size / float(np.median(times))
    title = f"{bench.case._replace(channels=1)}, {bench.opt}, {dataset.title}: a training step of experiments.cars"
    yield Table(title, rows, ("images/s",), seconds)


def make_jax_training(bench: FeedBench, dataset: Dataset) -> Training:
    """The steps of `experiments.cars` on grey pictures, augmentation included."""
    shape = dict(num_classes=len(dataset.class_names), in_channels=1)
    weights_key, augment_key = jax.random.split(jax.random.key(0))
    drawn = jax.device_get(resnet.init(getattr(resnet, bench.arch)(**shape, zero_gamma=True), weights_key))
    mean, std = channel_statistics(dataset.train.images)

    def preprocess_test(images: Any) -> Any:
        return normalize(to_unit_range(images), mean, std)

    def preprocess_train(images: Any, step: Any) -> Any:
        images = augment(Augmentation(), jax.random.fold_in(augment_key, step), to_unit_range(images))
        return normalize(images, mean, std)

    learning_rate, steps = LEARNING_RATES[bench.opt], 1000
    recipe = Recipe(
        bench.opt,
        make_schedule("cosine", learning_rate, steps, warmup_steps=0),
        steps,
        base_lr=learning_rate,
        preprocess_train=preprocess_train,
        preprocess_test=preprocess_test,
        label_smoothing=0.1,
        precision=bench.precision,
    )
    return make_training("jax", resnet_network(bench.arch, *drawn, **shape), recipe)


def batches_for(bench: FeedBench, dataset: Dataset, workers: int) -> Batches:
    """As many as the benchmark takes; three are made ahead and never taken."""
    needed = bench.rounds * (bench.steps + 1) + 3
    epochs = -(-needed // count_steps(dataset.train, bench.batch_size))
    return Batches(dataset.train, bench.batch_size, 0, epochs=epochs, workers=workers, prefetch=max(2, 2 * workers))


def turn(train_step: Callable[..., Any], state: Any, batches: Iterator[Any], steps: int) -> tuple[Any, float]:
    """So many steps, whose metrics are read one step late, as in a training; the state after them, and the seconds."""
    start = time.perf_counter()
    running = None
    for images, labels in itertools.islice(batches, steps):
        ended = running
        state, running = train_step(state, images, labels)
        jax.device_get(ended)
    jax.block_until_ready(running)
    return state, time.perf_counter() - start
