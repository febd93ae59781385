"""Gives each worker its own cores: their number decides the order of sums, and so the last digits."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from experiments.training.run_folder import lock


@contextlib.contextmanager
def own_cores(number: int | None) -> Iterator[list[TextIO]]:
    """Binds this process, and what it starts, to `number` cores that no other worker on this machine has.

    Args:
      number: of cores; None for all of them, shared with others.

    Yields:
      the locks of the cores; a child that inherits them keeps the cores when this process is killed.
    """
    if number is None or not hasattr(os, "sched_setaffinity"):  # a system that cannot bind, such as macOS
        yield []
        return
    allowed = os.sched_getaffinity(0)
    # One folder for all workers of this user on this machine, whatever their study.
    folder = Path(tempfile.gettempdir()) / f"resnet-adabound-cores-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as held:
        taken: dict[int, TextIO] = {}
        for core in sorted(allowed):
            if len(taken) < number:
                with contextlib.suppress(ValueError):
                    taken[core] = held.enter_context(lock(folder / f"{core}.lock"))
        if len(taken) < number:
            free = "none is" if not taken else f"only {len(taken)} are"
            raise ValueError(
                f"the protocol gives each worker {number} of this machine's {len(allowed)} cores, and {free} free: "
                "other workers of experiments.study hold the rest"
            )
        os.sched_setaffinity(0, taken)
        try:
            yield list(taken.values())
        finally:
            os.sched_setaffinity(0, allowed)
