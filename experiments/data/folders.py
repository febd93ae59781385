"""Stanford Cars as folders of picture files: by class, and the original one with the devkit's annotations."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.data.dataset import DataError
from experiments.data.pictures import SPLITS, Box, Picture, PictureFolder, printable

ANNOTATIONS = {
    "train": ("cars_train_annos.mat",),
    "test": ("cars_test_annos_withlabels.mat", "cars_test_annos.mat"),  # the second has boxes but no classes
}
DEVKIT_FOLDERS = (".", "devkit", "car_devkit/devkit", "devkit/devkit")


class Annotation(NamedTuple):
    """A line of the devkit; label counts from 0 and is None in a file without classes."""

    box: Box
    label: int | None


class Stored(NamedTuple):
    """A picture file: what identifies its content without opening it. A link to nowhere has size -1."""

    path: Path
    name: str
    size: int
    modified: int


@dataclasses.dataclass(frozen=True)
class Files(Sequence[Picture]):
    """Pictures in files of their own.

    root: the folder that the names start from.
    rows: name, label and box of each.
    """

    root: Path
    rows: list[tuple[str, int, Box | None]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Picture:
        name, label, box = self.rows[number]
        return Picture(printable(name), label, box, self.root / name)


def by_class(root: Path) -> PictureFolder | None:
    """Reads train/<Class Name>/* and test/<Class Name>/*, or returns None where there is nothing of the kind.

    Classes are numbered by their sorted names; one that only train or only test has keeps its number. Boxes come from
    a devkit in `root` if it names every picture, and in the same class; otherwise the pictures are used whole.

    Raises:
      DataError: one of train/ and test/ is missing, or has no class folders with pictures.
    """
    if not any((root / split).is_dir() and class_folders(root / split) for split in SPLITS):
        return None
    found: dict[str, dict[str, list[Stored]]] = {}
    notes: list[str] = []
    for split in SPLITS:
        if not (root / split).is_dir():
            raise DataError(f"{root} has no folder {split}/: expected train/<Class Name>/ and test/<Class Name>/")
        found[split] = {name: picture_files(root / split / name, root, notes) for name in class_folders(root / split)}
        if not any(found[split].values()):
            loose = len(picture_files(root / split, root, []))
            raise DataError(
                f"{root / split} has no pictures in class folders"
                + (f" ({loose:,} pictures lie directly in it, without a class)" if loose else "")
                + f": expected {split}/<Class Name>/00001.jpg, …"
            )
    class_names = tuple(sorted(set(found["train"]) | set(found["test"])))
    boxes, why_not = devkit_boxes(root, found)
    if why_not:
        notes.append(f"the devkit's boxes are not used: {why_not}")
    listing = {
        split: [
            (stored, label, boxes[split][stored.path.name] if boxes else None)
            for label, name in enumerate(class_names)
            for stored in found[split].get(name, ())
        ]
        for split in SPLITS
    }
    return folder_of_files("by class", root, tuple(map(printable, class_names)), listing, bool(boxes), notes)


def original(root: Path) -> PictureFolder | None:
    """Reads cars_train/, cars_test/ and the devkit's .mat files, or returns None where there is no such folder.

    Raises:
      DataError: a part is missing or cannot be read, or pictures that the annotations name are missing.
    """
    if not any((root / f"cars_{split}").is_dir() for split in SPLITS):
        return None
    class_names = read_class_names(require(root, "cars_meta.mat"))
    notes: list[str] = []
    listing = {}
    for split in SPLITS:
        directory = root / f"cars_{split}"
        if not directory.is_dir():
            raise DataError(f"{root} has no folder cars_{split}/: expected both cars_train/ and cars_test/")
        if (directory / directory.name).is_dir():
            directory = directory / directory.name
        files = {stored.path.name: stored for stored in picture_files(directory, root, notes)}
        annotations_path = require(root, ANNOTATIONS[split][0])
        annotations = read_annotations(annotations_path, len(class_names))
        if any(annotation.label is None for annotation in annotations.values()):
            raise DataError(
                f"{annotations_path} has no field 'class': expected the file with labels, {ANNOTATIONS[split][0]}"
            )
        if missing := [name for name in annotations if name not in files]:
            raise DataError(
                f"{len(missing):,} of the {len(annotations):,} pictures that {annotations_path.name} names are not in "
                f"{directory}: {first_few(missing)}; unpack cars_{split}.tgz again"
            )
        if extra := [name for name in files if name not in annotations]:
            notes.append(f"{len(extra):,} pictures in {directory} have no annotation: {first_few(extra)}; left out")
        listing[split] = [(files[name], label, box) for name, (box, label) in annotations.items()]
    return folder_of_files("original", root, class_names, listing, True, notes)


def folder_of_files(
    layout: str,
    root: Path,
    class_names: tuple[str, ...],
    listing: dict[str, list[tuple[Stored, int, Box | None]]],
    boxes: bool,
    notes: list[str],
) -> PictureFolder:
    """The folder whose splits are the listed files with their labels and boxes."""
    files = {
        split: Files(root, [(stored.name, label, box) for stored, label, box in rows])
        for split, rows in listing.items()
    }
    return PictureFolder(
        layout=layout,
        directory=root,
        class_names=class_names,
        counts={split: len(rows) for split, rows in listing.items()},
        boxes=boxes,
        identity={
            split: [[stored.name, stored.size, stored.modified, label, box] for stored, label, box in rows]
            for split, rows in listing.items()
        },
        notes=tuple(notes),
        pictures=files.__getitem__,
    )


def class_folders(directory: Path) -> list[str]:
    """Sorted names of the folders in a folder, hidden ones and archivers' leftovers aside."""
    with os.scandir(directory) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".") and entry.name != "__MACOSX"
        )


def picture_files(directory: Path, root: Path, notes: list[str]) -> list[Stored]:
    """The files of a folder whose suffix Pillow knows, sorted by name; what is left out is added to the notes."""
    suffixes = picture_suffixes()
    files, others = [], []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_folder(entry) or os.path.splitext(entry.name)[1].lower() not in suffixes:
                others.append(entry.name)
                continue
            try:
                status = entry.stat()
                size, modified = status.st_size, status.st_mtime_ns
            except OSError:
                size, modified = -1, 0
            path = Path(entry.path)
            files.append(Stored(path, path.relative_to(root).as_posix(), size, modified))
    if others and files:
        notes.append(f"{len(others):,} entries of {directory} are not pictures: {first_few(sorted(others))}; left out")
    return sorted(files, key=lambda stored: stored.path.name)


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: no folder in any case
        return False


def picture_suffixes() -> set[str]:
    """The file name suffixes, lower case with their dot, of the formats that Pillow can open."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}


def devkit_boxes(
    root: Path, found: dict[str, dict[str, list[Stored]]]
) -> tuple[dict[str, dict[str, Box]] | None, str | None]:
    """Boxes for a folder by class: {split: {file name: box}}, or None and the reason.

    File names alone would also fit pictures that somebody numbered anew, so the classes must agree as well as far as
    the devkit has them (letters and digits; class folders cannot keep the / of "Ram C/V").
    """
    paths = {split: find_devkit_file(root, *ANNOTATIONS[split]) for split in SPLITS}
    if not any(paths.values()):
        return None, None
    meta = find_devkit_file(root, "cars_meta.mat")
    if not all(paths.values()) or meta is None:
        return None, f"expected cars_meta.mat and annotations of both train and test in {root} or {root / 'devkit'}"
    class_names = read_class_names(meta)
    boxes: dict[str, dict[str, Box]] = {}
    for split in SPLITS:
        annotations = read_annotations(paths[split], len(class_names))
        files = [(name, stored) for name, class_files in found[split].items() for stored in class_files]
        if unknown := [stored.name for _, stored in files if stored.path.name not in annotations]:
            return None, f"{len(unknown):,} of {len(files):,} {split} pictures are not in it: {first_few(unknown)}"
        for name, stored in files:
            label = annotations[stored.path.name].label
            if label is not None and letters(class_names[label]) != letters(name):
                return None, f"it has {stored.name} in class {class_names[label]!r}"
        boxes[split] = {name: annotation.box for name, annotation in annotations.items()}
    return boxes, None


def letters(class_name: str) -> str:
    return re.sub(r"[\W_]+", "", class_name).lower()


def find_devkit_file(root: Path, *names: str) -> Path | None:
    """The first of the names that is at the top of the folder or in its devkit/."""
    candidates = (root / folder / name for name in names for folder in DEVKIT_FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def require(root: Path, name: str) -> Path:
    path = find_devkit_file(root, name)
    if path is None:
        without_labels = name == ANNOTATIONS["test"][0] and find_devkit_file(root, *ANNOTATIONS["test"][1:])
        raise DataError(
            f"{root} has cars_train/ or cars_test/ but no {name}, in it or in {root / 'devkit'}"
            + (f" ({without_labels.name} is there, but has no classes)" if without_labels else "")
            + ": put the file there, or sort the pictures by class (train/<Class Name>/, test/<Class Name>/)"
        )
    return path


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names of cars_meta.mat, in the order of their numbers.

    Raises:
      DataError: the file cannot be read or holds something else.
    """
    names = read_mat(path, "class_names").ravel().tolist()
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} has class_names that are not names: is this the devkit's file?")
    return tuple(names)


def read_annotations(path: Path, num_classes: int) -> dict[str, Annotation]:
    """Box and label of every file name in an annotation file of the devkit, in its order.

    Raises:
      DataError: the file cannot be read, holds something else, or has a class that is not 1 to num_classes.
    """
    rows = read_mat(path, "annotations")
    expected = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "fname")
    if missing := [field for field in expected if field not in (rows.dtype.names or ())]:
        raise DataError(f"the annotations in {path} have no field {', '.join(missing)}: is this the devkit's file?")
    labelled = "class" in rows.dtype.names
    annotations = {}
    for number, row in enumerate(rows, 1):
        try:
            box = Box(*(int(row[field]) for field in expected[:4]))
            label = int(row["class"]) - 1 if labelled else None
        except (TypeError, ValueError, OverflowError) as error:  # an array, text, not a number, infinite
            raise DataError(
                f"{path} has a box or class in its row {number:,} that is not in whole numbers ({error}): is this the "
                "devkit's file?"
            ) from error
        if label is not None and not 0 <= label < num_classes:
            raise DataError(f"{path} has {row['fname']} in class {label + 1}: cars_meta.mat names 1 to {num_classes}")
        annotations[str(row["fname"])] = Annotation(box, label)
    return annotations


def read_mat(path: Path, variable: str) -> np.ndarray:
    """One variable of a MATLAB file as a one-dimensional array.

    Raises:
      DataError: the file cannot be read or has no such variable.
    """
    from scipy.io import loadmat  # a fifth of a second that the other layouts need not wait for

    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy meets what is not a .mat file with many types of error
        raise DataError(
            f"{path} cannot be read as a MATLAB file ({str(error).rstrip('.')}): download it again"
        ) from error
    if variable not in content:
        names = [name for name in content if not name.startswith("__")]
        raise DataError(f"{path} has no variable {variable!r} but {names}: is this the devkit's file?")
    return np.atleast_1d(content[variable])


def first_few(names: Iterable[str], limit: int = 10) -> str:
    names = list(names)
    return ", ".join(map(printable, names[:limit])) + (", …" if len(names) > limit else "")
