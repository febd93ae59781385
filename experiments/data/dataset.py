"""What every data source of the experiments hands over: two splits of decoded pictures and their classes' names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


class DataError(ValueError):
    """Something is wrong with the data that a person gave; the message says what, where and what to do."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Pictures of one kind and size with their labels.

    images: (N, H, W, C) uint8, C = 1 (grey) or 3 (RGB); an array or a read-only memory map.
    labels: (N,) int32, class numbers from 0.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set ready for training.

    title: what it is called in every line, plot and report ("Stanford Cars", "drawn cars").
    class_names: class_names[label] is the name of a class.
    source: where it came from, as plain JSON values; goes into a run's config.json.
    """

    title: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    source: dict[str, Any]


def balanced_subset(split: Split, count: int, seed: int) -> Split:
    """Draws `count` examples of a split, as equally many of each class as the split allows.

    A class with fewer examples than its share gives all of them and the others share the rest. Which examples of a
    class, and which classes give one more when the shares do not come out even, is random.

    Args:
      split: N examples; classes that have none are left out of the sharing.
      count: from 1 to N.
      seed: the same seed draws the same examples.

    Returns:
      A split in memory, in the order of the original.

    Raises:
      ValueError: count is not from 1 to N.
    """
    if not 1 <= count <= len(split):
        raise ValueError(f"cannot draw {count:,} examples of {len(split):,}: ask for 1 to {len(split):,}")
    generator = np.random.default_rng(seed)
    labels = np.asarray(split.labels)
    classes, available = np.unique(labels, return_counts=True)
    shares = np.zeros_like(available)
    while missing := count - shares.sum():
        open_classes = np.flatnonzero(shares < available)
        each = missing // len(open_classes)
        if each:
            shares[open_classes] = np.minimum(shares[open_classes] + each, available[open_classes])
        else:
            shares[generator.choice(open_classes, missing, replace=False)] += 1
    chosen = [
        generator.choice(np.flatnonzero(labels == label), share, replace=False)
        for label, share in zip(classes, shares, strict=True)
    ]
    indices = np.sort(np.concatenate(chosen))
    return Split(np.asarray(split.images[indices]), labels[indices])


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every channel, pixels scaled to [0, 1].

    Counts how often each of the 256 values occurs and computes with whole numbers from there, so that neither the
    number of pictures nor the size of a chunk costs a digit.

    Args:
      images: (N, H, W, C) uint8, N >= 1; a memory map is read a few megabytes at a time.

    Returns:
      mean (C,) and standard deviation (C,) over all N·H·W pixels, float64.

    Raises:
      ValueError: images are not (N, H, W, C) uint8 or there are none.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or not images.size:
        raise ValueError(f"images must be (N, H, W, C) uint8 with N >= 1, got {images.shape} {images.dtype}")
    channels = images.shape[-1]
    histogram = np.zeros((channels, 256), np.int64)
    chunk = max(1, 2**22 // math.prod(images.shape[1:]))
    for start in range(0, len(images), chunk):
        pixels = np.asarray(images[start : start + chunk]).reshape(-1, channels)
        for channel in range(channels):
            histogram[channel] += np.bincount(pixels[:, channel], minlength=256)
    mean, deviation = np.empty(channels), np.empty(channels)
    for channel, occurrences in enumerate(histogram.tolist()):
        # Python's whole numbers: the sums below pass 2^63 from about 10^9 pixels on.
        pixels = sum(occurrences)
        first = sum(value * times for value, times in enumerate(occurrences))
        second = sum(value * value * times for value, times in enumerate(occurrences))
        mean[channel] = first / pixels / 255
        deviation[channel] = math.sqrt((pixels * second - first * first) / (pixels * pixels)) / 255
    return mean, deviation
