"""Batches for training and evaluation, prefetched by threads, the same ones in every run.

Batch i of a training depends only on the split, the batch size, the seed and i. So threads, processes and interruptions
cannot change what is trained on, and a resumed run simply starts at the number of its step.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from experiments.data.dataset import Split, epoch_order
from experiments.machine import cores

if TYPE_CHECKING:
    import grain

Batch = tuple[np.ndarray, np.ndarray]
OnDevice = TypeVar("OnDevice")

# Two, because at the end of an epoch batches of the next one are already made.
order_of = functools.lru_cache(maxsize=2)(epoch_order)


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    *,
    epochs: int,
    start_step: int = 0,
    part: tuple[int, int] = (0, 1),
    prefetch: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Iterates over the batches of a training: images (n, H, W, C) uint8 and labels (n,) int32.

    Each epoch follows its `epoch_order` and drops its last, partial batch, since BatchNorm and jit would see another
    shape. Close the iterator at the end, which stops its threads: `with contextlib.closing(training_batches(…)) as …`.

    Args:
      split: the pictures, at least one batch.
      batch_size: examples per batch, over all processes.
      seed, epochs: seed of the random order, and number of passes through the pictures.
      start_step: the number of the first batch, counted from the beginning of the training.
      part: (process_index, process_count): process p gets rows p·n to (p + 1)·n of every batch, where n is
        batch_size / process_count.
      prefetch: number of batches made in advance, each by a thread [default: one per core, at least two]; 0 makes each
        batch on demand.
    """
    steps = len(split) // batch_size

    def chosen(number: int) -> np.ndarray:
        epoch, place = divmod(number, steps)
        return order_of(len(split), seed, epoch)[place * batch_size : (place + 1) * batch_size]

    return _iterate(split, chosen, range(start_step, epochs * steps), part, prefetch)


def evaluation_batches(
    split: Split, batch_size: int, *, part: tuple[int, int] = (0, 1)
) -> grain.DatasetIterator[Batch]:
    """Iterates once over all pictures in order; the last batch is padded with the first picture to the full size.

    Args: see training_batches.
    """

    def chosen(number: int) -> np.ndarray:
        examples = np.arange(number * batch_size, (number + 1) * batch_size)
        return np.where(examples < len(split), examples, 0)

    return _iterate(split, chosen, range(-(-len(split) // batch_size)), part)


def _iterate(
    split: Split,
    chosen: Callable[[int], np.ndarray],
    numbers: range,
    part: tuple[int, int],
    prefetch: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Iterates over the batches with these numbers; chosen: number -> indices of the whole batch's examples."""
    import grain

    index, count = part
    ahead = max(2, cores()) if prefetch is None else prefetch

    def batch(number: int) -> Batch:
        examples = np.split(chosen(number), count)[index]
        return split.images[examples], split.labels[examples]

    options = grain.ReadOptions(num_threads=min(ahead, cores()), prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.range(numbers.start, numbers.stop).map(batch).to_iter_dataset(options))


def put_ahead(
    batches: Iterable[Batch], put: Callable[[np.ndarray, np.ndarray], OnDevice], ahead: int = 2
) -> Iterator[OnDevice]:
    """Yields put(images, labels) of each batch, such as arrays on the devices. Puts `ahead` later batches in advance.

    JAX copies asynchronously, so copying a batch during the step before it costs no time and needs no thread. grain's
    device_put uses two threads, and does not support arrays that are spread over processes.
    """
    waiting: collections.deque[OnDevice] = collections.deque()
    for images, labels in batches:
        waiting.append(put(images, labels))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
