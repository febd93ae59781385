"""Reads the files as the authors published them: cars_train/, cars_test/ and devkit, or car_ims/ and cars_annos.mat."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.dataset import SPLITS, DataError
from experiments.data.layouts.files import (
    MISSING,
    PictureFolder,
    Row,
    Stored,
    folder_of_files,
    not_pictures,
    picture_files,
)
from experiments.data.layouts.names import (
    choose_splits,
    first_few,
    folder_names,
    folder_of_each,
    listing,
    splits_in,
    words,
)
from experiments.data.pictures import Box

META = "cars_meta.mat"
JOINT = "cars_annos.mat"  # boxes, classes and splits of all pictures, and the classes' names
ANNOTATIONS = {
    "train": ("cars_train_annos.mat",),
    "test": ("cars_test_annos_withlabels.mat", "cars_test_annos.mat"),  # the second has boxes but no classes
}
DEVKIT_FOLDERS = (".", "devkit", "car_devkit/devkit", "devkit/devkit")
BOX_FIELDS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


class Annotation(NamedTuple):
    """A row of an annotation file; label counts from 0, and is None if the file has no classes."""

    box: Box
    label: int | None
    split: str | None = None


def original(root: Path) -> PictureFolder | None:
    """Reads the pictures that the devkit lists, or returns None if there is no folder for them.

    Raises:
      DataError: a folder or file of the layout is missing or damaged.
    """
    others: list[str] = []
    if (directory := root / "car_ims").is_dir():
        path = require(root, JOINT, "car_ims/")
        class_names, notes = read_class_names(path), []
        annotations = read_annotations(path, len(class_names))
        rows = {split: {name: row for name, row in annotations.items() if row.split == split} for split in SPLITS}
        directories = dict.fromkeys(SPLITS, directory / "car_ims" if (directory / "car_ims").is_dir() else directory)
    else:
        has_devkit = any(find_devkit_file(root, name) for name in (META, *ANNOTATIONS["train"], *ANNOTATIONS["test"]))
        names = [name for name in folder_names(root) if splits_in(name) and (has_devkit or "cars" in words(name))]
        chosen, notes = choose_splits([name for name in names if is_flat(innermost(root / name))], root)
        if not any(chosen.values()):
            return None
        missing = "{} has no folder for cars_{}/: expected both cars_train/ and cars_test/"
        folders = folder_of_each(root, chosen, lambda split: missing.format(root, split))
        class_names = read_class_names(require(root, META))
        directories = {split: innermost(root / name) for split, name in folders.items()}
        paths = {split: require(root, ANNOTATIONS[split][0]) for split in SPLITS}
        rows = {split: read_annotations(path, len(class_names), labelled=True) for split, path in paths.items()}
    found: dict[str, list[Row]] = {}
    extra: set[str] = set()
    for split, directory in directories.items():
        place = directory.relative_to(root).as_posix()
        files = {stored.base: stored for stored in picture_files(directory, root, others)}
        found[split] = [
            (files.get(name, Stored(f"{place}/{name}", MISSING)), row.label, row.box)
            for name, row in rows[split].items()
        ]
        extra |= {stored.name for stored in files.values()}
    if extra := sorted(extra - {stored.name for listed in found.values() for stored, _, _ in listed}):
        words_for = (f"{many} in {root} without annotation" for many in ("picture", "pictures"))
        notes.append(f"{listing(extra, *words_for)}; left out")
    if others:
        notes.append(not_pictures(root, set(others)))
    return folder_of_files("original", root, class_names, found, True, notes)


def is_flat(directory: Path) -> bool:
    """Whether pictures lie directly in a folder, and in none of its inner folders."""
    inside = (picture_files(directory / name, directory, []) for name in folder_names(directory))
    return bool(picture_files(directory, directory, [])) and not any(inside)


def innermost(directory: Path) -> Path:
    """The folder, or its only inner folder of the same split (cars_train/cars_train/)."""
    inner = [name for name in folder_names(directory) if splits_in(name) == splits_in(directory.name)]
    return directory / inner[0] if len(inner) == 1 else directory


def boxes_of(
    root: Path, found: dict[str, dict[str, list[Stored]]]
) -> tuple[dict[str, dict[str, Box]] | None, str | None]:
    """Boxes for pictures sorted by class: {split: {file name: box}}, or None and the reason.

    File names alone would also fit renumbered pictures, so the classes must agree too, if the devkit has them. Only
    letters and digits are compared: a class folder cannot have the / of "Ram C/V" in its name.
    """
    paths = {split: find_devkit_file(root, *ANNOTATIONS[split]) for split in SPLITS}
    if not any(paths.values()):
        return None, None
    meta = find_devkit_file(root, META)
    if not all(paths.values()) or meta is None:
        return None, f"expected {META} and annotations of both train and test in {root} or {root / 'devkit'}"
    class_names = read_class_names(meta)
    boxes: dict[str, dict[str, Box]] = {}
    for split in SPLITS:
        annotations = read_annotations(paths[split], len(class_names))
        files = [(name, stored) for name, class_files in found[split].items() for stored in class_files]
        if unknown := [stored.name for _, stored in files if stored.base not in annotations]:
            return None, f"it lacks {len(unknown):,} of {len(files):,} {split} pictures: {first_few(unknown)}"
        for name, stored in files:
            label = annotations[stored.base].label
            if label is not None and letters(class_names[label]) != letters(name):
                return None, f"it has {stored.name} in class {class_names[label]!r}"
        boxes[split] = {name: annotation.box for name, annotation in annotations.items()}
    return boxes, None


def letters(class_name: str) -> str:
    return re.sub(r"[\W_]+", "", class_name).lower()


def find_devkit_file(root: Path, *names: str) -> Path | None:
    """The first of these names that exists at the top of the folder or in its devkit/, or None."""
    candidates = (root / folder / name for name in names for folder in DEVKIT_FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def require(root: Path, name: str, pictures: str = "cars_train/ or cars_test/") -> Path:
    path = find_devkit_file(root, name)
    if path is None:
        without_labels = name == ANNOTATIONS["test"][0] and find_devkit_file(root, *ANNOTATIONS["test"][1:])
        raise DataError(
            f"{root} has {pictures}, but there is no {name} in it or in {root / 'devkit'}"
            + (f" ({without_labels.name} is there, but has no classes)" if without_labels else "")
            + ": put the file there, or sort the pictures by class (train/<Class Name>/, test/<Class Name>/)"
        )
    return path


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names of cars_meta.mat or cars_annos.mat by number; raises a DataError for another file."""
    names = read_mat(path, "class_names").ravel().tolist()
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} has class_names that are not names: is this the devkit's file?")
    return tuple(names)


def read_annotations(path: Path, num_classes: int, labelled: bool = False) -> dict[str, Annotation]:
    """Reads {file name: annotation} from an annotation file, in its order; raises a DataError for another file."""
    rows = read_mat(path, "annotations")
    fields = rows.dtype.names or ()
    name_field = "relative_im_path" if "relative_im_path" in fields else "fname"
    if missing := [field for field in (*BOX_FIELDS, name_field) if field not in fields]:
        raise DataError(f"the annotations in {path} have no field {', '.join(missing)}: is this the devkit's file?")
    if labelled and "class" not in fields:
        raise DataError(f"{path} has no field 'class': expected the file with labels, {path.name}")
    annotations: dict[str, Annotation] = {}
    for number, row in enumerate(rows, 1):
        try:
            box = Box(*(int(row[field]) for field in BOX_FIELDS))
            label = int(row["class"]) - 1 if "class" in fields else None
            split = SPLITS[bool(row["test"])] if "test" in fields else None
        except (TypeError, ValueError, OverflowError) as error:  # an array, text, not a number, infinite
            raise DataError(
                f"{path} has a box or class in row {number:,} that is not in whole numbers ({error}): is this the "
                "devkit's file?"
            ) from error
        name = str(row[name_field]).removeprefix("car_ims/")
        if label is not None and not 0 <= label < num_classes:
            raise DataError(f"{path} has {name} in class {label + 1}: {META} names 1 to {num_classes}")
        if name in annotations or Path(name).name != name:
            problem = "names a picture twice" if name in annotations else "does not name a file"
            raise DataError(f"{path} {problem} in row {number:,} ({name}): is this the devkit's file?")
        annotations[name] = Annotation(box, label, split)
    return annotations


def read_mat(path: Path, variable: str) -> np.ndarray:
    """One variable of a MATLAB file as a one-dimensional array; raises a DataError if it cannot be read."""
    from scipy.io import loadmat  # the import takes a fifth of a second, and only this layout needs it

    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises many types for other files
        raise DataError(
            f"{path} cannot be read as a MATLAB file ({str(error).rstrip('.')}): download it again"
        ) from error
    if variable not in content:
        names = [name for name in content if not name.startswith("__")]
        raise DataError(f"{path} has no variable {variable!r} but {names}: is this the devkit's file?")
    return np.atleast_1d(content[variable])
