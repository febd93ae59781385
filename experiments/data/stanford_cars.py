"""Reads Stanford Cars from a folder in any known layout, and decodes it once into a cache.

Stanford Cars has 196 classes of cars, 8,144 train and 8,041 test pictures (Krause, Stark, Deng, Fei-Fei: 3D Object
Representations for Fine-Grained Categorization, 3dRR-13, 2013).
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from experiments.data import cache
from experiments.data.check import label_findings
from experiments.data.dataset import SPLITS, DataError, Dataset, Split
from experiments.data.layouts import find_pictures
from experiments.data.layouts.files import PictureFolder
from experiments.data.layouts.names import counted, first_few, listing
from experiments.data.pictures import Decoding, Failure, decode_many, printable
from experiments.data.rgb import COLOURS, white_of

FULL = {"train": 8144, "test": 8041}
FULL_CLASSES = 196
REMARKS = {  # notes on decoded pictures: for one, for several
    "clipped": ("box reaches a pixel beyond its picture, clipped", "boxes reach a pixel beyond their picture, clipped"),
    "turned": tuple(f"{need} turning according to EXIF; used as stored" for need in ("picture needs", "pictures need")),
}


def load_stanford_cars(
    data_dir: str | os.PathLike,
    image_size: tuple[int, int],
    grey: bool,
    *,
    skip_bad: bool = False,
    cache_dir: str | os.PathLike | None = None,
    margin: int | None = 16,
) -> Dataset:
    """Reads Stanford Cars, or other pictures in one of its layouts. Prints a summary and every warning to stderr.

    The first call decodes all pictures into the cache; later calls memory-map it.

    Args:
      data_dir: a folder in one of the LAYOUTS, or a folder that contains such a folder under a usual name.
      image_size: (height, width) of the result in pixels, each at least 1; the aspect ratio is not kept.
      grey: one channel instead of three.
      skip_bad: leave out pictures that cannot be used, instead of raising.
      cache_dir: where decoded pictures are kept; None for resnet-adabound in $XDG_CACHE_HOME or ~/.cache.
      margin: pixels by which a box is widened on every side before the picture is cut to it; published crops use 16.
        None takes whole pictures.

    Returns:
      The data set with read-only images: memory maps, or arrays if the cache cannot be written. Its title is "Stanford
      Cars" only if it is complete. `source` lists the pictures left out ("skipped") and all warnings ("notes").

    Raises:
      DataError: the layout is unknown or incomplete; pictures cannot be read or do not contain their box (with skip_bad
        only if half of them miss their box, or none is left).
    """
    folder = find_pictures(Path(os.path.expanduser(data_dir)).absolute())
    decoding = Decoding(tuple(image_size), grey, margin if folder.boxes else None)
    boxes = "no boxes"
    if folder.boxes:
        boxes = "whole pictures" if margin is None else f"cut to their boxes and {margin} pixels around"
    title = title_of(folder, folder.counts)
    print(f"{title}: {tally(folder)} in {folder.directory}, layout {folder.layout}, {boxes}", file=sys.stderr)
    entry = load_or_decode(folder, decoding, skip_bad, cache_dir)
    failures = [Failure(*failure) for failure in entry.facts["failures"]]
    refuse_bad_pictures(folder, failures, skip_bad)
    failed, splits = {failure.name for failure in failures}, {}
    for split in SPLITS:
        pictures, names = folder.pictures(split), None
        if isinstance(pictures, list):  # of separate files
            names = tuple(picture.name for picture in pictures if picture.name not in failed)
        splits[split] = Split(entry.arrays[f"{split}-images"], np.array(entry.arrays[f"{split}-labels"]), names)
    counts = {split: len(splits[split]) for split in SPLITS}
    if empty := [split for split in SPLITS if not counts[split]]:
        raise DataError(f"{folder.directory}: none of the {folder.counts[empty[0]]:,} {empty[0]} pictures can be used")
    source = {
        "layout": folder.layout,
        "directory": str(folder.directory),
        **counts,
        "classes": len(folder.class_names),
        "boxes": decoding.margin is not None,
        "margin": decoding.margin,
        "image_size": list(image_size),
        "grey": grey,
        "white": dict(entry.facts["white"]),
        "skipped": [failure.name for failure in failures],
        "cache": str(entry.directory) if entry.directory else None,
    }
    dataset = Dataset(title_of(folder, counts), folder.class_names, splits["train"], splits["test"], source)
    source["notes"] = [*folder.notes, *set_notes(folder, dataset), *picture_notes(entry.facts, failures), *entry.notes]
    for note in source["notes"]:
        print(f"warning: {note}", file=sys.stderr)
    return dataset


def load_or_decode(
    folder: PictureFolder, decoding: Decoding, skip_bad: bool, cache_dir: str | os.PathLike | None
) -> cache.Entry:
    """The entry with all decoded pictures, from the cache if possible."""

    def make(create: cache.Create) -> dict[str, Any]:
        facts = decode_all(folder, decoding, create)
        if facts["deep"]:  # the value of white depends on all pictures, so they are read a second time
            white = tuple((kind, white_of(kind, highest)) for kind, (_, highest) in facts["deep"].items())
            facts = decode_all(folder, dataclasses.replace(decoding, white=white), create)
        refuse_bad_pictures(folder, facts["failures"], skip_bad)
        return facts

    key = {
        "layout": folder.layout,
        "class_names": folder.class_names,
        "files": folder.identity,
        "decoding": [decoding.image_size, decoding.grey, decoding.margin, "Lanczos"],
        "Pillow": PIL.__version__.split(".")[0],
    }
    size = sum(folder.counts.values()) * math.prod(decoding.shape)
    return cache.load_or_make(cache_dir, "stanford-cars", key, size, make, refuse=unread)


def decode_all(folder: PictureFolder, decoding: Decoding, create: cache.Create) -> dict[str, Any]:
    """Decodes both splits into the arrays <split>-labels and <split>-images; returns facts, as JSON values."""
    title = title_of(folder, folder.counts)
    facts: dict[str, Any] = {"title": title, "directory": str(folder.directory)}
    facts |= {"decoding": str(decoding), "white": decoding.white}
    facts |= {"failures": [], "deep": {}, **{remark: [] for remark in REMARKS}}
    for split in SPLITS:
        labels = create(f"{split}-labels", (), "int32")
        images = create(f"{split}-images", decoding.shape, "uint8")
        decoded = decode_many(folder.pictures(split), decoding)
        bar = tqdm(decoded, f"decoding {title} ({split})", folder.counts[split], unit=" pictures", disable=None)
        for picture, result in bar:
            if isinstance(result, Failure):
                facts["failures"].append(result)
                continue
            labels.append(picture.label)
            images.append(result.pixels)
            for remark in REMARKS:
                if getattr(result, remark):
                    facts[remark].append(picture.name)
            if result.kind is not None:
                count, highest = facts["deep"].get(result.kind, (0, 0))
                facts["deep"][result.kind] = count + 1, max(highest, result.highest)
    return facts


def refuse_bad_pictures(folder: PictureFolder, failures: list[Failure], skip_bad: bool) -> None:
    """Raises a DataError for bad pictures unless skip_bad, and always if half of all pictures miss their box."""
    total, directory = sum(folder.counts.values()), folder.directory
    outside = [failure for failure in failures if failure.kind == "box"]
    if 2 * len(outside) >= total:
        raise DataError(
            f"{len(outside):,} of {total:,} pictures in {directory} do not contain their box: "
            f"{listed(outside, 3)}. Boxes refer to the original photographs. If these are cropped or resized, sort "
            "them by class and move the devkit's .mat files out of the folder"
        )
    if failures and not skip_bad:
        raise DataError(
            f"{len(failures):,} of {total:,} pictures in {directory} cannot be used: {listed(failures)}. Replace them, "
            "or leave them out with --skip-bad"
        )


def unread(facts: dict[str, Any]) -> str | None:
    if any(kind == "file" for _, kind, _ in facts["failures"]):
        return "pictures could not be read when it was made"
    return None


def title_of(folder: PictureFolder, counts: dict[str, int]) -> str:
    """The title of a data set with these numbers of pictures from a folder."""
    if len(folder.class_names) != FULL_CLASSES or any(folder.counts[split] > FULL[split] for split in SPLITS):
        return f"pictures in {printable(folder.directory.name)}"
    if counts == FULL:
        return "Stanford Cars"
    return f"Stanford Cars ({sum(counts.values()):,} of {sum(FULL.values()):,} pictures)"


def tally(folder: PictureFolder) -> str:
    train, test, classes = folder.counts["train"], folder.counts["test"], len(folder.class_names)
    return f"{train:,} train and {test:,} test pictures of {classes:,} classes"


def set_notes(folder: PictureFolder, dataset: Dataset) -> list[str]:
    """Notes on a set that is not the complete Stanford Cars, and warnings about its labels."""
    notes = [finding.text for finding in label_findings(dataset) if finding.severity == "warning"]
    if folder.counts == FULL and len(folder.class_names) == FULL_CLASSES:
        return notes
    full = f"{FULL['train']:,} and {FULL['test']:,} pictures of {FULL_CLASSES} classes"
    return [f"{tally(folder)}: the whole of Stanford Cars has {full}", *notes]


def picture_notes(facts: dict[str, Any], failures: list[Failure]) -> list[str]:
    """Notes on pictures that were left out or needed special treatment."""
    notes = []
    if failures:
        many = counted(len(failures), "picture that cannot be used is", "pictures that cannot be used are")
        notes.append(f"{many} left out: {listed(failures)}")
    for remark, words in REMARKS.items():
        if facts[remark]:
            notes.append(listing(facts[remark], *words))
    white = dict(facts["white"])
    for kind, (count, highest) in facts["deep"].items():
        if (kind, white[kind]) != (COLOURS, 65535):
            many = counted(count, "picture holds", "pictures hold")
            more = " and above" if highest > white[kind] else ""
            notes.append(f"{many} {kind} up to {round(highest, 3):,}: {white[kind]:,}{more} is taken as white")
    return notes


def listed(failures: list[Failure], limit: int = 10) -> str:
    return first_few((f"{failure.name} ({failure.reason})" for failure in failures), limit)
