"""Shares a batch among threads. Each thread runs the whole network on its images and exchanges values in BatchNorm.

NumPy itself uses several cores only for matrix products, and each core then fetches data from the other cores' caches.
Here each thread keeps its own images from layer to layer, so their data stay in one core's cache. Threads run in
parallel because NumPy functions release the GIL.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from threadpoolctl import ThreadpoolController

Gather = Callable[[Any], list[Any]]


def alone(value: Any) -> list[Any]:
    """The gather function of a batch that is not shared."""
    return [value]


class Team:
    """Threads that run at the same time and exchange values.

    gathers: one function gather(value) per thread. It waits until all threads have called theirs and returns the values
      of all threads, in thread order. All threads must make the same number of calls.
    """

    _one_at_a_time = threading.Lock()  # one for all teams, which share the cores and BLAS's setting for the process

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size)
        # Two lists, used in turn: a fast thread may write the next round's values while others still read this round's.
        self._values: list[list[Any]] = [[None] * size, [None] * size]
        self._rounds = [0] * size
        self.gathers: list[Gather] = [self._make_gather(number) for number in range(size)]

    def _make_gather(self, number: int) -> Gather:
        def gather(value: Any) -> list[Any]:
            values = self._values[self._rounds[number] % 2]
            self._rounds[number] += 1
            values[number] = value
            self._barrier.wait()
            return list(values)

        return gather

    def run(self, functions: list[Callable[[], Any]]) -> list[Any]:
        """Runs one function per thread, each with BLAS on one core. Returns their results or raises their error."""

        def guarded(function: Callable[[], Any]) -> Any:
            try:
                return function()
            except BaseException:
                self._barrier.abort()  # otherwise the other threads would wait forever
                raise

        with self._one_at_a_time, _blas().limit(limits=1, user_api="blas"):
            self._barrier.reset()  # an earlier run may have failed
            self._rounds = [0] * len(self.gathers)
            # Each function runs in a copy of the caller's context, which includes the settings of np.errstate.
            contexts = [contextvars.copy_context() for _ in functions]
            futures = [
                _pool(len(functions)).submit(context.run, guarded, function)
                for context, function in zip(contexts, functions, strict=True)
            ]
            errors = [error for future in futures if (error := future.exception())]
            # A BrokenBarrierError only says that another thread failed, so it is sorted to the end.
            for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
                raise error
            return [future.result() for future in futures]


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, "numpy_ref")  # cached, because malloc gives new threads new memory


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # cached, because it searches all loaded libraries
