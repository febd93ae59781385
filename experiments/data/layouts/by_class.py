"""Reads pictures sorted by class: train/<Class Name>/*.jpg and test/<Class Name>/*.jpg."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from experiments.data.dataset import DataError
from experiments.data.layouts import devkit
from experiments.data.layouts.files import PictureFolder, Stored, folder_of_files, not_pictures, picture_files
from experiments.data.layouts.names import (
    choose_splits,
    counted,
    folder_names,
    folder_of_each,
    listing,
    splits_in,
    tidy,
)
from experiments.data.pictures import printable

EXPECTED = "expected train/<Class Name>/ and test/<Class Name>/"
HIDDEN = "folder with pictures is", "folders with pictures are"


@dataclasses.dataclass(frozen=True)
class Classes:
    """The content of a split's folder.

    pictures: {name of a class folder: its pictures}, without empty class folders.
    loose: number of pictures directly in the split's folder.
    empty, others, hidden: folders without pictures, entries that are not pictures, and folders of pictures whose names
      `is_leftover` rejects; as paths below the root.
    """

    pictures: dict[str, list[Stored]]
    loose: int
    empty: list[str]
    others: list[str]
    hidden: list[str]


def by_class(root: Path) -> PictureFolder | None:
    """Reads the layout, or returns None if no split's folder has class folders with pictures.

    Classes are numbered in the order of their names, including classes that only one split has. Boxes come from a
    devkit in `root` if it lists every picture in the same class; otherwise whole pictures are used.

    Raises:
      DataError: a split is missing, ambiguous or has its pictures elsewhere, or both splits share a file.
    """
    found = {name: read_classes(root, name) for name in folder_names(root) if splits_in(name)}
    chosen, notes = choose_splits([name for name, classes in found.items() if classes.pictures], root)
    if not any(chosen.values()):
        return None
    folders = folder_of_each(root, chosen, lambda split: explain_missing(root, split, found))
    splits = {split: found[name] for split, name in folders.items()}
    refuse_shared_files(root, splits)
    numbers, class_names = number_classes(root, splits)
    notes += leftover_notes(root, splits)
    boxes, why_not = devkit.boxes_of(root, {split: classes.pictures for split, classes in splits.items()})
    if why_not:
        notes.append(f"the devkit's boxes are not used: {why_not}")
    rows = {
        split: [
            (stored, numbers[split][name], boxes[split][stored.base] if boxes else None)
            for name, files in classes.pictures.items()
            for stored in files
        ]
        for split, classes in splits.items()
    }
    sorted_rows = {split: sorted(of_split, key=lambda row: row[1]) for split, of_split in rows.items()}
    return folder_of_files("by class", root, class_names, sorted_rows, bool(boxes), notes)


def read_classes(root: Path, name: str) -> Classes:
    """Lists the class folders in a split's folder, or in its only inner folder of the same split (train/train/)."""
    directory = root / name
    inner = folder_names(directory)
    if len(inner) == 1 and splits_in(inner[0]) == splits_in(name) and not is_class(root, name, inner[0]):
        directory /= inner[0]
        inner = folder_names(directory)
    place = directory.relative_to(root).as_posix()
    leftovers = folder_names(directory, leftovers=True)
    hidden = [f"{place}/{leftover}" for leftover in leftovers if picture_files(directory / leftover, root, [])]
    classes = Classes({}, len(picture_files(directory, root, [])), [], [], hidden)
    for of_class in inner:
        if files := picture_files(directory / of_class, root, classes.others):
            classes.pictures[of_class] = files
            continue
        for deeper in folder_names(directory / of_class):
            if files := picture_files(directory / of_class / deeper, root, []):
                splits = {split for name in inner for split in splits_in(name)}
                advice = f"{EXPECTED} with the pictures directly inside"
                advice = f"pass --data {directory}" if {"train", "test"} <= splits else advice
                raise DataError(
                    f"{directory / of_class} has no pictures itself, but its folder {deeper} has {len(files):,}: "
                    f"{advice}"
                )
        classes.empty.append(f"{place}/{of_class}")
    return classes


def is_class(root: Path, split_folder: str, name: str) -> bool:
    """Whether a folder named like a split ("Training Day") is a class, because another split has it, too."""
    others = (other for other in folder_names(root) if splits_in(other) and splits_in(other) != splits_in(split_folder))
    return any(
        tidy(name).casefold() == tidy(inner).casefold() for other in others for inner in folder_names(root / other)
    )


def refuse_shared_files(root: Path, splits: dict[str, Classes]) -> None:
    """Raises a DataError if links put the same file into both splits."""
    found: dict[str, tuple[str, str]] = {}  # {where a file really is: its split and name}
    for split, classes in splits.items():
        for files in classes.pictures.values():
            folder = os.path.realpath((root / files[0].name).parent)
            for stored in files:
                path = f"{root}/{stored.name}"
                real = os.path.realpath(path) if os.path.islink(path) else f"{folder}/{stored.base}"
                of, name = found.setdefault(real, (split, stored.name))
                if of != split:
                    raise DataError(
                        f"{root} has one file in both splits: {printable(name)} is {printable(stored.name)}. Remove "
                        "the link, or the test would use train pictures"
                    )


def explain_missing(root: Path, split: str, found: dict[str, Classes]) -> str:
    name = next((name for name in found if split in splits_in(name)), None)
    if name is None:
        return f"{root} has no folder {split}/: {EXPECTED}"
    loose = ""
    if found[name].loose:
        loose = f" ({counted(found[name].loose, 'picture lies', 'pictures lie')} directly in it, without a class)"
    return f"{root / name} has no pictures in class folders{loose}: expected {name}/<Class Name>/00001.jpg, …"


def number_classes(root: Path, splits: dict[str, Classes]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Returns {split: {name of a class folder: number}} and the names of the classes.

    Names that differ only in outer spaces, capitals or Unicode composition are one class, since macOS and Windows
    change names in these ways. Raises a DataError if one split has both spellings.
    """
    folders = {split: {} for split in splits}  # {normalized name: name}
    for split, classes in splits.items():
        for name in classes.pictures:
            other = folders[split].setdefault(tidy(name).casefold(), name)
            if other != name:
                raise DataError(f"{root} has one class in two spellings in {split}, {other!r} and {name!r}: join them")
    class_names = sorted(map(tidy, (folders["test"] | folders["train"]).values()))
    number = {name.casefold(): label for label, name in enumerate(class_names)}
    return {s: {name: number[key] for key, name in of_split.items()} for s, of_split in folders.items()}, class_names


def leftover_notes(root: Path, splits: dict[str, Classes]) -> list[str]:
    empty, hidden, others = (
        [name for classes in splits.values() for name in getattr(classes, kind)]
        for kind in ("empty", "hidden", "others")
    )
    notes = []
    if empty:
        notes.append(listing(empty, "folder without pictures is no class", "folders without pictures are no classes"))
    if hidden:
        words = (f"{many} left out, as hidden or named like a system's folder" for many in HIDDEN)
        notes.append(f"{listing(hidden, *words)}; rename those that are classes")
    if others:
        notes.append(not_pictures(root, others))
    if loose := sum(classes.loose for classes in splits.values()):
        notes.append(f"{counted(loose, 'picture is', 'pictures are')} outside the class folders of {root} and left out")
    return notes
