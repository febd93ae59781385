"""Stanford Cars from a folder in any of the layouts that people have, decoded once into a cache, or when needed.

196 classes of cars, 8,144 pictures to train and 8,041 to test on (Krause, Stark, Deng, Fei-Fei: 3D Object
Representations for Fine-Grained Categorization, 3dRR-13, 2013).
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from tqdm import tqdm

from experiments.data import cache
from experiments.data import folders, packed
from experiments.data.dataset import DataError, Dataset, Split
from experiments.data.pictures import (
    SPLITS,
    Decoding,
    Failure,
    LazyPictures,
    Picture,
    PictureFolder,
    decode_many,
    picture_sums,
    printable,
)

FULL = {"train": 8144, "test": 8041}
FULL_CLASSES = 196
CHECKED_BYTES = 8 + 4 + 2 * 3 * 8  # of a picture, at most: place, label, sums
LAYOUTS = """\
  by class    train/<Class Name>/*.jpg and test/<Class Name>/*.jpg (or any other pictures)
  original    cars_train/*.jpg and cars_test/*.jpg with cars_meta.mat, cars_train_annos.mat and
              cars_test_annos_withlabels.mat beside them or in devkit/
  TFDS        cars196/2.1.0/ as tensorflow_datasets prepares it (dataset_info.json, tfrecord or array_record files)
  parquet     *train*.parquet and *test*.parquet, there or in data/, with the columns image and label (Hugging Face)"""

# A layout is looked for in the folder given and, down to three levels, in folders in it with one of these names.
NESTED = re.compile(
    r"car_data|stanford[-_ ]?cars?([-_ ]dataset)?|cars?196|cars|data|dataset|archive|\d+\.\d+\.\d+", re.I
)
NESTED_LEVELS = 3


def load_stanford_cars(
    data_dir: str | os.PathLike,
    image_size: tuple[int, int],
    grey: bool,
    *,
    skip_bad: bool = False,
    cache_dir: str | os.PathLike | None = None,
    margin: int | None = 16,
    decode: Literal["cache", "lazy"] = "cache",
) -> Dataset:
    """Reads Stanford Cars, or pictures in one of its layouts. What was found and every warning goes to stderr.

    The first call decodes everything, into the cache, which later calls map. With decode="lazy" it only checks that
    everything can be decoded, and keeps what it learns in the cache: labels, which pictures are bad, and sums for the
    channels' statistics, less than 100 bytes a picture.

    Args:
      data_dir: a folder in one of the LAYOUTS, or one that has it in a folder with a usual name.
      image_size: (height, width) of the result in pixels; the aspect ratio is not kept.
      grey: one channel in place of three.
      skip_bad: leave out pictures that cannot be read, instead of raising.
      cache_dir: where decoded pictures are kept; None for resnet-adabound in $XDG_CACHE_HOME or ~/.cache.
      margin: pixels by which a box is widened on every side, clipped at the picture's border, before the picture is
        cut to it. The 16 are those of the crops that are in circulation. None takes the pictures whole. Without
        effect where there are no boxes.
      decode: "cache", or "lazy" for pictures that are decoded each time they are asked for: for a set that the disk
        cannot hold decoded. The pixels are the same.

    Returns:
      The data set, its images read-only: memory maps, arrays where the cache cannot be written, or LazyPictures. It is
      called "Stanford Cars" only if it is the whole set; `source` says what was left out, and holds every warning as
      "notes".

    Raises:
      DataError: no layout found, a part of it missing, pictures that cannot be read (unless skip_bad), or boxes
        outside their pictures; decode="lazy" of a layout whose pictures cannot be read one by one.
      ValueError: image_size or margin is out of range.
    """
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be (height, width) of at least 1 pixel, got {image_size}")
    if margin is not None and margin < 0:
        raise ValueError(f"margin must be at least 0 pixels, or None for whole pictures, got {margin}")
    folder = find_pictures(absolute(data_dir))
    lazy = decode == "lazy"
    if lazy and not all(isinstance(folder.pictures(split), Sequence) for split in SPLITS):
        raise DataError(
            f"{folder.directory} has the layout {folder.layout}, whose pictures cannot be read one by one: have them "
            "decoded into the cache (--decode cache), or prepare the folder by class, or by TFDS as array_record "
            '(download_and_prepare(file_format="array_record"))'
        )
    decoding = Decoding(tuple(image_size), grey, margin if folder.boxes else None)
    title = title_of(folder, folder.counts)
    print(f"{title}: {describe(folder, decoding)}", file=sys.stderr)

    def make(create: cache.Create) -> dict[str, Any]:
        read_split = check_split if lazy else decode_split
        failures = [failure for split in SPLITS for failure in read_split(folder, split, decoding, title, create)]
        refuse_bad_pictures(failures, folder, skip_bad)
        return {"title": title, "directory": str(folder.directory), "decoding": str(decoding), "failures": failures}

    entry = cache.load_or_make(
        cache_dir,
        "stanford-cars-checked" if lazy else "stanford-cars",
        {
            "layout": folder.layout,
            "class_names": folder.class_names,
            "files": folder.identity,
            "decoding": [decoding.image_size, decoding.grey, decoding.margin, "Lanczos"],
            "Pillow": PIL.__version__.split(".")[0],
        },
        sum(folder.counts.values()) * (CHECKED_BYTES if lazy else math.prod(decoding.shape)),
        make,
        refuse=lambda facts: (
            "pictures could not be read when it was made"
            if any(kind == "file" for _, kind, _ in facts["failures"])
            else None
        ),
        **(dict(uncached="all pictures are checked anew at the next start") if lazy else {}),
    )
    failures = [Failure(*failure) for failure in entry.facts["failures"]]
    refuse_bad_pictures(failures, folder, skip_bad)
    splits = {}
    for split in SPLITS:
        if lazy:
            places, sums = (np.array(entry.arrays[f"{split}-{name}"]) for name in ("places", "sums"))
            images = LazyPictures(folder.pictures(split), places, sums, decoding, folder.directory)
        else:
            images = entry.arrays[f"{split}-images"]
        labels = np.array(entry.arrays[f"{split}-labels"])
        splits[split] = Split(images, labels, names_of(folder.pictures(split), failures))
    counts = {split: len(splits[split]) for split in SPLITS}
    if empty := [split for split in SPLITS if not counts[split]]:
        raise DataError(f"{folder.directory}: no {empty[0]} pictures are left of {folder.counts[empty[0]]:,}")
    notes = [*folder.notes, *count_notes(folder), *class_notes(folder, splits), *skip_notes(failures), *entry.notes]
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    return Dataset(
        title=title_of(folder, counts),
        class_names=folder.class_names,
        train=splits["train"],
        test=splits["test"],
        source={
            "layout": folder.layout,
            "directory": str(folder.directory),
            **counts,
            "classes": len(folder.class_names),
            "boxes": decoding.margin is not None,
            "margin": decoding.margin,
            "image_size": list(decoding.image_size),
            "grey": grey,
            "decode": decode,
            "skipped": [failure.name for failure in failures],
            "cache": str(entry.directory) if entry.directory else None,
            "notes": notes,
        },
    )


def absolute(data_dir: str | os.PathLike) -> Path:
    try:
        return Path(data_dir).expanduser().absolute()
    except RuntimeError as error:  # ~name, or ~ without $HOME
        raise DataError(f"{data_dir} does not exist: there is no home folder of that name") from error


def find_pictures(data_dir: Path) -> PictureFolder:
    """The first layout found in the folder or, level by level, in folders in it with a usual name.

    Raises:
      DataError: there is none, or the first one found has a part missing.
    """
    try:
        if not data_dir.is_dir():
            kind = "is no folder" if data_dir.exists() else "does not exist"
            kind = "is a file: unpack it and give the folder" if data_dir.is_file() else kind
            raise DataError(f"{data_dir} {kind}. Give a folder with Stanford Cars in one of these layouts:\n{LAYOUTS}")
        for root in likely_folders(data_dir):
            for reader in (folders.original, folders.by_class, packed.tfds, packed.parquet):
                if (folder := reader(root)) is not None:
                    return folder
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror})") from error
    raise DataError(f"{data_dir} has Stanford Cars in no layout that this program knows. It knows:\n{LAYOUTS}")


def likely_folders(data_dir: Path) -> Iterator[Path]:
    level = [data_dir]
    for _ in range(NESTED_LEVELS + 1):
        yield from level
        level = [
            directory / name
            for directory in level
            for name in reversed(folders.class_folders(directory))  # of several versions the newest
            if NESTED.fullmatch(name)
        ]


def decode_split(
    folder: PictureFolder, split: str, decoding: Decoding, title: str, create: cache.Create
) -> list[Failure]:
    """Decodes a split into the arrays <split>-images and <split>-labels; returns the pictures that it could not."""
    images = create(f"{split}-images", decoding.shape, "uint8")
    labels = create(f"{split}-labels", (), "int32")
    failures = []
    for picture, result in with_bar(folder, split, decoding, f"decoding {title} ({split})"):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            images.append(result)
            labels.append(np.int32(picture.label))
    return failures


def check_split(
    folder: PictureFolder, split: str, decoding: Decoding, title: str, create: cache.Create
) -> list[Failure]:
    """Decodes a split and keeps of every picture its place in the folder, its label and its sums (`picture_sums`), as
    the arrays <split>-places, -labels and -sums; returns the pictures that it could not decode."""
    places = create(f"{split}-places", (), "int64")
    labels = create(f"{split}-labels", (), "int32")
    sums = create(f"{split}-sums", (2, decoding.shape[-1]), "int64")
    failures = []
    for place, (picture, result) in enumerate(with_bar(folder, split, decoding, f"checking {title} ({split})")):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            places.append(np.int64(place))
            labels.append(np.int32(picture.label))
            sums.append(picture_sums(result))
    return failures


def names_of(pictures: Iterable[Picture], failures: list[Failure]) -> tuple[str, ...] | None:
    """The names of the pictures that could be decoded, where they are known without reading the pictures."""
    if not isinstance(pictures, folders.Files):
        return None
    failed = {failure.name for failure in failures}
    return tuple(picture.name for picture in pictures if picture.name not in failed)


def with_bar(
    folder: PictureFolder, split: str, decoding: Decoding, description: str
) -> Iterator[tuple[Picture, np.ndarray | Failure]]:
    """Every picture of a split with what `decode_many` makes of it, with a progress bar."""
    decoded = decode_many(folder.pictures(split), decoding)
    # No bar where stderr is not a terminal.
    return iter(tqdm(decoded, description, folder.counts[split], unit=" pictures", disable=None))


def refuse_bad_pictures(failures: list[Failure], folder: PictureFolder, skip_bad: bool) -> None:
    """Raises a DataError for boxes outside their pictures, and, unless skip_bad, for pictures that cannot be read."""
    total = sum(folder.counts.values())
    outside = [failure for failure in failures if failure.kind == "box"]
    if outside:
        raise DataError(
            f"{len(outside):,} of {total:,} pictures in {folder.directory} do not contain their box: "
            f"{listed(outside)}. "
            "Boxes refer to the original photographs: have these been cut out or resized already? Then sort them by "
            "class and take the devkit's .mat files out of the folder"
        )
    if failures and not skip_bad:
        raise DataError(
            f"{len(failures):,} of {total:,} pictures in {folder.directory} cannot be read: {listed(failures)}. "
            "Replace them, or leave them out with --skip-bad"
        )


def title_of(folder: PictureFolder, counts: dict[str, int]) -> str:
    """What so many pictures of a folder may truthfully be called."""
    if len(folder.class_names) != FULL_CLASSES or any(folder.counts[split] > FULL[split] for split in SPLITS):
        return f"pictures in {printable(folder.directory.name)}"
    if counts == FULL:
        return "Stanford Cars"
    return f"Stanford Cars ({sum(counts.values()):,} of {sum(FULL.values()):,} pictures)"


def describe(folder: PictureFolder, decoding: Decoding) -> str:
    boxes = "no boxes"
    if folder.boxes:
        boxes = (
            "whole pictures" if decoding.margin is None else f"cut to their boxes and {decoding.margin} pixels around"
        )
    return (
        f"{folder.counts['train']:,} train and {folder.counts['test']:,} test pictures of {len(folder.class_names):,} "
        f"classes in {folder.directory}, layout {folder.layout}, {boxes}"
    )


def count_notes(folder: PictureFolder) -> list[str]:
    if folder.counts == FULL and len(folder.class_names) == FULL_CLASSES:
        return []
    return [
        f"{folder.counts['train']:,} train and {folder.counts['test']:,} test pictures of {len(folder.class_names):,} "
        f"classes: the whole of Stanford Cars is {FULL['train']:,} and {FULL['test']:,} of {FULL_CLASSES}"
    ]


def class_notes(folder: PictureFolder, splits: dict[str, Split]) -> list[str]:
    """A note for each split in which classes have no pictures."""
    notes = []
    for split in SPLITS:
        occurrences = np.bincount(splits[split].labels, minlength=len(folder.class_names))
        if absent := [name for name, times in zip(folder.class_names, occurrences, strict=True) if not times]:
            notes.append(f"{len(absent):,} classes have no {split} pictures: {folders.first_few(absent)}")
    return notes


def skip_notes(failures: list[Failure]) -> list[str]:
    return [f"{len(failures):,} pictures that cannot be read are left out: {listed(failures)}"] if failures else []


def listed(failures: list[Failure]) -> str:
    return folders.first_few(f"{failure.name} ({failure.reason})" for failure in failures)
