"""The training loop that the programs here share: batches, steps, evaluation, progress."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from experiments.data.dataset import Dataset, Split
from experiments.metrics import macro_f1
from experiments.run_folder import RunFolder

Results = dict[str, np.ndarray]


class State(Protocol):
    """What the three frameworks' TrainState have in common: the count of steps, and two collections of arrays."""

    step: Any
    params: Any
    batch_stats: Any


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


def epoch_batches(split: Split, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of an epoch, in an order that depends on seed and epoch alone.

    A last, partial batch is left out: BatchNorm and jit would see another shape.

    Yields:
      images (batch_size, H, W, C) uint8 and labels (batch_size,) int32.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(split))
    for start in range(0, len(split) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield split.images[chosen], split.labels[chosen]


def evaluate(
    eval_step: Callable[..., Any],
    state: State,
    split: Split,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
) -> Results:
    """Runs the evaluation step over a whole split, in its order, with a progress bar; calls `check` between batches.

    Returns:
      per picture, each (N,): "loss", "prediction", "confidence", "top5".
    """
    results, running = [], None
    for start in tqdm(range(0, len(split), batch_size), desc="testing", leave=False, dynamic_ncols=True, disable=None):
        check()
        # The last batch is filled up with the first picture: one shape, one compilation.
        chosen = np.arange(start, start + batch_size)
        chosen[chosen >= len(split)] = 0
        ended = running
        running = eval_step(state.params, state.batch_stats, split.images[chosen], split.labels[chosen])
        if ended is not None:  # read one batch late; read at the end, dozens would run, and take memory, at once
            results.append(jax.device_get(ended))
    results.append(jax.device_get(running))
    return {name: np.concatenate([result[name] for result in results])[: len(split)] for name in results[0]}


def summarize(results: Results, labels: np.ndarray) -> dict[str, float]:
    """The test metrics of a run's metrics.jsonl; all but the loss are fractions from 0 to 1."""
    return {
        "test_loss": float(results["loss"].mean(dtype=np.float64)),
        "test_top1": float((results["prediction"] == labels).mean()),
        "test_top5": float(results["top5"].mean()),
        "test_macro_f1": macro_f1(labels, results["prediction"]),
    }


def count_steps(split: Split, batch_size: int) -> int:
    """The steps of an epoch.

    Raises:
      ValueError: if there is not one.
    """
    if batch_size > len(split):
        raise ValueError(f"--batch-size {batch_size} exceeds the {len(split)} training pictures")
    return len(split) // batch_size


def fit(
    state: State,
    train_step: Callable[..., tuple[State, dict[str, Any]]],
    eval_step: Callable[..., Any],
    dataset: Dataset,
    folder: RunFolder,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    log_every: int,
    report: Callable[[State, Results | None], None],
    report_seconds: float = 60.0,
) -> bool:
    """Trains, evaluates after each epoch, logs to the run's folder and shows a progress bar.

    Args:
      state, train_step, eval_step: see `jax_resnet.train`, numpy_ref.train and torch_ref.train; state is consumed.
      dataset: what to train and to test on.
      folder: takes a row every log_every steps and one at the end of each epoch.
      epochs, batch_size, seed: the batches are `epoch_batches(dataset.train, batch_size, seed, epoch)`.
      report: called with the state and the last test results (None before the first) after an epoch if the last call
        is report_seconds ago, and in any case at the end, also after Ctrl-C.

    Returns:
      whether all epochs were run; False after Ctrl-C.

    Raises:
      DivergedError: when a loss is not finite.
    """
    steps_per_epoch = count_steps(dataset.train, batch_size)
    results = None
    reported = started = time.perf_counter()
    seldom = 0.1 if sys.stderr.isatty() else 30.0  # seconds between two lines: a log file is no place for a bar
    images = epochs * steps_per_epoch * batch_size
    bar = tqdm(total=images, unit=" img", unit_scale=True, dynamic_ncols=True, mininterval=seldom)
    stop = StopRequest()

    def show_step() -> None:
        bar.update(batch_size)
        bar.set_postfix(loss=f"{meter.loss:.3f}", top1=f"{meter.top1:.1%}", refresh=False)
        if meter.steps % log_every == 0:
            folder.log(meter.row(log_every))

    try:
        for epoch in range(1, epochs + 1):
            bar.set_description(f"{dataset.title}, epoch {epoch}/{epochs}")
            meter = Meter(epoch, steps_per_epoch, batch_size, started)
            for images, labels in epoch_batches(dataset.train, batch_size, seed, epoch - 1):
                stop.check()
                state, metrics = train_step(state, images, labels)
                if meter.add(metrics, labels):
                    show_step()
            if meter.finish():
                show_step()
            row = meter.row(steps_per_epoch)
            results = evaluate(eval_step, state, dataset.test, batch_size, stop.check)
            row |= summarize(results, dataset.test.labels) | {"seconds": round(time.perf_counter() - started, 3)}
            folder.log(row)
            bar.write(
                f"epoch {epoch}/{epochs}: train loss {row['train_loss']:.3f} top-1 {row['train_top1']:.1%} "
                f"macro-F1 {row['train_macro_f1']:.1%} | "
                f"{dataset.title}, test loss {row['test_loss']:.3f} top-1 {row['test_top1']:.1%} "
                f"top-5 {row['test_top5']:.1%} macro-F1 {row['test_macro_f1']:.1%} | "
                f"{row['images_per_second']:.1f} images/s"
            )
            if time.perf_counter() - reported > report_seconds and epoch < epochs:
                report(state, results)
                reported = time.perf_counter()
        finished = True
    except KeyboardInterrupt:
        finished = False
    finally:
        stop.close()
        bar.close()
    report(state, results)
    return finished


class StopRequest:
    """Turns Ctrl-C into a KeyboardInterrupt at `check`, until closed; a second Ctrl-C acts at once.

    Python would raise it anywhere, also between a step's end and the assignment of its result. By then the step has
    consumed the old state, and nothing would be left to report.
    """

    def __init__(self):
        self.requested = False
        self._previous = None
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._previous = signal.signal(signal.SIGINT, self._request)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        tqdm.write("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        self.close()

    def check(self) -> None:
        if self.requested:
            raise KeyboardInterrupt

    def close(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


class Meter:
    """Collects the metrics of an epoch; JAX's are read one step late, so that the device never waits for us."""

    def __init__(self, epoch: int, steps_per_epoch: int, batch_size: int, started: float):
        self.epoch, self.steps_per_epoch, self.batch_size, self.started = epoch, steps_per_epoch, batch_size, started
        self.steps = 0
        self._running: tuple[dict[str, Any], np.ndarray] | None = None
        self._losses: list[float] = []
        self._top1s: list[float] = []
        self._labels: list[np.ndarray] = []
        self._predictions: list[np.ndarray] = []
        self._times = [time.perf_counter()]

    @property
    def loss(self) -> float:
        return float(np.mean(self._losses[-20:]))

    @property
    def top1(self) -> float:
        return float(np.mean(self._top1s[-20:]))

    def add(self, metrics: dict[str, Any], labels: np.ndarray) -> bool:
        """Takes a step's metrics, which may still be computed; returns whether a step, this or the last, has ended."""
        ended = self.finish()
        self._running = metrics, labels
        # NumPy's step has ended when it returns.
        return ended if isinstance(metrics["loss"], jax.Array) else self.finish()

    def finish(self) -> bool:
        """Waits for the step that is running, if any; returns whether there was one."""
        if self._running is None:
            return False
        metrics, labels = self._running
        loss = float(metrics["loss"])
        self._running = None
        self.steps += 1
        if not math.isfinite(loss):
            step = (self.epoch - 1) * self.steps_per_epoch + self.steps
            raise DivergedError(f"the loss is {loss} at step {step} (epoch {self.epoch}): try a lower --learning-rate")
        self._losses.append(loss)
        self._top1s.append(float(metrics["top1"]))
        self._labels.append(labels)
        self._predictions.append(np.asarray(metrics["prediction"]))
        self._times.append(time.perf_counter())
        return True

    def row(self, last: int) -> dict[str, float]:
        """The means over the last steps, as a row of metrics.jsonl. The first step of all, which compiles, is no part
        of the images per second, unless it is the only one."""
        done = (self.epoch - 1) * self.steps_per_epoch + self.steps
        times = self._times[-last - 1 :]
        if last >= self.steps and self.epoch == 1 and self.steps > 1:
            times = times[1:]
        return {
            "epoch": done / self.steps_per_epoch,
            "step": done,
            "train_loss": float(np.mean(self._losses[-last:])),
            "train_top1": float(np.mean(self._top1s[-last:])),
            "train_macro_f1": macro_f1(np.concatenate(self._labels[-last:]), np.concatenate(self._predictions[-last:])),
            "images_per_second": round((len(times) - 1) * self.batch_size / (times[-1] - times[0]), 2),
            "seconds": round(times[-1] - self.started, 3),
        }
