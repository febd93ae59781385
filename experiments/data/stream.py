"""The batches of a training or a test, made ahead by threads, and always the same ones.

Batch i of a training is a function of the split, the batch size, the seed and i alone. So nothing that differs from run
to run (threads, processes, where the run was interrupted) can change what is trained on, and a run that is resumed at a
step simply starts at that number. Threads are enough: they decode JPEG files without holding Python's lock.
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

# Two: at the end of an epoch the next one is begun ahead.
order_of = functools.lru_cache(maxsize=2)(epoch_order)


class Batches(Iterator[Batch]):
    """The batches of a training, one after the other: images (n, H, W, C) uint8 and labels (n,) int32.

    Epoch after epoch in the order of `epoch_order`, each without its last, partial batch: BatchNorm and jit would see
    another shape. To be closed at the end, best as a context manager: `with Batches(…) as batches`.
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
          batch_size: of all parts together.
          seed, epochs: which order, and how often through the pictures.
          start_step: the number of the first batch, counted from the beginning of the training.
          part: (process_index, process_count): this process gets its own rows of every batch, the first process the
            first n = batch_size / process_count of them, and so on.
          prefetch: how many batches are made ahead, each by a thread [default: one for each core, at least two]; 0
            makes each when it is asked for.

        Raises:
          ValueError: one of the numbers is out of range.
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
        """Begins with the batches of these numbers; chosen: a number -> which examples make up the whole batch."""
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
        """Raises a DataError for a picture that can no longer be read."""
        return next(self._iterator)

    def close(self) -> None:
        """Threads end after the batch that they are at."""
        self._iterator.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class EvaluationBatches(Batches):
    """The batches of a test: all pictures in their order, the last batch filled up with the first picture, so that all
    have one shape."""

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
    """Yields what `put` makes of images and labels, such as arrays on the devices; `ahead` of them wait there.

    JAX copies while the program goes on, so a batch that is put while the step before it is computed costs no time. No
    thread is needed for that: grain's device_put takes two, and knows no arrays that are spread over processes.
    """
    waiting: collections.deque[OnDevice] = collections.deque()
    for images, labels in batches:
        waiting.append(put(images, labels))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
