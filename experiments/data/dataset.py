"""The form of every data set of the experiments: two splits of decoded pictures, and the names of their classes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

SPLITS = ("train", "test")


class DataError(ValueError):
    """The user's data are wrong; the message says what is wrong, where, and what to do."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Pictures of one size, all grey or all RGB, with their labels.

    images: (N, H, W, C) uint8, C = 1 (grey) or 3 (RGB); an array or a read-only memory map.
    labels: (N,) int32, class numbers from 0.
    names: the pictures' names for messages, such as their files; None if the pictures have only numbers.
    """

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Split:
        """Selects these examples, as copies in memory."""
        names = None if self.names is None else tuple(self.names[index] for index in indices)
        return Split(self.images[indices], self.labels[indices], names)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set ready for training.

    title: the data set's name in messages, plots and reports ("Stanford Cars", "drawn cars").
    class_names: class_names[label] is the name of a class.
    source: where the data came from, as JSON values; stored in a run's config.json.
    """

    title: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    source: dict[str, Any]


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order (count,) in which an epoch takes `count` training examples; it depends only on the arguments."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def balanced_subset(split: Split, count: int, seed: int) -> Split:
    """Samples `count` examples, as equally from each class as the split allows; they stay in the split's order.

    A class with fewer examples than its share gives all of them, and the others share the rest. If the shares are not
    even, some classes give one more. The seed determines these classes and the examples.

    Raises:
      ValueError: count is not from 1 to the number of examples.
    """
    if not 1 <= count <= len(split):
        raise ValueError(f"cannot take {count:,} of {len(split):,} examples: ask for 1 to {len(split):,}")
    generator = np.random.default_rng(seed)
    available = np.bincount(split.labels)
    shares = np.zeros_like(available)
    while missing := count - shares.sum():
        open_classes = np.flatnonzero(shares < available)
        each = missing // len(open_classes)
        if each:
            shares[open_classes] = np.minimum(shares[open_classes] + each, available[open_classes])
        else:
            shares[generator.choice(open_classes, missing, replace=False)] += 1
    return split.take(_draw(split.labels, shares, generator))


def _draw(labels: np.ndarray, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The sorted indices of shares[label] randomly chosen examples of each class that occurs."""
    classes = np.unique(labels)
    chosen = [generator.choice(np.flatnonzero(labels == label), shares[label], replace=False) for label in classes]
    return np.sort(np.concatenate(chosen))


# These functions draw random parts of a data set, the same at every call. The new title describes the part.


def draw_classes(dataset: Dataset, count: int) -> Dataset:
    """Keeps `count` of the classes, in their order; raises a ValueError if there are fewer."""
    there = len(dataset.class_names)
    if not 1 <= count <= there:
        raise ValueError(f"cannot take {count:,} of {there:,} classes")
    chosen = np.sort(np.random.default_rng(0).choice(there, count, replace=False))
    number = np.full(there, -1, np.int32)
    number[chosen] = np.arange(count, dtype=np.int32)

    def part(split: Split) -> Split:
        taken = split.take(np.flatnonzero(number[split.labels] >= 0))
        return dataclasses.replace(taken, labels=number[taken.labels])

    names, title = tuple(dataset.class_names[label] for label in chosen), f"{count} classes of {dataset.title}"
    return Dataset(title, names, part(dataset.train), part(dataset.test), dataset.source)


def hold_out(dataset: Dataset, share: float) -> Dataset:
    """Splits the training pictures into new train and test splits; the old test pictures are dropped.

    Args:
      dataset: the data set to split.
      share: the part of each class to test on, from 0 to 1; rounded to whole pictures, at least one.

    Raises:
      ValueError: a class has too few pictures to be in both parts.
    """
    counts = np.bincount(dataset.train.labels)
    shares = np.array([max(1, round(share * count)) for count in counts])
    if len(small := np.flatnonzero((counts > 0) & (shares >= counts))):
        name, count = dataset.class_names[small[0]], counts[small[0]]
        raise ValueError(f"cannot hold out {share:.0%} of {name}: it has {count} training pictures")
    held = _draw(dataset.train.labels, shares, np.random.default_rng(0))
    left, title = np.setdiff1d(np.arange(len(dataset.train)), held), f"{len(held):,} of the training pictures held out"
    train, test = dataset.train.take(left), dataset.train.take(held)
    return dataclasses.replace(dataset, title=f"{dataset.title}, {title}", train=train, test=test)


def limit_test(dataset: Dataset, count: int) -> Dataset:
    """Keeps `count` test pictures, balanced by class; raises a ValueError if there are fewer."""
    test = balanced_subset(dataset.test, count, seed=0)
    return dataclasses.replace(dataset, title=f"{dataset.title}, {count:,} test pictures", test=test)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, (C,) float64, over all N·H·W pixels, scaled to [0, 1].

    Sums are exact integers, so the precision does not depend on the number of pictures.

    Args:
      images: (N, H, W, C) uint8, N >= 1; read a few megabytes at a time.
    """
    chunk, parts = max(1, 2**22 // math.prod(images.shape[1:])), []
    for start in range(0, len(images), chunk):
        pixels = images[start : start + chunk].reshape(-1, images.shape[-1]).astype(np.int64)
        parts.append([pixels.sum(0), (pixels * pixels).sum(0)])
    sums, squares = np.sum(parts, 0, dtype=object)  # Python's integers do not overflow
    count = math.prod(images.shape[:3])
    deviation = [math.sqrt((count * b - a * a) / (count * count)) / 255 for a, b in zip(sums, squares, strict=True)]
    return np.array([a / count / 255 for a in sums]), np.array(deviation)
