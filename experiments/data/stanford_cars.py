"""Reads Stanford Cars from a folder in any known layout. Decodes it once into a cache, or at each access.

Stanford Cars has 196 classes of cars, 8,144 train and 8,041 test pictures (Krause, Stark, Deng, Fei-Fei: 3D Object
Representations for Fine-Grained Categorization, 3dRR-13, 2013).
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from tqdm import tqdm

from experiments.data import cache
from experiments.data.check import label_findings
from experiments.data.dataset import SPLITS, DataError, Dataset, Split, pixel_sums
from experiments.data.layouts import find_pictures
from experiments.data.layouts.files import Files, PictureFolder
from experiments.data.layouts.names import counted, first_few, listing
from experiments.data.lazy import LazyPictures
from experiments.data.pictures import Decoding, Failure, decode_many, printable
from experiments.data.rgb import COLOURS, white_of

FULL = {"train": 8144, "test": 8041}
FULL_CLASSES = 196
REMARKS = {  # notes on decoded pictures: for one, for several
    "clipped": ("box reaches a pixel beyond its picture, clipped", "boxes reach a pixel beyond their picture, clipped"),
    "turned": tuple(f"{need} turning according to EXIF; used as stored" for need in ("picture needs", "pictures need")),
}
CHECKED_BYTES = 8 + 4 + 2 * 3 * 8  # at most, for each picture: place, label, sums


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
    """Reads Stanford Cars, or other pictures in one of its layouts. Prints a summary and every warning to stderr.

    Args:
      data_dir: a folder in one of the LAYOUTS, or a folder that contains such a folder under a usual name.
      image_size: (height, width) of the result in pixels, each at least 1; the aspect ratio is not kept.
      grey: one channel instead of three.
      skip_bad: leave out pictures that cannot be used, instead of raising.
      cache_dir: where decoded pictures are kept; None for resnet-adabound in $XDG_CACHE_HOME or ~/.cache.
      margin: pixels by which a box is widened on every side before the picture is cut to it; published crops use 16.
        None takes whole pictures.
      decode: "cache" decodes all pictures into the cache at the first call; later calls memory-map it. "lazy", for data
        that the disk cannot hold decoded, decodes at each access; the first call checks all pictures, and caches only
        labels, failures and pixel sums. The pixels are the same.

    Returns:
      The data set with read-only images: memory maps, arrays if the cache cannot be written, or LazyPictures. Its title
      is "Stanford Cars" only if it is complete. `source` lists the pictures left out ("skipped") and all warnings
      ("notes").

    Raises:
      DataError: the layout is unknown or incomplete; pictures cannot be read or do not contain their box (with skip_bad
        only if half of them miss their box, or none is left); decode="lazy" cannot read this layout one by one.
    """
    folder = find_pictures(Path(os.path.expanduser(data_dir)).absolute())
    decoding = Decoding(tuple(image_size), grey, margin if folder.boxes else None)
    reader = Reader(folder, decoding, skip_bad, lazy=decode == "lazy")
    boxes = "no boxes"
    if folder.boxes:
        boxes = "whole pictures" if margin is None else f"cut to their boxes and {margin} pixels around"
    print(f"{reader.title}: {tally(folder)} in {folder.directory}, layout {folder.layout}, {boxes}", file=sys.stderr)
    entry = reader.entry(cache_dir)
    failures = [Failure(*failure) for failure in entry.facts["failures"]]
    reader.refuse_bad_pictures(failures)
    white = dict(entry.facts["white"])
    splits = {split: reader.split(split, entry, failures, white) for split in SPLITS}
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
        "white": white,
        "decode": decode,
        "skipped": [failure.name for failure in failures],
        "cache": str(entry.directory) if entry.directory else None,
    }
    dataset = Dataset(title_of(folder, counts), folder.class_names, splits["train"], splits["test"], source)
    source["notes"] = [*folder.notes, *set_notes(folder, dataset), *picture_notes(entry.facts, failures), *entry.notes]
    for note in source["notes"]:
        print(f"warning: {note}", file=sys.stderr)
    return dataset


@dataclasses.dataclass(frozen=True)
class Reader:
    """Decodes a folder once, or, if `lazy`, checks it and collects what LazyPictures needs."""

    folder: PictureFolder
    decoding: Decoding
    skip_bad: bool
    lazy: bool

    def __post_init__(self) -> None:
        if self.lazy and not all(isinstance(self.folder.pictures(split), Sequence) for split in SPLITS):
            raise DataError(
                f"{self.folder.directory} has the layout {self.folder.layout}, whose pictures cannot be read one by "
                "one: pass --decode cache, sort the pictures by class, or have TFDS prepare them as array_record "
                '(download_and_prepare(file_format="array_record"))'
            )

    @property
    def title(self) -> str:
        return title_of(self.folder, self.folder.counts)

    def entry(self, cache_dir: str | os.PathLike | None) -> cache.Entry:
        """The entry with all pictures decoded (or checked, if lazy), from the cache if possible."""
        decoding = self.decoding
        key = {
            "layout": self.folder.layout,
            "class_names": self.folder.class_names,
            "files": self.folder.identity,
            "decoding": [decoding.image_size, decoding.grey, decoding.margin, "Lanczos"],
            "Pillow": PIL.__version__.split(".")[0],
        }
        size = sum(self.folder.counts.values()) * (CHECKED_BYTES if self.lazy else math.prod(decoding.shape))
        name = "stanford-cars-checked" if self.lazy else "stanford-cars"
        return cache.load_or_make(cache_dir, name, key, size, self.make, refuse=unread)

    def make(self, create: cache.Create) -> dict[str, Any]:
        facts = self.read(create, self.decoding)
        if facts["deep"]:  # the value of white depends on all pictures, so they are read a second time
            white = tuple((kind, white_of(kind, highest)) for kind, (_, highest) in facts["deep"].items())
            facts = self.read(create, dataclasses.replace(self.decoding, white=white))
        self.refuse_bad_pictures(facts["failures"])
        return facts

    def read(self, create: cache.Create, decoding: Decoding) -> dict[str, Any]:
        """Decodes both splits into the arrays <split>-images (if lazy, <split>-places and -sums) and <split>-labels.

        places: indices in the folder's order; sums: `pixel_sums` of each picture. Returns facts, as JSON values.
        """
        facts: dict[str, Any] = {"title": self.title, "directory": str(self.folder.directory)}
        facts |= {"decoding": str(decoding), "white": decoding.white}
        facts |= {"failures": [], "deep": {}, **{remark: [] for remark in REMARKS}}
        kept = {"labels": ((), "int32"), "images": (decoding.shape, "uint8")}
        if self.lazy:
            kept = {"labels": ((), "int32"), "places": ((), "int64"), "sums": ((2, decoding.shape[-1]), "int64")}
        for split in SPLITS:
            columns = {name: create(f"{split}-{name}", *of_items) for name, of_items in kept.items()}
            decoded = decode_many(self.folder.pictures(split), decoding)
            description = f"{'checking' if self.lazy else 'decoding'} {self.title} ({split})"
            bar = tqdm(decoded, description, self.folder.counts[split], unit=" pictures", disable=None)
            for place, (picture, result) in enumerate(bar):
                if isinstance(result, Failure):
                    facts["failures"].append(result)
                    continue
                row = {"labels": picture.label, "images": result.pixels, "places": place}
                if self.lazy:
                    row["sums"] = pixel_sums(result.pixels)
                for name, column in columns.items():
                    column.append(row[name])
                for remark in REMARKS:
                    if getattr(result, remark):
                        facts[remark].append(picture.name)
                if result.kind is not None:
                    count, highest = facts["deep"].get(result.kind, (0, 0))
                    facts["deep"][result.kind] = count + 1, max(highest, result.highest)
        return facts

    def split(self, split: str, entry: cache.Entry, failures: list[Failure], white: dict[str, int]) -> Split:
        """A split of the entry, with the pictures' names if they are known without reading the pictures."""
        pictures, names = self.folder.pictures(split), None
        if self.lazy:
            places, sums = (np.array(entry.arrays[f"{split}-{name}"]) for name in ("places", "sums"))
            decoding = dataclasses.replace(self.decoding, white=tuple(white.items()))
            images = LazyPictures(pictures, places, sums, decoding, self.folder.directory)
        else:
            images = entry.arrays[f"{split}-images"]
        if isinstance(pictures, Files):
            failed = {failure.name for failure in failures}
            names = tuple(picture.name for picture in pictures if picture.name not in failed)
        return Split(images, np.array(entry.arrays[f"{split}-labels"]), names)

    def refuse_bad_pictures(self, failures: list[Failure]) -> None:
        """Raises a DataError for bad pictures unless skip_bad, and always if half of all pictures miss their box."""
        total, directory = sum(self.folder.counts.values()), self.folder.directory
        outside = [failure for failure in failures if failure.kind == "box"]
        if 2 * len(outside) >= total:
            raise DataError(
                f"{len(outside):,} of {total:,} pictures in {directory} do not contain their box: "
                f"{listed(outside, 3)}. Boxes refer to the original photographs. If these are cropped or resized, sort "
                "them by class and move the devkit's .mat files out of the folder"
            )
        if failures and not self.skip_bad:
            raise DataError(
                f"{len(failures):,} of {total:,} pictures in {directory} cannot be used: {listed(failures)}. Replace "
                "them, or leave them out with --skip-bad"
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
