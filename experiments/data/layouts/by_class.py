"""Pictures sorted by class: train/<Class Name>/*.jpg and test/<Class Name>/*.jpg."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from experiments.data.dataset import SPLITS, DataError
from experiments.data.layouts import devkit
from experiments.data.layouts.files import PictureFolder, Stored, folder_of_files, not_pictures, picture_files
from experiments.data.layouts.names import choose_splits, counted, first_few, folder_names, splits_in, tidy
from experiments.data.pictures import printable

EXPECTED = "expected train/<Class Name>/ and test/<Class Name>/"


@dataclasses.dataclass(frozen=True)
class Classes:
    """What is in the folder of a split.

    pictures: {name of a class folder: its pictures}, only of those that have some.
    loose: how many pictures lie directly in it.
    empty, others, hidden: folders without pictures, what else is not a picture, and folders with pictures that have the
      name of a leftover; as paths below the root.
    """

    pictures: dict[str, list[Stored]]
    loose: int
    empty: list[str]
    others: list[str]
    hidden: list[str]


def by_class(root: Path) -> PictureFolder | None:
    """Reads the layout, or returns None where no folder of a split has class folders with pictures.

    Classes are numbered by their sorted names; one that only train or only test has keeps its number. Boxes come from
    a devkit in `root` if it names every picture, and in the same class; otherwise the pictures are used whole.

    Raises:
      DataError: one of the splits is missing or there twice, pictures do not lie in class folders, or both splits have
        the same file.
    """
    found = {name: read_classes(root, name) for name in folder_names(root) if splits_in(name)}
    chosen, notes = choose_splits([name for name, classes in found.items() if classes.pictures], root)
    if not any(chosen.values()):
        return None
    for split, names in chosen.items():
        if not names:
            raise DataError(explain_missing(root, split, found))
        if len(names) > 1:
            raise DataError(f"{root} has several folders of {split}, {first_few(names)}: leave one of them there")
    splits = {split: found[name] for split, (name,) in chosen.items()}
    if (root / chosen["train"][0]).samefile(root / chosen["test"][0]):
        raise DataError(f"{root} has one folder for both splits: {chosen['train'][0]} is {chosen['test'][0]}")
    refuse_shared_files(root, splits)
    numbers, class_names = number_classes(root, splits)
    notes += leftover_notes(root, splits)
    pictures = {split: classes.pictures for split, classes in splits.items()}
    boxes, why_not = devkit.boxes_of(root, pictures)
    if why_not:
        notes.append(f"the devkit's boxes are not used: {why_not}")
    listing = {
        split: sorted(
            (
                (stored, numbers[split][name], boxes[split][stored.base] if boxes else None)
                for name, files in pictures[split].items()
                for stored in files
            ),
            key=lambda row: row[1],
        )
        for split in SPLITS
    }
    return folder_of_files("by class", root, class_names, listing, bool(boxes), notes)


def read_classes(root: Path, name: str) -> Classes:
    """Lists the class folders in a split's folder, or in the one of the same name in it (train/train/).

    Raises:
      DataError: the pictures of a class lie a folder deeper.
    """
    directory = root / name
    inner = folder_names(directory)
    if len(inner) == 1 and splits_in(inner[0]) == splits_in(name) and not is_class(root, name, inner[0]):
        directory, inner = directory / inner[0], folder_names(directory / inner[0])
    hidden = [
        (directory / leftover).relative_to(root).as_posix()
        for leftover in folder_names(directory, leftovers=True)
        if picture_files(directory / leftover, root, [])
    ]
    classes = Classes({}, len(picture_files(directory, root, [])), [], [], hidden)
    for of_class in inner:
        if files := picture_files(directory / of_class, root, classes.others):
            classes.pictures[of_class] = files
            continue
        for deeper in folder_names(directory / of_class):
            if files := picture_files(directory / of_class / deeper, root, []):
                raise DataError(
                    f"{directory / of_class} has no pictures itself, but its folder {deeper} has {len(files):,}: "
                    f"{EXPECTED}, and the pictures directly in them"
                )
        classes.empty.append((directory / of_class).relative_to(root).as_posix())
    return classes


def is_class(root: Path, split_folder: str, name: str) -> bool:
    """Whether a folder named like a split is a class ("Training Day"): another split has it, too."""
    others = (other for other in folder_names(root) if splits_in(other) and splits_in(other) != splits_in(split_folder))
    return any(
        tidy(name).casefold() == tidy(inner).casefold() for other in others for inner in folder_names(root / other)
    )


def refuse_shared_files(root: Path, splits: dict[str, Classes]) -> None:
    """Raises a DataError if by links both splits have the same file."""
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
                        f"{root} has one file in both splits: {printable(name)} is {printable(stored.name)}, so the "
                        "test would be on train pictures: remove the link"
                    )


def explain_missing(root: Path, split: str, found: dict[str, Classes]) -> str:
    for name, classes in found.items():
        if split in splits_in(name):
            loose = ""
            if classes.loose:
                lie = counted(classes.loose, "picture lies", "pictures lie")
                loose = f" ({lie} directly in it, without a class)"
            return f"{root / name} has no pictures in class folders{loose}: expected {name}/<Class Name>/00001.jpg, …"
    return f"{root} has no folder {split}/: {EXPECTED}"


def number_classes(root: Path, splits: dict[str, Classes]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """{split: {name of a class folder: number}} and the classes' names.

    Names that differ in outer spaces, in capitals or in how their letters are composed are one class: macOS and
    Windows write them so.

    Raises:
      DataError: a split has two folders of one class.
    """
    folders = {split: {} for split in splits}  # {what all spellings share: name}
    for split, classes in splits.items():
        for name in classes.pictures:
            other = folders[split].setdefault(tidy(name).casefold(), name)
            if other != name:
                raise DataError(f"{root} has {other!r} and {name!r} in {split}, one class in two spellings: join them")
    class_names = sorted(map(tidy, (folders["test"] | folders["train"]).values()))
    number = {name.casefold(): label for label, name in enumerate(class_names)}
    return {s: {name: number[key] for key, name in of_split.items()} for s, of_split in folders.items()}, class_names


def leftover_notes(root: Path, splits: dict[str, Classes]) -> list[str]:
    notes = []
    empty = [name for classes in splits.values() for name in classes.empty]
    if empty:
        notes.append(
            f"{counted(len(empty), 'folder without pictures is no class', 'folders without pictures are no classes')}: "
            f"{first_few(empty)}"
        )
    hidden = [name for classes in splits.values() for name in classes.hidden]
    if hidden:
        notes.append(
            f"{counted(len(hidden), 'folder with pictures is', 'folders with pictures are')} left out, hidden or named "
            f"like what systems leave behind: {first_few(hidden)}; rename what is a class"
        )
    others = [name for classes in splits.values() for name in sorted(classes.others)]
    if others:
        notes.append(not_pictures(root, others))
    loose = sum(classes.loose for classes in splits.values())
    if loose:
        notes.append(f"{counted(loose, 'picture', 'pictures')} in {root} not in a class folder; left out")
    return notes
