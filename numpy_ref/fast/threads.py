"""Sharing a batch among threads: each runs the whole network on its images and meets the others in BatchNorm.

NumPy itself uses the second core for matrix products alone, and each product then fetches from the other core's cache
what was computed there. A thread that keeps its images keeps them in its cache, and NumPy lets threads run at the same
time inside its functions.
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
    """What `gather` is for a batch that is in one piece."""
    return [value]


class Team:
    """Threads that work on the same thing at the same time.

    gathers: for each thread a function gather(value) -> the values of all threads, in their order, once all have called
      it. All threads must call it equally often.
    """

    _one_at_a_time = threading.Lock()  # for all teams: they share the cores, and BLAS has one setting for the process

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size)
        # Two rounds of values: who is ahead writes the next round while others still read this one.
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
        """Runs one function in each thread, each with BLAS on one core; returns their results, raises their errors."""

        def guarded(function: Callable[[], Any]) -> Any:
            try:
                return function()
            except BaseException:
                self._barrier.abort()  # or the others would wait forever
                raise

        with self._one_at_a_time, _blas().limit(limits=1, user_api="blas"):
            self._barrier.reset()  # an earlier run may have failed
            self._rounds = [0] * len(self.gathers)
            # In the caller's context, which holds what np.errstate has set.
            contexts = [contextvars.copy_context() for _ in functions]
            futures = [
                _pool(len(functions)).submit(context.run, guarded, function)
                for context, function in zip(contexts, functions, strict=True)
            ]
            errors = [error for future in futures if (error := future.exception())]
            # The others' errors only say that one has left.
            for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
                raise error
            return [future.result() for future in futures]


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, "numpy_ref")  # kept: malloc gives new threads new memory to start from


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries, so once
