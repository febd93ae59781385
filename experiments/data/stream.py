"""The batches of a training or a test, made ahead by threads or by processes, and always the same ones.

Batch i of a training is a function of the split, the batch size, the seed and i alone. So nothing that differs from run
to run (threads, processes, which of them is faster, where the run was interrupted) can change what is trained on, and a
run that is resumed at a step simply starts at that number. grain makes the batches ahead; its processes are spawned,
never forked: a fork of a process in which JAX has started threads can hang.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import mmap
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from experiments.data.dataset import Split, epoch_order

Batch = tuple[np.ndarray, np.ndarray]
OnDevice = TypeVar("OnDevice")


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
        workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        """
        Args:
          split: the pictures. Every worker has its own copy of arrays; memory maps and lazy pictures it opens anew.
          batch_size: of all parts together.
          seed, epochs: which order, and how often through the pictures.
          start_step: the number of the first batch, counted from the beginning of the training.
          part: (process_index, process_count): this process gets its own rows of every batch, the first process the
            first n = batch_size / process_count of them, and so on.
          workers: processes that read and decode, each making every workers-th batch; 0 for threads of this process.
          prefetch: how many batches are made ahead; in threads, of which there are as many as that, up to the number
            of processors. 0 makes each when it is asked for (without workers).

        Raises:
          ValueError: one of the numbers is out of range.
        """
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        source = TrainingSource(split, batch_size, part, seed, epochs)
        if not 0 <= start_step <= len(source):
            raise ValueError(f"start_step must be 0 to {len(source)}, the steps of the training, got {start_step}")
        self._start(source, start_step, workers, prefetch)

    def _start(self, source: Source, start: int, workers: int, prefetch: int) -> None:
        if min(workers, prefetch) < 0:
            raise ValueError(f"workers and prefetch must not be negative, got {workers} and {prefetch}")
        workers = min(workers, len(source) - start)
        batches = grain.MapDataset.source(source).slice(slice(start, None))
        threads = 0 if workers else min(prefetch, os.cpu_count() or 1)  # a worker needs no threads of its own
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
        stream = batches.to_iter_dataset(ahead)
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # all at their defaults; grain 0.2.18 reads one without asking (its #1355)
            each = grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(1, math.ceil(prefetch / workers)))
            stream = stream.mp_prefetch(each, worker_init_fn=end_with_parent)
        iterator = iter(stream)
        self._open = [iterator]
        self._close = weakref.finalize(self, close_all, self._open)
        if workers:
            resource_tracker.ensure_running()  # first started by a worker's thread, it would let the signals through
            with signals_for_parent_only():
                # All workers start now and are known to grain's close(), which would miss those that it starts by and
                # by as they are asked for.
                iterator.get_state()
                iterator.start_prefetch()

    def __next__(self) -> Batch:
        """
        Raises:
          DataError: a picture can no longer be read.
          ChildProcessError: a worker was killed.
          ValueError: closed.
        """
        if not self._open:
            raise ValueError("these batches are closed")
        try:
            images, labels = next(self._open[0])
        except RuntimeError as error:
            raise ChildProcessError(
                f"a worker that reads pictures failed ({error}): is the memory full, or /dev/shm?"
            ) from error
        # A worker's come in shared memory: each that is kept, such as an epoch's labels, would keep a file open.
        return tuple(np.array(array) if isinstance(array, SharedMemoryArray) else array for array in (images, labels))

    def close(self) -> None:
        """Ends the workers and waits for them; threads end after the batch that they are at."""
        self._close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class EvaluationBatches(Batches):
    """The batches of a test: all pictures in their order, the last batch filled up with the first picture, so that all
    have one shape."""

    def __init__(
        self, split: Split, batch_size: int, *, part: tuple[int, int] = (0, 1), workers: int = 0, prefetch: int = 2
    ) -> None:
        """Args and errors: see Batches."""
        self._start(EvaluationSource(split, batch_size, part), 0, workers, prefetch)


@dataclasses.dataclass(frozen=True)
class Source:
    """Batches by their number: what grain reads from, in this process or in its workers."""

    split: Split
    batch_size: int
    part: tuple[int, int]

    def __post_init__(self):
        index, count = self.part
        if not 0 <= index < count:
            raise ValueError(f"part must be (process_index, process_count), got {self.part}")
        if self.batch_size < 1 or self.batch_size % count:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of the number of processes, {count}")

    def __getitem__(self, number: int) -> Batch:
        index, count = self.part
        rows = self.batch_size // count
        chosen = self.examples(number)[index * rows : (index + 1) * rows]
        return self.split.images[chosen], self.split.labels[chosen]

    def examples(self, number: int) -> np.ndarray:
        """Which examples of the split make up the batch of a number: (batch_size,)."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"split": Split(pickled_by_name(self.split.images), self.split.labels)}


@dataclasses.dataclass(frozen=True)
class TrainingSource(Source):
    """The batches of a training."""

    seed: int
    epochs: int

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size > len(self.split):
            raise ValueError(f"batch_size {self.batch_size} exceeds the {len(self.split)} pictures")

    def __len__(self) -> int:
        return self.epochs * (len(self.split) // self.batch_size)

    def examples(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, len(self.split) // self.batch_size)
        return order_of(len(self.split), self.seed, epoch)[place * self.batch_size : (place + 1) * self.batch_size]


@dataclasses.dataclass(frozen=True)
class EvaluationSource(Source):
    """The batches of a test."""

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.batch_size)

    def examples(self, number: int) -> np.ndarray:
        chosen = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        chosen[chosen >= len(self.split)] = 0
        return chosen


# Two: at the end of an epoch the next one is begun ahead.
order_of = functools.lru_cache(maxsize=2)(epoch_order)


def pickled_by_name(images: Any) -> Any:
    """Pictures as they may be sent to another process: a memory map, which pickle would send whole, as its file's name.

    A part of a map is sent as an array.
    """
    whole = isinstance(images, np.memmap) and isinstance(images.base, mmap.mmap) and images.flags.c_contiguous
    return MappedPictures(images) if whole else images


class MappedPictures:
    """A whole memory map, opened anew where it is unpickled."""

    def __init__(self, images: np.memmap) -> None:
        self.images = images

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self.images[index]

    def __reduce__(self) -> tuple[Any, ...]:
        images = self.images
        return MappedPictures.open, (images.filename, images.dtype, images.offset, images.shape)

    @staticmethod
    def open(path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> MappedPictures:
        return MappedPictures(np.memmap(path, dtype, "r", offset, shape))


def close_all(iterators: list[grain.DatasetIterator[Batch]]) -> None:
    """Closes and forgets iterators. At exit, too: grain's would close themselves when their modules are gone."""
    while iterators:
        iterators.pop().close()


def end_with_parent(worker: int, workers: int) -> None:
    """In a worker: ends it when its parent is gone. grain's would wait for ever for one that was killed."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="end-with-parent").start()


@contextlib.contextmanager
def signals_for_parent_only() -> Iterator[None]:
    """Threads and processes that are started in here get no SIGINT and no SIGTERM.

    Ctrl-C, and many a batch system's SIGTERM, go to the whole process group. The parent finishes its step and writes a
    checkpoint, for which its workers must still be there; then it ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def put_ahead(
    batches: Iterable[Batch], put: Callable[[np.ndarray, np.ndarray], OnDevice], ahead: int = 2
) -> Iterator[OnDevice]:
    """Puts batches onto the device before they are needed.

    JAX copies while the program goes on, so a batch that is put while the step before it is computed costs no time. No
    thread is needed for that: grain's device_put takes two, and knows no arrays that are spread over processes.

    Args:
      batches: images and labels.
      put: (images, labels) -> what the step takes, such as arrays on the devices.
      ahead: how many batches wait on the device.

    Yields:
      what `put` returned, in order.
    """
    waiting: collections.deque[OnDevice] = collections.deque()
    for images, labels in batches:
        waiting.append(put(images, labels))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
