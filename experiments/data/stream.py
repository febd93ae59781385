"""Batches for training and evaluation, prefetched by threads, the same ones in every run.

Batch i of a training depends only on the split, the batch size, the seed and i. So threads, processes and interruptions
cannot change what is trained on, and a resumed run simply starts at the number of its step. Threads suffice, because
Pillow releases the GIL while it decodes JPEG files.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from experiments.data.dataset import Split, epoch_order
from experiments.machine import cores

Batch = tuple[np.ndarray, np.ndarray]
OnDevice = TypeVar("OnDevice")

# Two, because at the end of an epoch batches of the next one are already made.
order_of = functools.lru_cache(maxsize=2)(epoch_order)


class Batches(Iterator[Batch]):
    """Iterates over the batches of a training: images (n, H, W, C) uint8 and labels (n,) int32.

    Each epoch follows its `epoch_order` and drops its last, partial batch, since BatchNorm and jit would see another
    shape. Close the iterator at the end, best as a context manager: `with Batches(…) as batches`.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        *,
        epochs: int,
        start_step: int = 0,
        part: tuple[int, int] = (0, 1),
        prefetch: int | None = None,
    ) -> None:
        """
        Args:
          split: the pictures.
          batch_size: examples per batch, over all processes.
          seed, epochs: seed of the random order, and number of passes through the pictures.
          start_step: the number of the first batch, counted from the beginning of the training.
          part: (process_index, process_count): process p gets rows p·n to (p + 1)·n of every batch, where n is
            batch_size / process_count.
          prefetch: number of batches made in advance, each by a thread [default: one per core, at least two]; 0 makes
            each batch on demand.

        Raises:
          ValueError: a number is out of range.
        """
        if batch_size > len(split):
            raise ValueError(f"batch_size {batch_size} exceeds the {len(split)} pictures")

        def chosen(number: int) -> np.ndarray:
            epoch, place = divmod(number, len(split) // batch_size)
            return order_of(len(split), seed, epoch)[place * batch_size : (place + 1) * batch_size]

        steps = epochs * (len(split) // max(1, batch_size))
        self._start(split, batch_size, chosen, range(start_step, steps), part, prefetch)

    def _start(
        self,
        split: Split,
        batch_size: int,
        chosen: Callable[[int], np.ndarray],
        numbers: range,
        part: tuple[int, int],
        prefetch: int | None,
    ) -> None:
        """Starts making the batches with these numbers; chosen: number -> indices of the whole batch's examples."""
        import grain

        index, count = part
        if not 0 <= index < count:
            raise ValueError(f"part must be (process_index, process_count), got {part}")
        if batch_size < 1 or batch_size % count:
            raise ValueError(f"batch_size {batch_size} must be a multiple of the number of processes, {count}")
        ahead = max(2, cores()) if prefetch is None else prefetch
        rows = slice(index * batch_size // count, (index + 1) * batch_size // count)

        def batch(number: int) -> Batch:
            examples = chosen(number)[rows]
            return split.images[examples], split.labels[examples]

        options = grain.ReadOptions(num_threads=min(ahead, cores()), prefetch_buffer_size=ahead)
        batches = grain.MapDataset.range(numbers.start, numbers.stop).map(batch)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __next__(self) -> Batch:
        """The next batch; raises a DataError if a picture can no longer be read."""
        return next(self._iterator)

    def close(self) -> None:
        """Stops the threads; each finishes its current batch first."""
        self._iterator.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class EvaluationBatches(Batches):
    """Iterates once over all pictures in order; the last batch is padded with the first picture to the full size."""

    def __init__(
        self, split: Split, batch_size: int, *, part: tuple[int, int] = (0, 1), prefetch: int | None = None
    ) -> None:
        """Args and errors: see Batches."""

        def chosen(number: int) -> np.ndarray:
            examples = np.arange(number * batch_size, (number + 1) * batch_size)
            return np.where(examples < len(split), examples, 0)

        numbers = range(-(-len(split) // max(1, batch_size)))
        self._start(split, batch_size, chosen, numbers, part, prefetch)


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
