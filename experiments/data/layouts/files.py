"""A folder whose layout was recognized, and pictures that are separate files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from experiments.data.layouts.names import is_leftover, listing
from experiments.data.pictures import Box, Picture, printable

Version = tuple[int, int, int]  # size, modification time, and status change time (ctime), which programs cannot set
MISSING: Version = (-1, 0, 0)


@dataclasses.dataclass(frozen=True)
class PictureFolder:
    """A folder whose layout was recognized and whose pictures can be read.

    layout: the layout's name.
    counts: number of pictures of each split.
    boxes: whether every picture has a box.
    identity: JSON values that differ whenever the pictures, labels or boxes do.
    notes: what the user should know about the folder.
    pictures: "train" or "test" -> its pictures, in a fixed order; a list if they are separate files.
    """

    layout: str
    directory: Path
    class_names: tuple[str, ...]
    counts: dict[str, int]
    boxes: bool
    identity: dict[str, Any]
    notes: tuple[str, ...]
    pictures: Callable[[str], Iterable[Picture]]


class Stored(NamedTuple):
    """A picture file: its path below the root, and its version, which changes with the content."""

    name: str
    version: Version

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]


Row = tuple[Stored, int, Box | None]  # a file with its label and box


def folder_of_files(
    layout: str, root: Path, class_names: Iterable[str], rows: dict[str, list[Row]], boxes: bool, notes: Iterable[str]
) -> PictureFolder:
    """The PictureFolder whose splits consist of these rows."""
    pictures = {
        split: [Picture(printable(stored.name), label, box, root / stored.name) for stored, label, box in of_split]
        for split, of_split in rows.items()
    }
    return PictureFolder(
        layout=layout,
        directory=root,
        class_names=tuple(map(printable, class_names)),
        counts={split: len(of_split) for split, of_split in rows.items()},
        boxes=boxes,
        identity={split: [[s.name, *s.version, label, box] for s, label, box in rows[split]] for split in rows},
        notes=tuple(notes),
        pictures=pictures.__getitem__,
    )


def version_of(path: Path | os.DirEntry) -> Version:
    """The version of a file, found without opening it; MISSING for a broken link."""
    try:
        status = path.stat()
    except OSError:
        return MISSING
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def identity(files: dict[str, list[Path]]) -> dict[str, Any]:
    """Name and version of every file."""
    return {split: [[path.name, *version_of(path)] for path in paths] for split, paths in files.items()}


def picture_files(directory: Path, root: Path, others: list[str]) -> list[Stored]:
    """The files of a folder whose suffix Pillow knows, sorted by name; adds the names of other entries to `others`."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    prefix = f"{directory.relative_to(root).as_posix()}/" if directory != root else ""
    files = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if is_leftover(entry.name):
                continue
            if is_folder(entry) or os.path.splitext(entry.name)[1].lower() not in suffixes:
                others.append(prefix + entry.name)
            else:
                files.append(Stored(prefix + entry.name, version_of(entry)))
    return sorted(files)


def not_pictures(root: Path, others: Iterable[str]) -> str:
    """A note on entries that are not pictures."""
    words = f"entry of {root} is not a picture", f"entries of {root} are not pictures"
    return f"{listing(sorted(others), *words)}; left out"


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself is no folder
        return False
