"""Reads split names from the names of folders and files, recognizes leftovers of programs, and formats messages."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from experiments.data.dataset import DataError
from experiments.data.pictures import printable

WORD = re.compile(r"t10k|[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
SPLIT_WORDS = {  # the words by which Hugging Face recognizes splits, and MNIST's t10k
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation", "t10k"},
    "validation": {"val", "valid", "validation", "dev"},
}
LEFTOVERS = {  # names that archivers, desktops, servers and file systems leave, in lower case
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "temporary items", "network trash folder"),
    *("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler", "system volume information"),
    *("lost+found", "__pycache__"),
}


def words(name: str) -> set[str]:
    """The words of a name in lower case: "latestTrain-00000" has "latest" and "train"."""
    return {word.lower() for word in WORD.findall(name)}


def splits_in(name: str) -> list[str]:
    """The splits that the words of a name refer to, also with "set", "data" or "dataset" appended ("trainset")."""
    claims = {word.removesuffix("set").removesuffix("data") for word in words(name)}
    return [split for split, of_split in SPLIT_WORDS.items() if claims & of_split]


def choose_splits(names: Iterable[str], place: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Sorts names by the split that they refer to, and notes what the user may not expect.

    Validation pictures are used for the test if there are no test pictures; otherwise they are left out. The same rule
    holds for folders, files, and the splits of TFDS.

    Args:
      names: names below `place`; names without a split are left out.
      place: the folder, for messages.

    Returns:
      {"train": names, "test": names}, either of which may be empty, and the notes.

    Raises:
      DataError: a name refers to two splits.
    """
    found: dict[str, list[str]] = {split: [] for split in SPLIT_WORDS}
    for name in names:
        claims = splits_in(name)
        if len(claims) > 1:
            raise DataError(f"{place}: rename {printable(name)}, which may mean {' or '.join(claims)}")
        for split in claims:
            found[split].append(name)
    validation = found.pop("validation")
    notes = []
    if validation and found["test"]:
        notes.append(f"{first_few(validation)} in {place} is left out: there are test pictures")
    elif validation:
        notes.append(f"{place} has no test pictures: {first_few(validation)} is used for the test")
    return {"train": found["train"], "test": found["test"] or validation}, notes


def folder_of_each(root: Path, chosen: dict[str, list[str]], explain_missing: Callable[[str], str]) -> dict[str, str]:
    """{split: its only folder}, from the names that `choose_splits` found.

    Raises:
      DataError: a split has no folder (the message is explain_missing(split)) or several, or both have the same one.
    """
    for split, names in chosen.items():
        if not names:
            raise DataError(explain_missing(split))
        if len(names) > 1:
            raise DataError(f"{root} has several folders for {split} ({first_few(names)}): keep only one")
    train, test = chosen["train"][0], chosen["test"][0]
    if (root / train).samefile(root / test):
        raise DataError(f"{root} has one folder for both splits: {train} is {test}")
    return {"train": train, "test": test}


def is_leftover(name: str) -> bool:
    """Whether a file or folder is hidden, or left by an archiver, a desktop or a server."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def folder_names(directory: Path, leftovers: bool = False) -> list[str]:
    """Sorted names of the folders in a folder, without leftovers, or only leftovers."""
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and is_leftover(entry.name) == leftovers)


def tidy(name: str) -> str:
    """A class's name without invisible differences: no outer spaces, letters composed (Unicode NFC)."""
    return unicodedata.normalize("NFC", name).strip()


def counted(number: int, one: str, many: str) -> str:
    """A number with singular or plural words: counted(1, "picture lies", "pictures lie") is "1 picture lies"."""
    return f"{number:,} {one if number == 1 else many}"


def first_few(names: Iterable[str], limit: int = 10) -> str:
    names = list(names)
    return ", ".join(map(printable, names[:limit])) + (", …" if len(names) > limit else "")


def listing(names: Iterable[str], one: str, many: str, limit: int = 10) -> str:
    """Counts and names: listing(["a", "b"], "class has no pictures", "classes have no pictures")."""
    names = list(names)
    return f"{counted(len(names), one, many)}: {first_few(names, limit)}"


def missing_package(what: str, error: ImportError, *packages: str) -> str:
    """The message for a missing package: what needs it, and the command that installs it."""
    wanted = " ".join(f'"{package}"' for package in packages)
    return f"{what} needs a package that is missing ({error}): pip install {wanted}"
