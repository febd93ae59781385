"""Whether pictures arrive as fast as a training step needs them: `python -m experiments.bench feed --data DIR`.

The step is that of `experiments.cars`, with augmentation and optimizer. "step alone" gets the same batch each time,
already on the device. The other row gets batches as that program does, from the cache in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from experiments.bench.benchmark import BenchSettings, Table, times
from experiments.bench.turns import bound
from experiments.frameworks.experiment import LEARNING_RATES, OptimizerName

if TYPE_CHECKING:
    from experiments.data.dataset import Dataset

ALONE = "step alone"
PAUSE = 0.5  # seconds between turns, in which batches prepared ahead for the previous turn are finished


@dataclasses.dataclass(frozen=True)
class FeedBench(BenchSettings):
    """Time the training step of experiments.cars on one batch, and with each way of feeding pictures.

    Ratios are of images/s, relative to the step alone. Everything runs in this process, with JAX only. Without --data
    the pictures are drawn cars in memory.
    """

    data: Path | None = None
    """Folder of Stanford Cars in one of the layouts that experiments.cars reads."""
    opt: OptimizerName = "adabound"
    """The optimizer."""
    steps: int = 5
    """Steps per turn, after one step to warm up."""

    def run(self) -> Iterator[Table]:
        """Yields its only table."""
        with bound(self.threads), contextlib.ExitStack() as open_batches:
            yield self._measure(open_batches)

    def _measure(self, open_batches: contextlib.ExitStack) -> Table:
        import jax

        from experiments.data.stream import put_ahead, training_batches
        from experiments.training.loop import count_steps
        from experiments.training.prepare import load_cars, prepare_cars
        from experiments.training.settings import PRESETS, Settings

        settings = Settings(PRESETS["cars96" if self.data else "demo"]).replace(
            data=self.data,
            arch=self.arch,
            opt=self.opt,
            learning_rate=LEARNING_RATES[self.opt],
            batch_size=self.batch_size,
            image_size=self.image_size,
            precision=self.precision,
        )
        settings.check()
        dataset = load_cars(settings)
        training, _ = prepare_cars(settings, dataset)

        def feed(dataset: Dataset) -> Iterator[tuple[Any, Any]]:
            needed = self.rounds * (self.steps + 1) + 3  # three are made ahead and never taken
            epochs = -(-needed // count_steps(dataset.train, self.batch_size))
            batches = training_batches(dataset.train, self.batch_size, settings.experiment.seed, epochs=epochs)
            return put_ahead(open_batches.enter_context(contextlib.closing(batches)), training.put)

        feeds = {ALONE: itertools.repeat(next(feed(dataset))), "in memory": feed(dataset)}
        state = training.state

        def turn(batches: Iterator[Any], steps: int) -> float:
            """The seconds of some steps; metrics are read one step late, as in training."""
            nonlocal state
            start, running = time.perf_counter(), None
            for images, labels in itertools.islice(batches, steps):
                ended = running
                state, running = training.train_step(state, images, labels)
                jax.device_get(ended)
            jax.block_until_ready(running)
            return time.perf_counter() - start

        turn(feeds[ALONE], 1)  # compiles the step
        seconds = {name: np.empty((self.rounds, 1)) for name in feeds}
        for number in tqdm(range(self.rounds), desc="rounds", leave=False):
            for name, batches in feeds.items():
                time.sleep(PAUSE)
                turn(batches, 1)
                seconds[name][number] = turn(batches, self.steps) / self.steps
        rows = {}
        for name, of_feed in seconds.items():
            rows[name] = {"ratio of images/s": float(np.median(seconds[ALONE] / of_feed))}
            rows[name] |= times(of_feed)
            rows[name]["images/s"] = self.batch_size / float(np.median(of_feed))
        title = f"{self.case._replace(channels=1)}, {self.opt}, {dataset.title}: a training step of experiments.cars"
        return Table(title, rows, ("images/s",), seconds)
