"""The metrics of an epoch: read one step late, averaged, and carried over a restart."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np


class NotFiniteError(RuntimeError):
    """A step's loss or gradients are not finite, and the step may not be skipped."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss is {loss}" if not math.isfinite(loss) else "the gradients are not finite")
        self.step = step


class Meter:
    """Collects the metrics of an epoch; JAX's are read one step late, so that the device never waits.

    Args:
      epoch: from 1.
      labels: (steps, batch_size) of the epoch's batches, in order.
      started: the time.perf_counter() that "seconds" count from.
      left_to_skip: how many more steps may be skipped before one raises NotFiniteError.
      earlier: what `facts` returned for the first steps of this epoch, if a run resumes within it.
    """

    def __init__(
        self,
        epoch: int,
        labels: np.ndarray,
        started: float,
        left_to_skip: int = 0,
        earlier: dict[str, Any] | None = None,
    ):
        self.epoch, self._labels, self._started, self._left_to_skip = epoch, labels, started, left_to_skip
        earlier = earlier or {"losses": [], "top1s": [], "predictions": []}
        self._losses: list[float] = [math.nan if loss is None else loss for loss in earlier["losses"]]
        self._top1s: list[float] = list(earlier["top1s"])
        self._predictions: list[np.ndarray] = [np.asarray(row, np.int32) for row in earlier["predictions"]]
        self._running: dict[str, Any] | None = None
        self._times = [time.perf_counter()]
        self._first = self.steps

    @property
    def steps(self) -> int:
        """How many steps of this epoch have ended."""
        return len(self._losses)

    @property
    def skipped(self) -> int:
        return _count_nan(self._losses)

    def facts(self) -> dict[str, Any]:
        """All collected metrics as JSON values, from which `earlier` restores the same numbers."""
        return {
            "losses": [None if math.isnan(loss) else loss for loss in self._losses],
            "top1s": self._top1s,
            "predictions": [row.tolist() for row in self._predictions],
        }

    def add(self, metrics: dict[str, Any]) -> bool:
        """Adds a step's metrics, which may still be computing; returns whether this or the previous step has ended."""
        ended = self.finish()
        self._running = metrics
        # Steps outside JAX have ended when they return.
        return ended if isinstance(metrics["loss"], jax.Array) else self.finish()

    def finish(self) -> bool:
        """Waits for the step that is running, if any; returns whether there was one.

        Raises:
          NotFiniteError: its loss or gradients are not finite, and no more steps may be skipped.
        """
        if self._running is None:
            return False
        metrics, self._running = self._running, None
        loss = float(metrics["loss"])
        if not (math.isfinite(loss) and metrics.get("finite", True)):
            if not self._left_to_skip:
                raise NotFiniteError(self._done() + 1, loss)
            self._left_to_skip -= 1
            loss = math.nan
        self._losses.append(loss)
        self._top1s.append(float(metrics["top1"]))
        self._predictions.append(np.asarray(metrics["prediction"]))
        self._times.append(time.perf_counter())
        return True

    def _done(self) -> int:
        """How many steps of the whole training have ended."""
        return (self.epoch - 1) * len(self._labels) + self.steps

    def means(self, last: int) -> dict[str, float]:
        """The mean loss of the last steps, without skipped ones, and the mean top-1 of all of them."""
        finite = [loss for loss in self._losses[-last:] if not math.isnan(loss)]
        return {
            "train_loss": float(np.mean(finite)) if finite else math.nan,
            "train_top1": float(np.mean(self._top1s[-last:])),
        }

    def row(self, last: int) -> dict[str, float]:
        """The means over the last steps, as a row of metrics.jsonl.

        The first step compiles, so images_per_second leaves it out unless it is the only one.
        """
        here = self.steps - self._first  # since the start or the restart
        times = self._times[-min(last, here) - 1 :]
        if last >= here and here > 1 and (self.epoch == 1 or self._first):
            times = times[1:]
        labels, predictions = self._labels[: self.steps][-last:], self._predictions[-last:]
        row = {"epoch": self._done() / len(self._labels), "step": self._done()} | self.means(last)
        row["train_macro_f1"] = macro_f1(labels.reshape(-1), np.concatenate(predictions))
        if len(times) > 1:
            row["images_per_second"] = round((len(times) - 1) * labels.shape[1] / (times[-1] - times[0]), 2)
        row["seconds"] = round(self._times[-1] - self._started, 3)
        skipped = _count_nan(self._losses[-last:])
        return row | ({"skipped": skipped} if skipped else {})


def _count_nan(losses: list[float]) -> int:
    return sum(map(math.isnan, losses))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean over classes of F1 = 2 · true positives / (labelled + predicted); labels and predictions (N,) int.

    Classes that occur in neither are left out; a class that occurs but is never predicted correctly counts as 0.
    """
    classes = int(max(labels.max(), predictions.max())) + 1
    labelled, predicted, right = (
        np.bincount(numbers, minlength=classes) for numbers in (labels, predictions, labels[labels == predictions])
    )
    occurs = labelled + predicted > 0
    return float((2 * right[occurs] / (labelled + predicted)[occurs]).mean())


SKIPPED = 3  # steps: the first one compiles, the next ones fill queues


class Profile:
    """Records `steps` steps into a folder with jax.profiler, after the first SKIPPED of the run."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self._steps, self._seen, self._running = folder, steps, 0, False

    def before_step(self) -> None:
        """Must be called before each step."""
        if self._seen == SKIPPED:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        elif self._seen == SKIPPED + self._steps:
            self.close()
        self._seen += 1

    def close(self) -> None:
        """Ends the recording, even if the run ends before all its steps are recorded."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
        elif self._seen <= SKIPPED:
            print(f"warning: --profile begins after {SKIPPED} steps, but the run had {self._seen}", file=sys.stderr)
