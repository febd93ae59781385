"""Finds faults in the labels and pictures of a data set before hours are spent on training."""

from __future__ import annotations

import collections
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from experiments.data.dataset import SPLITS, Dataset
from experiments.data.layouts.names import counted, first_few, listing

CHUNK_BYTES = 2**24
SEVERITIES = ("error", "warning", "fact")
SHOWN = 3  # the largest number of pictures that a finding names


class Finding(NamedTuple):
    """A line about a data set.

    severity: "error" (training makes no sense), "warning" (results may mislead) or "fact" (good to know).
    text: what was found and where; for errors and warnings also what to do.
    """

    severity: Literal["error", "warning", "fact"]
    text: str


class Scan(NamedTuple):
    """Facts about the pixels of each picture of a split.

    digests: (N,) uint64, equal for pictures with equal pixels. The probability that two different pictures among
      100,000 have the same digest is one in four billion.
    plain: (N,) bool, whether all pixels of a picture have the same colour.
    """

    digests: np.ndarray
    plain: np.ndarray


def check_dataset(dataset: Dataset) -> list[Finding]:
    """Reads every label and every pixel of a data set once, a few megabytes at a time.

    Pictures with equal decoded pixels are equal; other crops or encodings of one photograph are not found.

    Returns:
      the findings: errors, then warnings, then facts.
    """
    found = list(label_findings(dataset))
    if not any(finding.severity == "error" for finding in found):
        scans = {split: scan(getattr(dataset, split).images) for split in SPLITS}
        found += plain_findings(dataset, scans)
        found += copy_findings(dataset, scans)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def format_findings(findings: Iterable[Finding]) -> str:
    """A line for each finding; errors and warnings begin with that word."""
    return "\n".join(text if severity == "fact" else f"{severity}: {text}" for severity, text in findings)


def label_findings(dataset: Dataset) -> Iterator[Finding]:
    """Finds labels out of range and classes without pictures, and counts pictures by split and class."""
    names = dataset.class_names
    counts = {}
    for split in SPLITS:
        labels = np.asarray(getattr(dataset, split).labels)
        outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if not len(labels):
            yield Finding("error", f"there are no {split} pictures: add some")
        elif len(outside):
            many = counted(len(outside), f"{split} picture has a label", f"{split} pictures have labels")
            first = f"the first is number {outside[0]:,}, with {labels[outside[0]]}"
            yield Finding("error", f"{many} other than 0 to {len(names) - 1}: {first}")
        else:
            counts[split] = np.bincount(labels, minlength=len(names))
            yield Finding("fact", describe_counts(split, counts[split], names))
    if len(counts) < len(SPLITS):
        return
    for split in SPLITS:
        if absent := np.flatnonzero(counts[split] == 0).tolist():
            words = (f"{many} no {split} pictures" for many in ("class has", "classes have"))
            yield Finding("warning", listing((names[label] for label in absent), *words))
    if untrained := counts["test"][counts["train"] == 0].sum():
        many = counted(untrained, "test picture is", "test pictures are")
        yield Finding("warning", f"{many} of classes without train pictures: add train pictures, or remove these")
    if np.count_nonzero(counts["train"]) == 1:
        yield Finding("warning", "all train pictures are of one class: there is nothing to tell apart")


def describe_counts(split: str, counts: np.ndarray, names: tuple[str, ...]) -> str:
    present = np.flatnonzero(counts)
    fewest, most = present[counts[present].argmin()], counts.argmax()
    spread = f"{counts[fewest]:,} each"
    if counts[fewest] != counts[most]:
        spread = f"from {counts[fewest]:,} ({names[fewest]}) to {counts[most]:,} ({names[most]})"
    return f"{counts.sum():,} {split} pictures of {len(present):,} classes, {spread}"


def scan(images: np.ndarray) -> Scan:
    """Reads every pixel once, a few megabytes at a time."""
    digests, plain = np.empty(len(images), np.uint64), np.empty(len(images), bool)
    chunk = max(1, CHUNK_BYTES // math.prod(images.shape[1:]))
    for start in range(0, len(images), chunk):
        pictures = np.ascontiguousarray(images[start : start + chunk])
        for number, picture in enumerate(pictures, start):
            digests[number] = int.from_bytes(hashlib.blake2b(picture, digest_size=8).digest())
        pixels = pictures.reshape(len(pictures), -1, pictures.shape[-1])
        plain[start : start + chunk] = (pixels == pixels[:, :1]).all((1, 2))
    return Scan(digests, plain)


def plain_findings(dataset: Dataset, scans: dict[str, Scan]) -> Iterator[Finding]:
    """Finds pictures that show nothing."""
    for split in SPLITS:
        if places := np.flatnonzero(scans[split].plain).tolist():
            words = (f"{split} {many} of one colour throughout" for many in ("picture is", "pictures are"))
            listed = listing((name_of(dataset, split, place) for place in places), *words, limit=SHOWN)
            yield Finding("warning", f"{listed}; replace {'it' if len(places) == 1 else 'them'}")


def copy_findings(dataset: Dataset, scans: dict[str, Scan]) -> Iterator[Finding]:
    """Finds pictures that occur more than once, and says whether their classes agree."""
    found = find_copies(dataset, scans)
    for split, of, same_class in sorted(found, key=lambda kind: (kind[0] == kind[1], kind)):  # across splits first
        pairs = found[split, of, same_class]
        total = len(getattr(dataset, split))
        listed = first_few((f"{name_of(dataset, *a)} = {name_of(dataset, *b)}" for a, b in pairs), SHOWN)
        if not same_class:
            what, advice = f"equal {of} pictures of another class", "one of the labels is wrong: correct or remove both"
        elif split == of:
            what, advice = f"repeat another {of} picture", "each counts twice: remove one of them"
        else:
            what, advice = f"are {of} pictures, too", "the result would be too good: remove one of them"
        yield Finding("warning", f"{len(pairs):,} of {total:,} {split} pictures {what}: {listed}; {advice}")


def find_copies(
    dataset: Dataset, scans: dict[str, Scan]
) -> dict[tuple[str, str, bool], list[tuple[tuple[str, int], tuple[str, int]]]]:
    """Finds all pictures that equal an earlier one (train comes before test); single-colour pictures are skipped.

    Returns:
      {(split, split of the earlier picture, whether the classes agree): pairs of (split, place)}. If a picture equals
      earlier ones of its own class and of another class, only the pair with different classes is returned.
    """
    values, counts = np.unique(np.concatenate([scans[split].digests for split in SPLITS]), return_counts=True)
    groups = collections.defaultdict(list)
    for split in SPLITS:
        repeated = np.isin(scans[split].digests, values[counts > 1]) & ~scans[split].plain
        for place in np.flatnonzero(repeated).tolist():
            groups[scans[split].digests[place]].append((split, place))
    found = collections.defaultdict(list)
    for group in groups.values():
        first_of_class: dict[str, dict[int, tuple[str, int]]] = {split: {} for split in SPLITS}
        for picture in group:
            split, place = picture
            label = int(getattr(dataset, split).labels[place])
            for of, first in first_of_class.items():
                if first:
                    other = next((earlier for known, earlier in first.items() if known != label), None)
                    found[split, of, other is None].append((picture, other or first[label]))
            first_of_class[split].setdefault(label, picture)
    return found


def name_of(dataset: Dataset, split: str, place: int) -> str:
    """A picture's name for messages: its file name if the reader has kept it, otherwise its number and class."""
    names = getattr(dataset, split).names
    if names is not None:
        return names[place]
    return f"{split} picture {place:,} ({dataset.class_names[getattr(dataset, split).labels[place]]})"
