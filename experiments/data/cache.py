"""Keeps decoded pictures as .npy files, which the next start memory-maps.

An entry is a folder <name>-<hash of its key> with one .npy file per array and an entry.json that describes the arrays.
An entry is written under another name and renamed when it is complete. So several processes may make the same entry at
once, and a killed process leaves nothing that looks complete.
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
BLOCKS, BLOCK_BYTES = 64, 4096  # of a file, for its checksum


class Damaged(Exception):
    """An entry exists, but its files are not as they were written."""


class Column:
    """An array that grows item by item, in a .npy file or, if `path` is None, in memory.

    Items are not written through a memory map: on a full disk a map kills the process (SIGBUS), while a file raises
    an error. The header has a fixed length; `on_disk` puts the number of items into it.
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
        """The items of a column without a path, as a read-only array."""
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


Create = Callable[[str, tuple[int, ...], str], Column]  # name, shape of an item, dtype -> a new column
Make = Callable[[Create], dict[str, Any]]  # fills arrays, returns facts about them as JSON values


def columns_in(folder: Path | None) -> tuple[dict[str, Column], Create]:
    """Returns an empty {name: column}, and a function that adds a column to it or replaces the column of this name."""
    columns: dict[str, Column] = {}

    def create(name: str, item_shape: tuple[int, ...], dtype: str) -> Column:
        columns[name] = Column(folder and folder / f"{name}.npy", item_shape, dtype)
        return columns[name]

    return columns, create


@dataclasses.dataclass(frozen=True)
class Entry:
    """Read-only arrays (memory maps if they are in the cache), and the facts that `make` returned about them.

    directory: the entry's folder; None if the arrays are only in memory.
    notes: what the user should know about how the entry was made.
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
    """Opens the entry of `key`, or makes it; keeps its arrays in memory if the cache cannot be written.

    Args:
      cache_dir: the folder of all entries; None for resnet-adabound in $XDG_CACHE_HOME or ~/.cache.
      name: beginning of the entry's folder name.
      key: JSON values that differ whenever the arrays would.
      size: bytes that the arrays will take; compared with the free space of the disk before `make` is called.
      make: called with create(array name, item shape, dtype). Its exceptions are passed on, and then nothing is kept.
        If the cache cannot be written, `make` is called (again) for an entry in memory.
      refuse: an entry's facts -> the reason to make an undamaged entry again, or None.
    """
    notes, reason = [], None
    try:
        digest = hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()
        directory = cache_folder(cache_dir) / f"{name}-{digest[:24]}"
        try:
            entry = open_entry(directory)
            if (reason := refuse(entry.facts)) is None:
                return entry
        except FileNotFoundError:
            pass
        except Damaged as error:
            reason = f"it is damaged: {error}"
        if reason:
            notes.append(f"the cache {directory} is made again ({reason})")
            discard(directory)
        entry = write_entry(directory, size, make)
    except Unwritable as error:
        notes.append(f"nothing is cached, so the next start decodes the pictures again: {error}")
        columns, create = columns_in(None)
        facts = json.loads(json.dumps(make(create)))
        entry = Entry({name: column.in_memory() for name, column in columns.items()}, facts, None)
    return dataclasses.replace(entry, notes=tuple(notes))


def open_entry(directory: Path) -> Entry:
    """Opens a complete entry; raises FileNotFoundError if there is none, Damaged if it is not as it was written."""
    if not directory.is_dir():
        raise FileNotFoundError(directory)
    try:
        description = json.loads((directory / "entry.json").read_text(encoding="utf-8"))
        arrays = {}
        for name, written in description["arrays"].items():
            path = directory / f"{name}.npy"
            if (size := path.stat().st_size) != written["bytes"]:
                raise Damaged(f"{path.name} has {size:,} bytes, but {written['bytes']:,} were written")
            if sampled_checksum(path) != written["checksum"]:
                raise Damaged(f"{path.name} is not what was written")
            arrays[name] = np.load(path, mmap_mode="r")
        return Entry(arrays, description["facts"], directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error


def write_entry(directory: Path, size: int, make: Make) -> Entry:
    """Makes an entry under another name and renames it when complete, or opens that of a faster process.

    Raises:
      Unwritable: the disk is full, or the folder cannot be written or read back.
    """
    partial = directory.with_name(f"partial-{directory.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with refused_as_unwritable(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(directory)
        if (free := shutil.disk_usage(directory.parent).free) < size:
            raise Unwritable(f"{directory.parent} has {free / 1e6:,.0f} MB free, but {size / 1e6:,.0f} MB are needed")
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
            except OSError:  # the folder exists: another process's entry, or a damaged one
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


def sampled_checksum(path: Path) -> int:
    """CRC-32 of blocks spread evenly over a file, from its first to its last; a small file is read whole.

    Detects truncated, overwritten and partly written files without reading gigabytes at every start.
    """
    size, checksum = path.stat().st_size, 0
    with path.open("rb") as file:
        if size <= BLOCKS * BLOCK_BYTES:
            return zlib.crc32(file.read())
        for block in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
            checksum = zlib.crc32(file.read(BLOCK_BYTES), checksum)
    return checksum


def discard(directory: Path) -> None:
    """Renames an entry and then removes it, so that no process opens a half-removed entry."""
    aside = directory.with_name(f"partial-{directory.name}-discarded-{secrets.token_hex(4)}")
    with refused_as_unwritable(directory.parent), contextlib.suppress(FileNotFoundError):
        directory.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_abandoned(directory: Path) -> None:
    """Removes this entry's unfinished folders if nothing was written to them for a day: their process was killed."""
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
