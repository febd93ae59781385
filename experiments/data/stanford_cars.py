"""Stanford Cars from a folder in any of the layouts that people have, decoded once into a cache, or when needed.

196 classes of cars, 8,144 pictures to train and 8,041 to test on (Krause, Stark, Deng, Fei-Fei: 3D Object
Representations for Fine-Grained Categorization, 3dRR-13, 2013).
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from tqdm import tqdm

from experiments.data import cache
from experiments.data.dataset import SPLITS, DataError, Dataset, Split, pixel_sums
from experiments.data.layouts import find_pictures
from experiments.data.layouts.files import Files, PictureFolder
from experiments.data.layouts.names import counted, first_few
from experiments.data.lazy import LazyPictures
from experiments.data.pictures import Decoding, Failure, Picture, decode_many, printable
from experiments.data.rgb import COLOURS, white_of

FULL = {"train": 8144, "test": 8041}
FULL_CLASSES = 196
CHECKED_BYTES = 8 + 4 + 2 * 3 * 8  # of a picture, at most: place, label, sums


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
      skip_bad: leave out pictures that cannot be used, instead of raising.
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
      DataError: no layout found, a part of it missing, pictures that cannot be read or do not contain their box (unless
        skip_bad, and then too if half do not); decode="lazy" of a layout whose pictures cannot be read one by one.
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

    entry = decoded(folder, decoding, title, cache_dir, skip_bad=skip_bad, lazy=lazy)
    failures = [Failure(*failure) for failure in entry.facts["failures"]]
    refuse_bad_pictures(failures, folder, skip_bad)
    decoding = dataclasses.replace(decoding, white=tuple(map(tuple, entry.facts["white"])))
    splits = {split: split_of(folder, split, entry, decoding, failures, lazy=lazy) for split in SPLITS}
    counts = {split: len(splits[split]) for split in SPLITS}
    if empty := [split for split in SPLITS if not counts[split]]:
        raise DataError(f"{folder.directory}: no {empty[0]} pictures are left of {folder.counts[empty[0]]:,}")
    notes = [
        *folder.notes,
        *count_notes(folder),
        *class_notes(folder, splits),
        *picture_notes(entry.facts),
        *entry.notes,
    ]
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
            "white": dict(decoding.white),
            "decode": decode,
            "skipped": [failure.name for failure in failures],
            "cache": str(entry.directory) if entry.directory else None,
            "notes": notes,
        },
    )


def decoded(
    folder: PictureFolder,
    decoding: Decoding,
    title: str,
    cache_dir: str | os.PathLike | None,
    *,
    skip_bad: bool,
    lazy: bool,
) -> cache.Entry:
    """What decoding all pictures gives, from the cache if it is there; arguments as for `load_stanford_cars`."""

    def make(create: cache.Create) -> dict[str, Any]:
        facts = read_pictures(folder, decoding, title, create, lazy)
        if facts["deep"]:  # what is white follows from all of them, so they are read once more
            white = tuple((kind, white_of(kind, highest)) for kind, (_, highest) in facts["deep"].items())
            facts = read_pictures(folder, dataclasses.replace(decoding, white=white), title, create, lazy)
        refuse_bad_pictures(facts["failures"], folder, skip_bad)
        return facts

    return cache.load_or_make(
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
    )


def split_of(
    folder: PictureFolder, split: str, entry: cache.Entry, decoding: Decoding, failures: list[Failure], *, lazy: bool
) -> Split:
    """A split of what `decoded` gave."""
    if lazy:
        places, sums = (np.array(entry.arrays[f"{split}-{name}"]) for name in ("places", "sums"))
        images = LazyPictures(folder.pictures(split), places, sums, decoding, folder.directory)
    else:
        images = entry.arrays[f"{split}-images"]
    labels = np.array(entry.arrays[f"{split}-labels"])
    return Split(images, labels, names_of(folder.pictures(split), failures))


def absolute(data_dir: str | os.PathLike) -> Path:
    try:
        return Path(data_dir).expanduser().absolute()
    except RuntimeError as error:  # ~name, or ~ without $HOME
        raise DataError(f"{data_dir} does not exist: there is no home folder of that name") from error


def read_pictures(
    folder: PictureFolder, decoding: Decoding, title: str, create: cache.Create, lazy: bool
) -> dict[str, Any]:
    """Decodes both splits into the arrays <split>-images and <split>-labels.

    If lazy, it keeps in place of a picture where it is in the folder and its sums (`pixel_sums`), as <split>-places
    and <split>-sums.

    Returns:
      what is to be said of the folder and its pictures, as JSON values.
    """
    facts: dict[str, Any] = {"title": title, "directory": str(folder.directory), "decoding": str(decoding)}
    facts |= {"white": decoding.white, "failures": [], "clipped": [], "turned": [], "deep": {}}
    columns = {"labels": ((), "int32"), "images": (decoding.shape, "uint8")}
    if lazy:
        columns = {"labels": ((), "int32"), "places": ((), "int64"), "sums": ((2, decoding.shape[-1]), "int64")}
    for split in SPLITS:
        writers = {name: create(f"{split}-{name}", *column) for name, column in columns.items()}
        decoded = decode_many(folder.pictures(split), decoding)
        description = f"{'checking' if lazy else 'decoding'} {title} ({split})"
        bar = tqdm(decoded, description, folder.counts[split], unit=" pictures", disable=None)  # terminals only
        for place, (picture, result) in enumerate(bar):
            if isinstance(result, Failure):
                facts["failures"].append(result)
                continue
            row = {"labels": picture.label, "images": result.pixels, "places": place}
            if lazy:
                row["sums"] = pixel_sums(result.pixels)
            for name, writer in writers.items():
                writer.append(row[name])
            for remark in ("clipped", "turned"):
                if getattr(result, remark):
                    facts[remark].append(picture.name)
            if result.kind is not None:
                count, highest = facts["deep"].get(result.kind, (0, 0))
                facts["deep"][result.kind] = count + 1, max(highest, result.highest)
    return facts


def names_of(pictures: Iterable[Picture], failures: list[Failure]) -> tuple[str, ...] | None:
    """The names of the pictures that could be decoded, where they are known without reading the pictures."""
    if not isinstance(pictures, Files):
        return None
    failed = {failure.name for failure in failures}
    return tuple(picture.name for picture in pictures if picture.name not in failed)


def refuse_bad_pictures(failures: list[Failure], folder: PictureFolder, skip_bad: bool) -> None:
    """Raises a DataError for pictures that cannot be used (unless skip_bad), and if half do not contain their box."""
    total = sum(folder.counts.values())
    outside = [failure for failure in failures if failure.kind == "box"]
    if 2 * len(outside) >= total:
        raise DataError(
            f"{len(outside):,} of {total:,} pictures in {folder.directory} do not contain their box: "
            f"{listed(outside, 3)}. "
            "Boxes refer to the original photographs: have these been cut out or resized already? Then sort them by "
            "class and take the devkit's .mat files out of the folder"
        )
    if failures and not skip_bad:
        raise DataError(
            f"{len(failures):,} of {total:,} pictures in {folder.directory} cannot be used: {listed(failures)}. "
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
            notes.append(
                f"{counted(len(absent), 'class has', 'classes have')} no {split} pictures: {first_few(absent)}"
            )
    return notes


def picture_notes(facts: dict[str, Any]) -> list[str]:
    """What was left out, and what was done with pictures that are not as most are."""
    failures, clipped, turned = facts["failures"], facts["clipped"], facts["turned"]
    notes = []
    if failures:
        failures = [Failure(*failure) for failure in failures]
        many = counted(len(failures), "picture that cannot be used is", "pictures that cannot be used are")
        notes.append(f"{many} left out: {listed(failures)}")
    if clipped:
        many = counted(len(clipped), "box reaches a pixel beyond its", "boxes reach a pixel beyond their")
        notes.append(f"{many} picture, clipped: {first_few(clipped)}")
    if turned:
        many = counted(len(turned), "picture is to be turned, says its", "pictures are to be turned, says their")
        notes.append(f"{many} EXIF; used as stored: {first_few(turned)}")
    for kind, (count, highest) in facts["deep"].items():
        white = dict(map(tuple, facts["white"]))[kind]
        if (kind, white) != (COLOURS, 65535):
            note = f"{counted(count, 'picture holds', 'pictures hold')} {kind} of up to {round(highest, 3):,}: "
            note += f"{white:,} is taken for white"
            notes.append(note + (", and what exceeds it, too" if highest > white else ""))
    return notes


def listed(failures: list[Failure], limit: int = 10) -> str:
    return first_few((f"{failure.name} ({failure.reason})" for failure in failures), limit)
