"""When a run writes checkpoints, what it writes about itself into them, and how it goes on from one."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from experiments.training.run_folder import CHECKPOINTS
from jax_resnet.checkpoint import CheckpointError, Checkpoints, DamagedError, Restored

AGREE_EVERY = 16  # steps between two looks at the clock of process 0, with several processes


class Progress(NamedTuple):
    """Where a run stands, beside the state; all of it is JSON.

    epoch: epochs that have ended, tested and logged.
    meter: `Meter.facts` of the epoch under way.
    rows: lines of metrics.jsonl.
    seconds: since the start, without the time between a stop and its restart.
    best: the best score so far, None before the first.
    """

    epoch: int = 0
    meter: dict[str, Any] | None = None
    rows: int = 0
    seconds: float = 0.0
    best: float | None = None


class Saver:
    """Writes a run's checkpoints.

    Args:
      folder: the run's.
      keep: the last so many, and the best; 0 writes none.
      every_steps, every_minutes: how often within an epoch; None: not.
      step: of the checkpoint that the run goes on from.
      settings: of the run, kept in each checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        step: int | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, keep=keep) if keep else None
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._saved, self._settings = step, settings or {}
        self._last_step, self._last_time = step or 0, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time; with several processes the answer is the same in all."""
        if self.checkpoints is None:
            return False
        if self._every_steps and step - self._last_step >= self._every_steps:
            return True
        if not self._every_minutes:
            return False
        late = time.monotonic() - self._last_time >= 60 * self._every_minutes
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return step % AGREE_EVERY == 0 and bool(multihost_utils.broadcast_one_to_all(late))
        return late

    def save(self, state: Any, progress: Progress, *, score: float | None = None) -> bool:
        """Begins a checkpoint; what goes wrong is said, not raised: the run is worth more. Returns whether it began."""
        if self.checkpoints is None:
            return False
        step = int(state.step)
        self.wait()  # says of the one before, and not of this one, if it could not be ended
        try:
            self.checkpoints.save(step, state, progress._asdict() | {"settings": self._settings}, score=score)
        except CheckpointError as error:
            tqdm.write(f"warning: {error}", file=sys.stderr)
            return False
        finally:
            self._last_step, self._last_time = step, time.monotonic()
        self._saved = step
        return True

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step was the last to be written, and is on the disk; True if none are wanted."""
        return self.checkpoints is None or (self._saved == step and self.wait())

    def wait(self) -> bool:
        """Returns when the last checkpoint is on the disk: whether it is."""
        if self.checkpoints is None:
            return True
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            tqdm.write(f"warning: {error}", file=sys.stderr)
            return False
        return True

    def close(self) -> None:
        if self.checkpoints is not None:
            self.wait()
            self.checkpoints.close()


def last_good(checkpoints: Checkpoints, template: Any) -> Restored | None:
    """The last checkpoint that is undamaged, None if there is none; the others are named on stderr.

    Raises:
      MismatchError: it is of another training.
    """
    for path in checkpoints.unfinished():
        print(f"{path} is half-written: it is not used", file=sys.stderr)
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.restore(step, template)
        except DamagedError as error:
            print(f"{error}: it is not used", file=sys.stderr)
    return None
