"""Decoded pictures kept as .npy files that are memory-mapped at the next start.

An entry is a folder <name>-<hash of what made it> with one .npy file per array and an entry.json that says what they
are. It is written under another name and renamed when complete, so several processes may make the same entry at once
and one that is killed leaves nothing that looks complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.machine import Unwritable, cache_folder

FORMAT = 1
ABANDONED_AFTER_SECONDS = 24 * 3600


class Damaged(Exception):
    """An entry is there but is not what was written."""


class Column:
    """An array that grows item by item: a .npy file, or the same bytes in memory where `path` is None.

    Written through the file and not through a memory map: on a full disk a map kills the process (SIGBUS), a file
    raises. The header's length is fixed; it gets the number of items at the end.
    """

    def __init__(self, path: Path | None, item_shape: tuple[int, ...], dtype: str) -> None:
        self.path, self.item_shape, self.dtype, self.count = path, item_shape, np.dtype(dtype), 0
        with refused_as_unwritable(path):
            self.file = io.BytesIO() if path is None else path.open("wb")
            self.write_header()
        self.start = self.file.tell()

    def append(self, item: np.ndarray) -> None:
        with refused_as_unwritable(self.path):
            self.file.write(np.asarray(item, self.dtype).reshape(self.item_shape).tobytes())
        self.count += 1

    def write_header(self) -> None:
        self.file.seek(0)
        shape = (self.count, *self.item_shape)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)

    def in_memory(self) -> np.ndarray:
        """What was appended to a column without a path, read-only."""
        array = np.frombuffer(self.file.getbuffer()[self.start :], self.dtype)
        array.flags.writeable = False
        return array.reshape(-1, *self.item_shape)

    def on_disk(self) -> dict[str, Any]:
        """Completes the file and describes it for `open_entry`."""
        self.write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {
            "shape": [self.count, *self.item_shape],
            "dtype": str(self.dtype),
            "bytes": self.path.stat().st_size,
            "checksum": sampled_checksum(self.path),
        }


Create = Callable[[str, tuple[int, ...], str], Column]  # name, shape of an item, dtype -> where its items go
Make = Callable[[Create], dict[str, Any]]  # fills arrays, returns facts about them as JSON values


def columns_in(folder: Path | None) -> tuple[dict[str, Column], Create]:
    """Columns by name, none yet, and what begins one, in place of an earlier one of that name."""
    columns: dict[str, Column] = {}

    def create(name: str, item_shape: tuple[int, ...], dtype: str) -> Column:
        columns[name] = Column(folder and folder / f"{name}.npy", item_shape, dtype)
        return columns[name]

    return columns, create


@dataclasses.dataclass(frozen=True)
class Entry:
    """Read-only arrays, memory maps if they are in the cache, with the facts that their maker returned.

    directory: where they are kept, None if only in memory.
    notes: what a person should know about how they were made.
    """

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    directory: Path | None
    notes: tuple[str, ...] = ()


def load_or_make(
    cache_dir: str | os.PathLike | None,
    name: str,
    key: dict[str, Any],
    size: int,
    make: Make,
    refuse: Callable[[dict[str, Any]], str | None] = lambda facts: None,
) -> Entry:
    """Opens the entry that `key` made, or makes it; keeps it in memory where it cannot be written.

    Args:
      cache_dir: the folder of all entries; None for resnet-adabound in $XDG_CACHE_HOME or ~/.cache.
      name: beginning of the entry's folder name.
      key: JSON values that differ whenever the arrays would.
      size: bytes that the arrays will take, to see beforehand whether they fit.
      make: called with create(array name, item shape, dtype). What it raises is passed on and nothing is kept. Where
        the cache fails it is called a second time, for an entry in memory.
      refuse: an entry's facts -> why to make it again although it is undamaged, or None.
    """
    notes, reason = [], None
    try:
        directory = cache_folder(cache_dir) / f"{name}-{hash_of(key)}"
        try:
            entry = open_entry(directory)
            if (reason := refuse(entry.facts)) is None:
                return entry
        except FileNotFoundError:
            pass
        except Damaged as error:
            reason = f"it is damaged: {error}"
        if reason:
            notes.append(f"the cache {directory} is made again, {reason}")
            discard(directory)
        entry = write_entry(directory, size, make)
    except Unwritable as error:
        notes.append(f"no cache, so the pictures are decoded anew at the next start: {error}")
        columns, create = columns_in(None)
        facts = json.loads(json.dumps(make(create)))
        entry = Entry({name: column.in_memory() for name, column in columns.items()}, facts, None)
    return dataclasses.replace(entry, notes=tuple(notes))


def hash_of(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()[:24]


def open_entry(directory: Path) -> Entry:
    """Opens a complete entry; FileNotFoundError where there is none, Damaged where it is not what was written."""
    if not directory.is_dir():
        raise FileNotFoundError(directory)
    try:
        description = json.loads((directory / "entry.json").read_text(encoding="utf-8"))
        arrays = {}
        for name, written in description["arrays"].items():
            path = directory / f"{name}.npy"
            if (size := path.stat().st_size) != written["bytes"]:
                raise Damaged(f"{path.name} has {size:,} bytes, written were {written['bytes']:,}")
            if sampled_checksum(path) != written["checksum"]:
                raise Damaged(f"{path.name} is not what was written")
            arrays[name] = np.load(path, mmap_mode="r")
        return Entry(arrays, description["facts"], directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error


def write_entry(directory: Path, size: int, make: Make) -> Entry:
    """Makes an entry beside its place and renames it when complete; opens another process's if that was faster."""
    partial = directory.with_name(f"partial-{directory.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with refused_as_unwritable(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory)
        if (free := shutil.disk_usage(directory.parent).free) < size:
            raise Unwritable(f"{directory.parent} has {free / 1e6:,.0f} MB free, needed are {size / 1e6:,.0f} MB")
        partial.mkdir()
    columns, create = columns_in(partial)
    try:
        facts = make(create)
        with refused_as_unwritable(directory):
            arrays = {name: column.on_disk() for name, column in columns.items()}
            with (partial / "entry.json").open("wb") as file:
                file.write(json.dumps({"facts": facts, "arrays": arrays}, indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
            try:
                partial.rename(directory)
            except OSError:  # something is in its place: another process's entry, or a damaged one
                with contextlib.suppress(FileNotFoundError, Damaged):
                    return open_entry(directory)
                discard(directory)
                partial.rename(directory)
            return open_entry(directory)
    except Damaged as error:
        raise Unwritable(f"{directory} cannot be read back ({error})") from error
    finally:
        for column in columns.values():
            with contextlib.suppress(OSError):
                column.file.close()
        shutil.rmtree(partial, ignore_errors=True)


def sampled_checksum(path: Path, blocks: int = 64, block_size: int = 4096) -> int:
    """CRC-32 of blocks spread evenly over a file, the first and the last among them; small files are read whole.

    Finds truncated, overwritten and partly written files without reading gigabytes at every start.
    """
    size = path.stat().st_size
    checksum = 0
    with path.open("rb") as file:
        if size <= blocks * block_size:
            return zlib.crc32(file.read())
        for block in range(blocks):
            file.seek((size - block_size) * block // (blocks - 1))
            checksum = zlib.crc32(file.read(block_size), checksum)
    return checksum


def discard(directory: Path) -> None:
    """Removes an entry; out of its place at once, so that nobody opens the half that is left."""
    aside = directory.with_name(f"partial-{directory.name}-discarded-{secrets.token_hex(4)}")
    with refused_as_unwritable(directory.parent), contextlib.suppress(FileNotFoundError):
        directory.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_abandoned(directory: Path) -> None:
    """Removes what killed processes left of this entry: folders in which nothing was written for a day."""
    for partial in directory.parent.glob(f"partial-{directory.name}-*"):
        with contextlib.suppress(OSError):  # another process may be removing it, too
            last_written = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            if time.time() - last_written > ABANDONED_AFTER_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def refused_as_unwritable(place: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unwritable(f"{place} cannot be written ({error.strerror or error})") from error
