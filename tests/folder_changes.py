"""What may have happened to a user's data folder, as functions of the folder that can be combined."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from picture_folders import encoded, noise

Change = Callable[[Path], object]


def changed(*changes: Change) -> Change:
    """Applies the changes in order; the first one creates the folder."""
    return lambda root: [change(root) for change in changes]


def inside(name: str, *changes: Change) -> Change:
    """Applies the changes to the subfolder of this name."""
    return lambda root: [change(root / name) for change in changes]


def each(names: Iterable[str], do: Change) -> Change:
    """Applies a function to the path of each name, after creating the folder around it."""

    def change(root: Path) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            do(root / name)

    return change


def a_file(*names: str, content: bytes = b"\0\5\26\7") -> Change:
    return each(names, lambda path: path.write_bytes(content))


def a_picture(*names: str) -> Change:
    """Writes pictures of noise; equal file names have equal pictures."""
    return each(names, lambda path: path.write_bytes(encoded(noise(40, 40, 3, seed=list(os.fsencode(path.name))))))


def a_pipe(*names: str) -> Change:
    return each(names, os.mkfifo)


def a_folder(*names: str, mode: int = 0o777) -> Change:
    return each(names, lambda path: path.mkdir(mode))


def linked(name: str, target: str) -> Change:
    """Creates a symbolic link; the target is absolute, or relative to the link's folder."""
    return each([name], lambda path: path.symlink_to(target))


def moved(old: str, new: str) -> Change:
    return lambda root: each([new], (root / old).rename)(root)


def removed(*names: str) -> Change:
    return each(names, lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink())


def cut(name: str, size: int | None = None) -> Change:
    """Keeps a file's first half, or its first `size` bytes; a negative size cuts bytes from the end."""

    def shorten(path: Path) -> None:
        whole = path.stat().st_size
        os.truncate(path, whole // 2 if size is None else size if size >= 0 else whole + size)

    return each([name], shorten)


def locked(*names: str) -> Change:
    """Takes away all permissions, so that only root can read these."""
    return each(names, lambda path: path.chmod(0))
