"""Reads a data set that TFDS prepared as tfrecord or array_record files, without TensorFlow."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.data.dataset import SPLITS, DataError
from experiments.data.layouts.files import PictureFolder, identity
from experiments.data.layouts.names import choose_splits, missing_package
from experiments.data.pictures import Box, Picture

AGAIN = "prepare the data set again"
PACKAGES = "tensorflow-datasets", "array-record"


def tfds(root: Path, name: str = "cars196", boxes: bool = True) -> PictureFolder | None:
    """Reads a folder that TFDS prepared (cars196/2.1.0/), or returns None if there is no dataset_info.json.

    Args:
      root: the folder.
      name: the data set that the folder must hold.
      boxes: whether the pictures have boxes.

    Raises:
      DataError: the folder holds another data set, a file is missing or damaged, or a package is not installed.
    """
    if not (root / "dataset_info.json").is_file():
        return None
    if not (root / "features.json").is_file():
        raise DataError(f"{root} has dataset_info.json but no features.json: an old TFDS prepared it, {AGAIN}")
    builder = open_builder(root)
    features = builder.info.features
    expected = {"image", "label"} | ({"bbox"} if boxes else set())
    if builder.name != name or not expected <= set(features):
        raise DataError(
            f"{root} holds the TFDS data set {builder.name!r} with {sorted(features)}: "
            f"expected {name!r} with {sorted(expected)}"
        )
    chosen, notes = choose_splits(builder.info.splits, root)
    if unclear := [split for split in SPLITS if len(chosen[split]) != 1]:
        there = sorted(builder.info.splits)
        raise DataError(f"{root} has {len(chosen[unclear[0]])} splits for {unclear[0]!r} among {there}: {AGAIN}")
    splits = {split: builder.info.splits[chosen[split][0]] for split in SPLITS}
    files = {split: [Path(path) for path in splits[split].filepaths] for split in SPLITS}
    paths = files["train"] + files["test"]
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(f"{len(missing)} of {len(paths)} files of {root} are missing, first {missing[0].name}: {AGAIN}")
    class_names = tuple(features["label"].names)
    if boxes and class_names == tuple(map(str, range(len(class_names)))):
        notes.append(f"{root} has no label.labels.txt with the classes' names: they are called by number")
    return PictureFolder(
        layout=f"TFDS {name} ({builder.info.file_format.value})",
        directory=root,
        class_names=class_names,
        counts={split: splits[split].num_examples for split in SPLITS},
        boxes=boxes,
        identity=identity(files),
        notes=tuple(notes),
        pictures=lambda split: read_pictures(root, builder, chosen[split][0], boxes),
    )


def open_builder(root: Path) -> Any:
    """TFDS's builder of the folder; raises a DataError if TFDS is missing or cannot read the folder."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(missing_package(f"{root} was prepared by TFDS, and reading it", error, *PACKAGES)) from error
    try:
        builder = tensorflow_datasets.builder_from_directory(str(root))
        file_format = builder.info.file_format.value
    except Exception as error:  # TFDS passes on what its parsers raise
        raise DataError(f"{root} cannot be read as a TFDS data set ({error})") from error
    if file_format not in ("tfrecord", "array_record"):
        raise DataError(f"{root} is in TFDS's format {file_format}: expected tfrecord or array_record")
    if file_format == "array_record":
        try:
            importlib.import_module("array_record.python.array_record_module")  # otherwise the first picture would fail
        except ImportError as error:
            raise DataError(missing_package(str(root), error, PACKAGES[1])) from error
    return builder


def read_pictures(root: Path, builder: Any, name: str, boxes: bool) -> Iterator[Picture]:
    """Yields the pictures of the split of this name, in the order of its files.

    Raises:
      DataError: a file is damaged, or has more or fewer records than dataset_info.json says.
    """
    import tensorflow_datasets
    from grain.experimental import TFRecordIterDataset
    from grain.sources import ArrayRecordDataSource

    split, features, number = builder.info.splits[name], builder.info.features, -1
    decoders, classes = {"image": tensorflow_datasets.decode.SkipDecoding()}, features["label"].num_classes
    source = TFRecordIterDataset if builder.info.file_format.value == "tfrecord" else ArrayRecordDataSource
    records = (record for path in split.filepaths for record in source(str(path)))
    try:
        for number, record in enumerate(records):
            example = features.deserialize_example_np(record, decoders=decoders)
            picture, label = f"{name} {example['id'].decode() if 'id' in example else number}", int(example["label"])
            if not 0 <= label < classes:
                raise DataError(f"{picture} of {root} has the label {label}: expected 0 to {classes - 1}")
            box = None
            if boxes:
                ymin, xmin, ymax, xmax = map(float, example["bbox"])
                box = Box(xmin, ymin, xmax, ymax, relative=True)
            yield Picture(picture, label, box, example["image"])
    except DataError:
        raise
    except Exception as error:  # types of grain, array_record and protobuf, and MemoryError where a length is damaged
        reason = (str(error) or type(error).__name__).partition(": b'")[0]  # grain appends the bytes
        raise DataError(f"{root} is damaged after {number + 1:,} {name} pictures ({reason}): {AGAIN}") from error
    if number + 1 != split.num_examples:
        raise DataError(
            f"{root} holds {number + 1:,} {name} pictures, but its dataset_info.json says "
            f"{split.num_examples:,}: {AGAIN}"
        )
