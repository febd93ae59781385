"""Checkpoints of a training run. A thread writes each one under a temporary name and then renames it.

A process that is killed while it writes therefore never damages an earlier checkpoint.

A checkpoint is the folder <folder>/<step>. The file state.safetensors holds the arrays of the state under their paths
("params.layer1.0.conv1.weight", "opt_state.0.mu.fc.bias"). The file record.json holds the caller's facts (JSON values),
the score, and the shape, type and CRC-32 of each array. The checksum reveals a file that changed on the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

__all__ = ["RECORD", "STATE", "CheckpointError", "Checkpoints", "DamagedError", "MismatchError", "Restored"]

STATE, RECORD = "state.safetensors", "record.json"
_UNFINISHED, _REMOVED = ".unfinished", ".removed"  # suffixes of folders that are being written or deleted


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written."""


class DamagedError(ValueError):
    """A file of a checkpoint is missing or differs from what was written."""


class MismatchError(ValueError):
    """A checkpoint belongs to another training, whose names, shapes or types differ, or has another format."""


class Restored(NamedTuple):
    """The contents of a checkpoint: the number of steps done, the state in NumPy arrays, and the facts."""

    step: int
    state: Any
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run.

    With several processes, every process creates this object and calls the same methods. Only process 0 writes.

    Args:
      folder: the first `save` creates it; all processes must see the same folder.
      keep: the number of latest checkpoints to keep, at least 1. The checkpoint with the best score also stays.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self._keep = Path(folder).absolute(), keep
        self._writer: ThreadPoolExecutor | None = None
        self._pending: tuple[int, Future] | None = None

    def save(self, step: int, state: Any, facts: Mapping[str, Any], *, score: float | None = None) -> None:
        """Starts to write a checkpoint. Returns when the arrays are copied: the caller may then change or donate them.

        Args:
          step: the number of steps done, which is the checkpoint's name. If an undamaged checkpoint of this step
            exists, it stays and takes only the new score: the new state and the new facts are dropped.
          state: a tree of arrays that are complete on this process.
          facts: JSON values; the caller may change them afterwards.
          score: larger is better; None keeps this checkpoint from being the best.

        Raises:
          CheckpointError: this checkpoint cannot be started, or writing the one before failed. Earlier checkpoints are
            unchanged, and the next call may succeed.
        """
        self.wait()
        if jax.process_index() > 0:
            return
        arrays = {name: np.array(leaf, order="C") for name, leaf in _named_leaves(state)}
        facts = json.loads(json.dumps(facts))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._failed(step, error) from error
        self._writer = self._writer or ThreadPoolExecutor(1, "checkpoint")
        self._pending = step, self._writer.submit(self._write, step, arrays, facts, score)

    def wait(self) -> None:
        """Returns when the last checkpoint is written and has its final name (its data may be in the system's cache).

        Raises:
          CheckpointError: writing the checkpoint failed.
        """
        if self._pending is None:
            return
        step, written = self._pending
        try:
            written.result()
        except Exception as error:  # safetensors raises a type of its own
            self._pending = None
            raise self._failed(step, error) from error
        self._pending = None

    def close(self) -> None:
        """Does what `wait` does, and ends the thread."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    def unfinished(self) -> list[Path]:
        """The folders that a process left when it was killed while writing; the next `save` removes them."""
        return sorted(self.folder.glob(f"*{_UNFINISHED}"))

    def steps(self) -> list[int]:
        """The steps of all checkpoints with a final name, in ascending order. Some may be damaged."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def restore(self, step: int, template: Any) -> Restored:
        """Reads a checkpoint and checks every byte.

        Args:
          step: the checkpoint's name.
          template: a tree of arrays with the expected structure, shapes and types.

        Raises:
          MismatchError: the record is undamaged but has another structure, shape or type, or an earlier version wrote
            the checkpoint. The arrays are not read.
          DamagedError: a file is missing or differs from what was written.
        """
        expected = {name: [list(np.shape(leaf)), str(leaf.dtype)] for name, leaf in _named_leaves(template)}
        record = self._record(step)
        written = {name: facts[:2] for name, facts in record["arrays"].items()}
        if expected != written:
            names = sorted(expected.keys() | written.keys())
            different = [name for name in names if expected.get(name) != written.get(name)]
            raise MismatchError(
                f"{self.folder / str(step)} belongs to another training: {len(different)} arrays differ, the first is "
                f"{different[0]}: {_describe(written.get(different[0]))} there, "
                f"{_describe(expected.get(different[0]))} here"
            )
        arrays = self._arrays(step, record)
        leaves = [arrays[name] for name in expected]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(template), leaves), record["facts"])

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns the arrays of a checkpoint, {"params.conv1.weight": …}, and its facts.

        Raises:
          MismatchError: an earlier version wrote the checkpoint.
          DamagedError: a file is missing or differs from what was written.
        """
        record = self._record(step)
        return self._arrays(step, record), record["facts"]

    def _write(self, step: int, arrays: dict[str, np.ndarray], facts: Any, score: float | None) -> None:
        for pattern in (f"*{_UNFINISHED}", f"*{_REMOVED}"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)
        path, aside = self.folder / str(step), self.folder / f"{step}{_UNFINISHED}"
        if path.exists():
            try:
                record = self._record(step)
                self._arrays(step, record)
                return _write_record(path, record if score is None else record | {"score": score})
            except (DamagedError, MismatchError):
                self._remove(step)
        aside.mkdir()
        # The file holds NumPy's own types only: bfloat16 and similar types are stored as unsigned integers.
        plain = {name: a.view(f"u{a.itemsize}") if a.dtype.kind == "V" else a for name, a in arrays.items()}
        safetensors.numpy.save_file(plain, aside / STATE)
        written = {name: [list(a.shape), str(a.dtype), _crc(a)] for name, a in arrays.items()}
        _write_record(aside, {"facts": facts, "arrays": written, "score": score})
        aside.rename(path)
        self._remove_old()

    def _remove_old(self) -> None:
        """Keeps the latest checkpoints and the one with the best score, the earliest if several have it."""
        steps = self.steps()
        scores = {step: score for step in steps if (score := self._score(step)) is not None}
        best = max(scores, key=scores.__getitem__, default=None)
        for step in steps[: -self._keep]:
            if step != best:
                self._remove(step)

    def _remove(self, step: int) -> None:
        removed = (self.folder / str(step)).rename(self.folder / f"{step}{_REMOVED}")
        shutil.rmtree(removed)

    def _score(self, step: int) -> float | None:
        try:
            return self._record(step)["score"]
        except (DamagedError, MismatchError):
            return None

    def _record(self, step: int) -> dict[str, Any]:
        path = self.folder / str(step)
        if (path / "_CHECKPOINT_METADATA").exists():
            raise MismatchError(
                f"{path} was written by orbax, in an earlier version of this program: continue with that version, or "
                "start the run again"
            )
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            crc = record.pop("crc")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise DamagedError(f"{path} is damaged: {_reason(error)}") from error
        if crc != _crc_of_json(record):
            raise DamagedError(f"{path} is damaged: {RECORD} differs from what was written")
        return record

    def _arrays(self, step: int, record: dict[str, Any]) -> dict[str, np.ndarray]:
        path = self.folder / str(step)
        try:
            stored = safetensors.numpy.load_file(path / STATE)
            arrays = {name: stored[name].view(np.dtype(dtype)) for name, (_, dtype, _) in record["arrays"].items()}
        except Exception as error:  # the libraries raise several types
            raise DamagedError(f"{path} is damaged: {_reason(error)}") from error
        for name, (shape, _, crc) in record["arrays"].items():
            if list(arrays[name].shape) != shape or _crc(arrays[name]) != crc:
                raise DamagedError(f"{path} is damaged: {name} differs from what was written")
        return arrays

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        """Removes the unfinished checkpoint, to free the disk, and returns the error to raise."""
        for path in self.unfinished():
            shutil.rmtree(path, ignore_errors=True)
        last = self.steps()
        kept = f"the latest complete one is {self.folder / str(last[-1])}" if last else "there is no earlier one"
        return CheckpointError(f"the checkpoint of step {step} could not be written ({_reason(error)}); {kept}")


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    aside = folder / f"{RECORD}{_UNFINISHED}"
    aside.write_text(json.dumps(record | {"crc": _crc_of_json(record)}), encoding="utf-8")
    aside.replace(folder / RECORD)


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Returns [("opt_state.0.mu.fc.bias", leaf), …] in the order of jax.tree.leaves."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _crc_of_json(values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _describe(what: list[Any] | None) -> str:
    return "none" if what is None else f"{tuple(what[0])} {what[1]}"


def _reason(error: Exception) -> str:
    """The operating system's reason if there is one: safetensors puts the system's error number into its message."""
    if code := re.search(r"(?:os error|code:) (\d+)", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
