"""The known layouts of picture folders, and the search for one of them in a folder.

The reader of a layout returns None for a folder in another layout. If a part is missing or damaged, it raises a
DataError that says what is wrong, where, and what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from experiments.data.dataset import DataError
from experiments.data.layouts.by_class import by_class
from experiments.data.layouts.devkit import original
from experiments.data.layouts.files import PictureFolder, picture_files
from experiments.data.layouts.names import first_few, folder_names, is_leftover, splits_in, words
from experiments.data.layouts.parquet import parquet
from experiments.data.layouts.tfds import tfds

LAYOUTS = """\
  by class    train/<Class Name>/*.jpg and test/<Class Name>/*.jpg (or any other pictures)
  original    cars_train/*.jpg and cars_test/*.jpg with cars_meta.mat, cars_train_annos.mat and
              cars_test_annos_withlabels.mat beside them or in devkit/; or car_ims/*.jpg with cars_annos.mat
  TFDS        cars196/2.1.0/ as tensorflow_datasets prepares it (dataset_info.json, tfrecord or array_record files)
  parquet     *train*.parquet and *test*.parquet, at the top or in data/, with columns image and label (Hugging Face)"""
USUAL = {"car", "cars", "stanford", "data", "dataset", "datasets", "archive", "hub", "huggingface", "snapshots"}
INNER_LEVELS = 4
ADVICE = {  # for files in a folder without a known layout: suffixes -> what to do
    (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar"): "unpack it",
    (".arrow",): "write it as parquet (Dataset.to_parquet)",
    (".parquet",): "its name must say train or test",
    (".csv", ".json", ".txt"): "sort the pictures by class, since labels in such files are not read",
    (".mat",): "put the pictures beside it, in cars_train/ and cars_test/, or in car_ims/",
    (".h5", ".hdf5", ".npz", ".npy", ".pkl"): "save the pictures as files, since arrays are not read",
}


def find_pictures(data_dir: Path) -> PictureFolder:
    """Finds the layout in the folder or, level by level, in the inner folders that `inner_folders` selects.

    Raises:
      DataError: no layout or more than one is found, or a part of it is missing.
    """
    try:
        if not data_dir.is_dir():
            kind = "is no folder" if data_dir.exists() else "does not exist"
            kind = "is a file: unpack it and give the folder" if data_dir.is_file() else kind
            raise DataError(f"{data_dir} {kind}. Give a folder with Stanford Cars in one of these layouts:\n{LAYOUTS}")
        for level in folder_levels(data_dir, USUAL):
            read = (by_class(root) or original(root) or tfds(root) or parquet(root) for root in level)
            found = [folder for folder in read if folder is not None]
            if len(found) > 1:
                places = first_few(str(folder.directory) for folder in found)
                raise DataError(f"{data_dir} has {len(found)} sets of pictures: give one of {places}")
            if found:
                return found[0]
        hint = describe_content(data_dir)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror})") from error
    raise DataError(f"{data_dir} is in no known layout; {hint}. The known layouts:\n{LAYOUTS}")


def folder_levels(data_dir: Path, usual: set[str]) -> Iterator[list[Path]]:
    """Yields the folder itself, then level by level the folders inside that `inner_folders` selects."""
    level = [data_dir]
    for _ in range(INNER_LEVELS + 1):
        yield level
        level = [directory / name for directory in level for name in inner_folders(directory, usual)]


def inner_folders(directory: Path, usual: set[str]) -> list[str]:
    """Selects folders inside a folder: those with one of the `usual` words in their names, or the only one.

    If they are versions (2.0.0, 2.1.0), selects the newest; in a cache of Hugging Face, the current snapshot.
    """
    names = folder_names(directory)
    main = directory.parent / "refs" / "main"
    if directory.name == "snapshots" and main.is_file() and (current := main.read_text().strip()) in names:
        return [current]
    if versions := [name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name)]:
        return [max(versions, key=lambda name: [int(number) for number in name.split(".")])]
    return [name for name in names if words(name) & usual] or (names if len(names) == 1 else [])


def describe_content(data_dir: Path) -> str:
    """Says for a message what a folder without a known layout holds, and what to do."""
    names = sorted(name for name in os.listdir(data_dir) if not is_leftover(name))
    for suffixes, advice in ADVICE.items():
        if fitting := [name for name in names if name.lower().endswith(suffixes) and (data_dir / name).is_file()]:
            return f"it holds {first_few(fitting, 3)}: {advice}"
    folders = folder_names(data_dir)
    if with_pictures := [name for name in folders if picture_files(data_dir / name, data_dir, [])]:
        return f"it has pictures in {first_few(with_pictures, 3)}, but no train/<Class Name>/ and test/<Class Name>/"

    def holds_splits(name: str) -> bool:
        inner = [data_dir / name / folder for folder in folder_names(data_dir / name) if splits_in(folder)]
        return any(picture_files(folder, data_dir, []) for folder in inner)

    by_split = list(filter(holds_splits, folders))
    if len(by_split) > 1:
        first = by_split[0]
        return f"{first_few(by_split, 3)} hold train and test each: expected train/{first}/ and test/{first}/"
    if of_splits := list(filter(splits_in, folders)):
        return f"{first_few(of_splits, 3)} hold no class folders with picture files (.jpg, .png, …)"
    return f"it holds {first_few(names, 5)}" if names else "it is empty"
