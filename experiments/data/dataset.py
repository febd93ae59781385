"""What every data source of the experiments hands over: two splits of decoded pictures and their classes' names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import numpy as np

SPLITS = ("train", "test")


class DataError(ValueError):
    """Something is wrong with the data that a person gave; the message says what, where and what to do."""


class Pictures(Protocol):
    """Stands for an array (N, H, W, C) uint8: its pictures are decoded when they are asked for."""

    shape: tuple[int, int, int, int]
    dtype: np.dtype

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        """One picture, those of a slice, or those of an array of numbers or of booleans."""

    def take(self, indices: np.ndarray) -> Pictures:
        """These pictures of the N, still to be decoded."""

    def channel_sums(self) -> np.ndarray:
        """(2, C) Python's whole numbers: of every channel the sum of all N·H·W pixels and the sum of their squares."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Pictures of one kind and size with their labels.

    images: (N, H, W, C) uint8, C = 1 (grey) or 3 (RGB); an array, a read-only memory map, or pictures that are decoded
      when they are asked for.
    labels: (N,) int32, class numbers from 0.
    names: what messages call the pictures, such as their files; None where nothing better than a number is at hand.
    """

    images: np.ndarray | Pictures
    labels: np.ndarray
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Split:
        """These examples: in memory, or pictures still to be decoded if these are."""
        images = self.images[indices] if isinstance(self.images, np.ndarray) else self.images.take(indices)
        names = None if self.names is None else tuple(self.names[index] for index in indices)
        return Split(images, self.labels[indices], names)


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


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order (count,) in which an epoch takes `count` training examples; it depends on the arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def balanced_subset(split: Split, count: int, seed: int) -> Split:
    """Draws `count` examples of a split, as equally many of each class as the split allows; they stay in its order.

    A class with fewer examples than its share gives all of them and the others share the rest. Which examples of a
    class, and which classes give one more when the shares do not come out even, is random, and follows from the seed.

    Raises:
      ValueError: count is not from 1 to the number of examples.
    """
    if not 1 <= count <= len(split):
        raise ValueError(f"cannot draw {count:,} examples of {len(split):,}: ask for 1 to {len(split):,}")
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
    """The sorted numbers of shares[label] examples of each class that occurs, drawn at random."""
    classes = np.unique(labels)
    chosen = [generator.choice(np.flatnonzero(labels == label), shares[label], replace=False) for label in classes]
    return np.sort(np.concatenate(chosen))


# Parts of a data set: drawn at random, but always the same ones. The title names them.


def draw_classes(dataset: Dataset, count: int) -> Dataset:
    """Some of the classes, in their order; a ValueError if there are fewer."""
    there = len(dataset.class_names)
    if not 1 <= count <= there:
        raise ValueError(f"cannot draw {count:,} of {there:,} classes")
    chosen = np.sort(np.random.default_rng(0).choice(there, count, replace=False))
    number = np.full(there, -1, np.int32)
    number[chosen] = np.arange(count, dtype=np.int32)

    def part(split: Split) -> Split:
        taken = split.take(np.flatnonzero(number[split.labels] >= 0))
        return dataclasses.replace(taken, labels=number[taken.labels])

    names, title = tuple(dataset.class_names[label] for label in chosen), f"{count} classes of {dataset.title}"
    return Dataset(title, names, part(dataset.train), part(dataset.test), dataset.source)


def hold_out(dataset: Dataset, share: float) -> Dataset:
    """A part of the training pictures to test on, the others to train on; its own test pictures are not in the result.

    Args:
      dataset: the pictures.
      share: of each class's pictures, rounded, but at least one.

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
    """`count` of the test pictures, balanced by class; a ValueError if there are fewer."""
    test = balanced_subset(dataset.test, count, seed=0)
    return dataclasses.replace(dataset, title=f"{dataset.title}, {count:,} test pictures", test=test)


def channel_statistics(images: np.ndarray | Pictures) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, (C,) float64, over all N·H·W pixels, scaled to [0, 1].

    Computes with whole numbers up to the last division, so that neither the number of pictures nor the size of a chunk
    costs a digit.

    Args:
      images: (N, H, W, C) uint8, N >= 1; a memory map is read a few megabytes at a time, lazy pictures not at all.
    """
    sums, squares = array_sums(images) if isinstance(images, np.ndarray) else images.channel_sums()
    pixels = math.prod(images.shape[:3])
    deviation = [math.sqrt((pixels * b - a * a) / (pixels * pixels)) / 255 for a, b in zip(sums, squares, strict=True)]
    return np.array([a / pixels / 255 for a in sums]), np.array(deviation)


def array_sums(images: np.ndarray) -> np.ndarray:
    """As `Pictures.channel_sums`, of (N, H, W, C) uint8 read a few megabytes at a time."""
    chunk = max(1, 2**22 // math.prod(images.shape[1:]))
    parts = [pixel_sums(images[start : start + chunk]) for start in range(0, len(images), chunk)]
    return np.sum(parts, 0, dtype=object)  # Python's whole numbers, which have no end


def pixel_sums(images: np.ndarray) -> np.ndarray:
    """Of every channel of pictures (…, C) uint8 the sum and the sum of squares: (2, C) int64."""
    pixels = np.asarray(images).reshape(-1, images.shape[-1]).astype(np.int64)
    return np.stack([pixels.sum(0), (pixels * pixels).sum(0)])
