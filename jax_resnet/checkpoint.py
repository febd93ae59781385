"""Checkpoints of a training: orbax writes them aside, renames them and keeps the right ones; here they are checked.

A checkpoint is <folder>/<step> with the arrays of the state under their paths ("params.layer1.0.conv1.weight",
"opt_state.0.mu.fc.bias"), and facts: JSON values of the caller's. Beside the facts stands what each array must be,
shape, type and CRC-32, since a file system may hand back other bytes than were written, and orbax would not notice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

PATTERN_CHARACTERS = set("[*\\")
UNFINISHED = "*orbax-checkpoint-tmp*"  # orbax's name for what it has not yet renamed


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written."""


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


class MismatchError(ValueError):
    """A checkpoint is of another training: names, shapes or types differ."""


class Restored(NamedTuple):
    """What a checkpoint held: the steps done, the state in NumPy arrays, the facts."""

    step: int
    state: Any
    facts: dict[str, Any]


class _LastAndBest:
    """Which ones stay. orbax's own BestN knows no score of a checkpoint that another process wrote."""

    def __init__(self, keep: int, scores: Mapping[int, float]):
        self._keep, self._scores = keep, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = max((step for step in steps if step in self._scores), key=lambda step: self._scores[step], default=None)
        last = sorted(steps)[-self._keep :]
        return [step in last or step == best for step in steps]


class Checkpoints:
    """The checkpoints of a run. With several processes each makes one and calls the same methods.

    Args:
      folder: made if it is not there; all processes must see the same.
      keep: how many of the last ones stay, at least 1; the one with the best score stays besides.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder).absolute()
        if bad := PATTERN_CHARACTERS & set(str(self.folder)):  # would be written, and not found again
            raise ValueError(f"{self.folder} cannot hold checkpoints: TensorStore reads no path with {min(bad)}")
        self._scores: dict[int, float] = {}
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastAndBest(keep, self._scores), cleanup_tmp_directories=True
        )
        self._manager: ocp.CheckpointManager | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            for step in self.steps():
                with contextlib.suppress(DamagedError):
                    if (score := self._record(step).get("score")) is not None:
                        self._scores.setdefault(step, score)
            self._manager = ocp.CheckpointManager(self.folder, options=self._options)
        return self._manager

    def save(self, step: int, state: Any, facts: Mapping[str, Any], *, score: float | None = None) -> None:
        """Begins to write a checkpoint; returns when the arrays are copied, and they may be changed or donated.

        Args:
          step: the steps done; the name. One that is there, undamaged, stays as it is and takes the score: the same
            steps make the same state, and between its end and the new one's there would be none.
          state: a tree of arrays, each whole on this process.
          facts: JSON values; they may be changed afterwards, too.
          score: larger is better; without one the checkpoint cannot be the best.

        Raises:
          CheckpointError: this one cannot be begun, or the one before could not be ended. Those written before are as
            they were, and the next call may succeed.
        """
        arrays = {name: np.asarray(leaf) for name, leaf in _named_leaves(state)}
        written = {name: [list(array.shape), str(array.dtype), _crc(array)] for name, array in arrays.items()}
        # Copied: orbax writes them while the caller goes on, who may change what is in them.
        record = {"facts": json.loads(json.dumps(facts)), "arrays": written, "score": score}
        record["crc"] = _crc_of_json(record)
        try:
            manager = self._open()
            manager.wait_until_finished()
            if score is not None:
                self._scores[step] = score
            if step in manager.all_steps():
                if self._is_undamaged(step):
                    return
                manager.delete(step)
            manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)),
                force=True,
            )
        except Exception as error:  # orbax's and TensorStore's are of many types
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Returns when the last checkpoint is complete on the disk.

        Raises:
          CheckpointError: it could not be ended.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(None, error) from error

    def _failed(self, step: int | None, error: Exception) -> CheckpointError:
        """Drops the manager, which counts what it could not write, and what that left half-written."""
        sys.unraisablehook = _without_closed_loops
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception:
                pass  # the same error again
        for path in self.unfinished():
            shutil.rmtree(path, ignore_errors=True)
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        last = self.steps()
        kept = f"the last good one is {self.folder / str(last[-1])}" if last else "there is no earlier one"
        return CheckpointError(f"{what} could not be written ({_reason(error)}); {kept}")

    def close(self) -> None:
        """Waits like `wait`, raises like it, and frees what orbax holds."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def unfinished(self) -> list[Path]:
        """What a process that was killed while writing has left; removed with the next `save`."""
        return sorted(self.folder.glob(UNFINISHED))

    def steps(self) -> list[int]:
        """The steps of all that have a complete name, the last one last; whether they are damaged is not known."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def _record(self, step: int) -> dict[str, Any]:
        try:
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                record = reader.restore(self.folder / str(step) / "record")
            crc = record.pop("crc")
        except Exception as error:
            raise DamagedError(f"{self.folder / str(step)} is damaged: {_reason(error)}") from error
        if crc != _crc_of_json(record):
            raise DamagedError(f"{self.folder / str(step)} is damaged: its record is not what was written")
        return record

    def _is_undamaged(self, step: int) -> bool:
        try:
            self.read(step)
        except DamagedError:
            return False
        return True

    def restore(self, step: int, template: Any) -> Restored:
        """Reads a checkpoint and checks every byte.

        Args:
          step: its name.
          template: a tree of arrays with the structure, shapes and types that are expected.

        Raises:
          MismatchError: it is undamaged, and of another structure, shape or type.
          DamagedError: a part is missing or not what was written.
        """
        expected = {name: [list(np.shape(leaf)), str(leaf.dtype)] for name, leaf in _named_leaves(template)}
        record = self._record(step)
        written = {name: facts[:2] for name, facts in record["arrays"].items()}
        if expected != written:
            names = sorted(expected.keys() | written.keys())
            different = [name for name in names if expected.get(name) != written.get(name)]
            raise MismatchError(
                f"{self.folder / str(step)} is of another training: {len(different)} arrays differ, the first is "
                f"{different[0]}: {_describe(written.get(different[0]))} there, "
                f"{_describe(expected.get(different[0]))} here"
            )
        arrays = self._arrays(step, record)
        leaves = [arrays[name] for name in expected]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(template), leaves), record["facts"])

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays of a checkpoint, {"params.conv1.weight": …}, and its facts.

        Raises:
          DamagedError: a part is missing or not what was written.
        """
        record = self._record(step)
        return self._arrays(step, record), record["facts"]

    def _arrays(self, step: int, record: dict[str, Any]) -> dict[str, np.ndarray]:
        path = self.folder / str(step)
        previous, sys.unraisablehook = sys.unraisablehook, _without_closed_loops
        try:
            template = {name: np.empty(shape, dtype) for name, (shape, dtype, _) in record["arrays"].items()}
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                arrays = reader.restore(path / "state", args=ocp.args.StandardRestore(template))
        except Exception as error:  # the hook stays: reads under way end later
            raise DamagedError(f"{path} is damaged: {_reason(error)}") from error
        sys.unraisablehook = previous
        for name, (*_, crc) in record["arrays"].items():
            if _crc(arrays[name]) != crc:
                raise DamagedError(f"{path} is damaged: {name} is not what was written")
        return arrays


def _without_closed_loops(unraisable: Any) -> None:
    """An unraisablehook: after a read or write that failed, each still under way finds its event loop closed."""
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """[("opt_state.0.mu.fc.bias", leaf), …] in the order of jax.tree.leaves."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _crc_of_json(values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _describe(what: list[Any] | None) -> str:
    return "none" if what is None else f"{tuple(what[0])} {what[1]}"


def _reason(error: Exception) -> str:
    """TensorStore's messages go over many lines; what the system said is in them as a number."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if unread := re.search(r'Error reading "([^"]+)/\.zarray"', str(error)):
        return f"{unread[1]} cannot be read"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
