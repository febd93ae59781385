"""Being told to stop: Ctrl-C, SIGTERM, the notice that a cluster gives all processes of a training, and a child's."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from tqdm import tqdm


class Stopped(Exception):
    """The run was told to stop; `signal` is what told it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class StopRequest(contextlib.AbstractContextManager):
    """Turns Ctrl-C and SIGTERM into `Stopped` at `check`, until left; the same signal once more acts at once.

    Python would raise anywhere, also between a step's end and the assignment of its result. By then the step has
    consumed the old state, and nothing would be left to save.

    With several processes a signal to one of them stops all, each before the same step: jax.distributed hears SIGTERM
    by itself, and Ctrl-C is handed to it.
    """

    def __init__(self):
        self.requested: int | None = None
        self.together = jax.process_count() > 1
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in (signal.SIGINT,) if self.together else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        if self.together:
            os.kill(os.getpid(), signal.SIGTERM)
        self.requested = number
        again = "Ctrl-C again" if number == signal.SIGINT else "another SIGTERM"
        tqdm.write(f"stopping after this step; {again} stops at once", file=sys.stderr)
        self._restore()

    def check(self, step: int | None = None) -> None:
        """Raises Stopped if it was asked for.

        Args:
          step: the steps done; with several processes needed, and the same in all of them.
        """
        if self.together:
            from jax.experimental import multihost_utils

            if step is not None and multihost_utils.reached_preemption_sync_point(step):
                raise Stopped(self.requested or signal.SIGTERM)
        elif self.requested is not None:
            raise Stopped(self.requested)

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


@contextlib.contextmanager
def leaving_stops_to_a_child(terminate: Callable[[], None]) -> Iterator[list[int]]:
    """Lets a child process end by itself, with a report, when this process is told to stop, and waits for it.

    A terminal's Ctrl-C reaches the child too; SIGTERM reaches this process alone, and is handed on.

    Args:
      terminate: sends SIGTERM to the child.

    Yields:
      the signals that have come.
    """
    came: list[int] = []

    def take(number: int, frame: Any) -> None:
        came.append(number)
        if number == signal.SIGTERM:
            terminate()

    previous = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
