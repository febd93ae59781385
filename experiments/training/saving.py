"""When a run writes checkpoints, what they record about it, and how a run resumes from one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.frameworks.common import Training
from experiments.frameworks.experiment import flag
from experiments.training.processes import warn
from experiments.training.run_folder import CHECKPOINTS, CONFIG, WEIGHTS, package_versions
from experiments.training.settings import RunSettings, System
from jax_resnet.checkpoint import CheckpointError, Checkpoints, DamagedError, Restored

NUMERIC_PACKAGES = ("jax", "jaxlib", "optax", "numpy")
DATA_FACTS = {"class_names": "classes", "mean": "mean", "std": "deviation", "image_size": "picture size"}


class Progress(NamedTuple):
    """The progress of a run, kept beside its state as JSON values.

    seconds: since the start, without the time between a stop and a restart.
    """

    epoch: int = 0  # the last epoch that has ended and is logged
    meter: dict[str, Any] | None = None  # `Meter.facts` of an unfinished epoch
    rows: int = 0  # lines of metrics.jsonl
    seconds: float = 0.0
    best: float | None = None  # the best score so far


class Saver:
    """Writes a run's checkpoints; a failure is a warning and not an error, so that the run continues.

    Args:
      checkpoints: None if none are to be written.
      system: how often to write one within an epoch.
      facts: JSON values about the run; each checkpoint holds them, so that its weights can be used alone.
      step: that of the checkpoint from which the run resumes.
    """

    def __init__(
        self, checkpoints: Checkpoints | None, system: System, facts: Mapping[str, Any], step: int | None = None
    ):
        self.checkpoints, self._system, self._facts = checkpoints, system, dict(facts)
        self._saved, self._last_step, self._last_time = step, step or 0, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint; all processes get the same answer."""
        if self.checkpoints is None:
            return False
        every = self._system.checkpoint_steps
        if every and step - self._last_step >= every:
            return True
        late = time.monotonic() - self._last_time >= 60 * self._system.checkpoint_minutes
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            # The clock of process 0 decides, every 16 steps.
            late = step % 16 == 0 and bool(multihost_utils.broadcast_one_to_all(late))
        return late

    def save(self, state: Any, progress: Progress, *, score: float | None = None) -> None:
        """Starts writing a checkpoint."""
        if self.checkpoints is None:
            return
        step = int(state.step)
        self.wait()  # so that a failure of the previous checkpoint is not reported as one of this one
        if _done(lambda: self.checkpoints.save(step, state, progress._asdict() | self._facts, score=score)):
            self._saved = step
        self._last_step, self._last_time = step, time.monotonic()

    def has(self, step: int) -> bool:
        """Whether the latest checkpoint is that of this step, and written; True if the run writes none."""
        return self.checkpoints is None or (self._saved == step and self.wait())

    def wait(self) -> bool:
        """Waits for the latest checkpoint; returns whether it is written."""
        return self.checkpoints is None or _done(self.checkpoints.wait)

    def close(self) -> None:
        self.wait()
        if self.checkpoints is not None:
            self.checkpoints.close()


def _done(action: Callable[[], None]) -> bool:
    """Runs an action; returns whether it succeeded, and warns if it did not."""
    try:
        action()
    except CheckpointError as error:
        warn(str(error))
        return False
    return True


def restore_run(settings: RunSettings, training: Training, out: Path, config: dict[str, Any]) -> Restored | None:
    """Restores the last good checkpoint of the run to resume and prints which one it is; None for a new run.

    Raises a ValueError if the run in the folder has another `config`, or if the processes differ.
    """
    restored = None
    if settings.system.resume:
        if (out / CONFIG).exists():
            refuse_other_run(out, json.loads(json.dumps(config)), settings)
        restored = last_good(out, training.state)
    refuse_other_processes(config, restored)
    if restored is not None:
        ended = restored.facts["epoch"] >= settings.experiment.epochs
        doing = "nothing is left to train after" if ended else "going on at"
        print(f"{doing} step {restored.step} with {out / CHECKPOINTS / str(restored.step)}")
    return restored


def last_good(out: Path, template: Any) -> Restored | None:
    """Restores the last undamaged checkpoint of a run, None if there are no checkpoints; names damaged ones on stderr.

    Raises a ValueError if the checkpoint is of another training, or if all are damaged.
    """
    path = out / CHECKPOINTS
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is no folder")
    checkpoints = Checkpoints(path)
    for half in checkpoints.unfinished():
        print(f"{half} is half-written: it is not used", file=sys.stderr)
    steps = checkpoints.steps()
    for step in reversed(steps):
        try:
            restored = checkpoints.restore(step, template)
        except DamagedError as error:
            print(f"{error}: it is not used", file=sys.stderr)
            continue
        if missing := {*Progress._fields, "settings"} - set(restored.facts):
            raise ValueError(f"{path / str(step)} is not of a run of this program: it does not record {min(missing)!r}")
        return restored
    if steps:
        raise ValueError(f"no checkpoint in {path} can be read: move the folder away to begin again")
    print(f"{out} has no complete checkpoint: starting at step 0")
    return None


def refuse_other_processes(config: dict[str, Any], restored: Restored | None) -> None:
    """Raises a ValueError unless all processes train the same; otherwise their states would silently differ."""
    if jax.process_count() == 1:
        return
    settings = {name: value for name, value in config["settings"].items() if name != "process_id"}
    same = [settings, config["input"], config["data"]["train_used"], restored.step if restored else None]
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).digest()
    from jax.experimental import multihost_utils

    try:
        multihost_utils.assert_equal(np.frombuffer(digest, np.uint8))
    except AssertionError:
        raise ValueError("the processes differ in settings, data or checkpoint: start all with the same ones") from None


def refuse_other_run(out: Path, config: dict[str, Any], settings: RunSettings) -> None:
    """Raises a ValueError that names the settings in which the folder's run differs; warns of other versions."""
    try:
        earlier = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        there, data = earlier["settings"], earlier["input"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out / CONFIG} cannot be read ({error}): --resume cannot know what run this was") from error
    if there.get("keep") == 0:
        raise ValueError(f"{out} holds a run without checkpoints, made with --keep 0: only --overwrite starts it again")
    different = []
    for field in dataclasses.fields(settings.experiment):
        # A run that started before a setting existed was trained with its default.
        earlier_value, value = there.get(field.name, field.default), config["settings"][field.name]
        needless = field.name in ("init", "entry") and settings.system.has_checkpoint
        if earlier_value != value and not needless:
            different.append(f"{flag(field.name)} {earlier_value} there, {value} here")
    if not different:
        different = [
            f"the data's {what}" for name, what in DATA_FACTS.items() if data.get(name) != config["input"][name]
        ]
        if earlier.get("data", {}).get("train_used") != config["data"]["train_used"]:
            different.append("the number of training pictures")
    if different:
        source = out / WEIGHTS if (out / WEIGHTS).exists() else out
        begin = f" with --init {source}" if hasattr(settings.experiment, "init") else ""
        raise ValueError(
            f"{out} holds a run with other settings: {'; '.join(different)}. --resume continues with the same ones; to "
            f"train with these, begin a run in another --out{begin}"
        )
    then, now = earlier.get("versions", {}), package_versions()
    changed = [name for name in NUMERIC_PACKAGES if name in then and now.get(name) != then[name]]
    reasons = [", ".join(f"{name} {then[name]} then, {now.get(name)} now" for name in changed)]
    if earlier.get("device") != config["device"]:
        reasons.append(f"it ran on {earlier.get('device')}, and continues on {config['device']}")
    for reason in filter(None, reasons):
        warn(f"no longer bit-identical to an uninterrupted run: {reason}")
