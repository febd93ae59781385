"""Checkpoints of a training: a thread writes each aside and renames it, so that a kill never damages an earlier one.

A checkpoint is the folder <folder>/<step>. Its state.safetensors holds the arrays of the state under their paths
("params.layer1.0.conv1.weight", "opt_state.0.mu.fc.bias"). Its record.json holds facts, JSON values of the caller's,
the score, and the shape, type and CRC-32 of each array: a file system may return other bytes than were written.
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

__all__ = ["CheckpointError", "Checkpoints", "DamagedError", "MismatchError", "Restored"]

STATE, RECORD = "state.safetensors", "record.json"
UNFINISHED, REMOVED = ".unfinished", ".removed"  # suffixes of folders that are being written, or deleted


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written."""


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


class MismatchError(ValueError):
    """A checkpoint is of another training, whose names, shapes or types differ, or of another format."""


class Restored(NamedTuple):
    """What a checkpoint held: the steps done, the state in NumPy arrays, the facts."""

    step: int
    state: Any
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run. With several processes each makes one and calls the same methods; process 0 writes.

    Args:
      folder: made if it is not there; all processes must see the same.
      keep: how many of the last ones stay, at least 1; the one with the best score stays besides.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self._keep = Path(folder).absolute(), keep
        self._writer: ThreadPoolExecutor | None = None
        self._pending: tuple[int, Future] | None = None

    def save(self, step: int, state: Any, facts: Mapping[str, Any], *, score: float | None = None) -> None:
        """Begins to write a checkpoint; returns when the arrays are copied, and they may be changed or donated.

        Args:
          step: the steps done; the name. An undamaged checkpoint of this step stays and takes the score: the same steps
            make the same state.
          state: a tree of arrays, each whole on this process.
          facts: JSON values; they may be changed afterwards, too.
          score: larger is better; a checkpoint without one cannot be the best.

        Raises:
          CheckpointError: this one cannot be begun, or the one before could not be ended. Earlier ones are as they
            were, and the next call may succeed.
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
        """Returns when the last checkpoint is complete on the disk.

        Raises:
          CheckpointError: it could not be ended.
        """
        if self._pending is None:
            return
        step, written = self._pending
        try:
            written.result()
        except Exception as error:  # safetensors' are of its own type
            self._pending = None
            raise self._failed(step, error) from error
        self._pending = None

    def close(self) -> None:
        """Waits like `wait`, raises like it, and ends the thread."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    def unfinished(self) -> list[Path]:
        """What a process that was killed while writing has left; the next `save` removes it."""
        return sorted(self.folder.glob(f"*{UNFINISHED}"))

    def steps(self) -> list[int]:
        """The steps of all that have a complete name, the last one last; whether they are damaged is not known."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def restore(self, step: int, template: Any) -> Restored:
        """Reads a checkpoint and checks every byte.

        Args:
          step: its name.
          template: a tree of arrays with the structure, shapes and types that are expected.

        Raises:
          MismatchError: it is undamaged, and of another structure, shape or type, or an earlier version wrote it.
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
          MismatchError: an earlier version wrote it.
          DamagedError: a part is missing or not what was written.
        """
        record = self._record(step)
        return self._arrays(step, record), record["facts"]

    def _write(self, step: int, arrays: dict[str, np.ndarray], facts: Any, score: float | None) -> None:
        for pattern in (f"*{UNFINISHED}", f"*{REMOVED}"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)
        path, aside = self.folder / str(step), self.folder / f"{step}{UNFINISHED}"
        if path.exists():
            try:
                record = self._record(step)
                self._arrays(step, record)
                return _write_record(path, record if score is None else record | {"score": score})
            except (DamagedError, MismatchError):
                self._remove(step)
        aside.mkdir()
        # NumPy's own types alone: bfloat16 and the like as unsigned integers.
        plain = {name: a.view(f"u{a.itemsize}") if a.dtype.kind == "V" else a for name, a in arrays.items()}
        safetensors.numpy.save_file(plain, aside / STATE)
        written = {name: [list(a.shape), str(a.dtype), _crc(a)] for name, a in arrays.items()}
        _write_record(aside, {"facts": facts, "arrays": written, "score": score})
        aside.rename(path)
        self._remove_old()

    def _remove_old(self) -> None:
        """Keeps the last ones and the best, the first of them if scores are equal."""
        steps = self.steps()
        scores = {step: score for step in steps if (score := self._score(step)) is not None}
        best = max(scores, key=scores.__getitem__, default=None)
        for step in steps[: -self._keep]:
            if step != best:
                self._remove(step)

    def _remove(self, step: int) -> None:
        removed = (self.folder / str(step)).rename(self.folder / f"{step}{REMOVED}")
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
                f"{path} was written by orbax, in an earlier version of this program: go on with that version, or "
                "begin the run anew"
            )
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            crc = record.pop("crc")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise DamagedError(f"{path} is damaged: {_reason(error)}") from error
        if crc != _crc_of_json(record):
            raise DamagedError(f"{path} is damaged: its record is not what was written")
        return record

    def _arrays(self, step: int, record: dict[str, Any]) -> dict[str, np.ndarray]:
        path = self.folder / str(step)
        try:
            stored = safetensors.numpy.load_file(path / STATE)
            arrays = {name: stored[name].view(np.dtype(dtype)) for name, (_, dtype, _) in record["arrays"].items()}
        except Exception as error:  # of several types
            raise DamagedError(f"{path} is damaged: {_reason(error)}") from error
        for name, (shape, _, crc) in record["arrays"].items():
            if list(arrays[name].shape) != shape or _crc(arrays[name]) != crc:
                raise DamagedError(f"{path} is damaged: {name} is not what was written")
        return arrays

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        """Removes what was half-written, to free the disk."""
        for path in self.unfinished():
            shutil.rmtree(path, ignore_errors=True)
        last = self.steps()
        kept = f"the last good one is {self.folder / str(last[-1])}" if last else "there is no earlier one"
        return CheckpointError(f"the checkpoint of step {step} could not be written ({_reason(error)}); {kept}")


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    aside = folder / f"{RECORD}{UNFINISHED}"
    aside.write_text(json.dumps(record | {"crc": _crc_of_json(record)}), encoding="utf-8")
    aside.replace(folder / RECORD)


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """[("opt_state.0.mu.fc.bias", leaf), …] in the order of jax.tree.leaves."""
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
    """What the system said, if it is the cause: safetensors, written in Rust, has it as a number in its message."""
    if code := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
