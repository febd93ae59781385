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
from experiments.data.dataset import Dataset
from experiments.data.stream import Batches, put_ahead
from experiments.frameworks.experiment import LEARNING_RATES, OptimizerName
from experiments.training.loop import count_steps
from experiments.training.prepare import load_cars, prepare_cars
from experiments.training.settings import PRESETS, Settings

ALONE = "step alone"
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
    steps: int = 5
    """Steps a turn, after one to warm up."""


def run_feed_bench(bench: FeedBench) -> Iterator[Table]:
    """Its table."""
    with bound(bench.threads), contextlib.ExitStack() as open_batches:
        settings = settings_of_cars(bench)
        dataset = load_cars(settings)
        training, _ = prepare_cars(settings, dataset)
        feeds = {ALONE: itertools.repeat(next(feed(bench, settings, dataset, training.put, open_batches)))}
        feeds["in memory"] = feed(bench, settings, dataset, training.put, open_batches)
        if bench.data is not None:
            lazy = load_cars(settings.replace(decode="lazy"))
            feeds["--decode lazy"] = feed(bench, settings, lazy, training.put, open_batches)
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


def settings_of_cars(bench: FeedBench) -> Settings:
    """What `experiments.cars` would be told.

    Raises:
      ValueError: for settings that it refuses.
    """
    settings = Settings(PRESETS["cars96" if bench.data else "demo"]).replace(
        data=bench.data,
        arch=bench.arch,
        opt=bench.opt,
        learning_rate=LEARNING_RATES[bench.opt],
        batch_size=bench.batch_size,
        image_size=bench.image_size,
        precision=bench.precision,
    )
    settings.check()
    return settings


def feed(
    bench: FeedBench, settings: Settings, dataset: Dataset, put: Callable[..., Any], open_batches: contextlib.ExitStack
) -> Iterator[tuple[Any, Any]]:
    """The batches on the device, as many as the benchmark takes."""
    needed = bench.rounds * (bench.steps + 1) + 3  # three are made ahead and never taken
    epochs = -(-needed // count_steps(dataset.train, bench.batch_size))
    batches = Batches(dataset.train, bench.batch_size, settings.experiment.seed, epochs=epochs)
    return put_ahead(open_batches.enter_context(batches), put)


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
