"""Contestants in processes of their own, which take turns.

Processes of their own, since thread pools would get into one another's way, and since memory is counted by process. A
contestant measures when it is told to.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.machine import give_back_freed_memory

Step = Callable[[], Any]  # what is timed; tests look at what it returns
MakeStep = Callable[[], Step]  # to be pickled: a function of a module, or functools.partial of one

# By framework, the part of a contestant's name before the first dot: what it imports before it builds anything.
MODULES = {
    "numpy": ("numpy", "numpy_ref.fast"),
    "jax": ("jax", "jax_resnet.train"),
    "flax": ("jax", "flax.linen", "optax"),
    "keras": ("jax", "keras", "optax"),
    "torch": ("torch", "torchvision"),
}
ENVIRONMENT = {"keras": {"KERAS_BACKEND": "jax"}}
EXTRAS = {"torch": "torch", "keras": "bench"}  # of setup.cfg
PAUSE = 0.05  # seconds between turns: OpenBLAS's threads keep a core busy for some 30 ms after their last product


class Result(NamedTuple):
    """What was measured of a contestant.

    first_step: seconds, compilation included.
    seconds: (rounds, steps), of each step.
    memory_before: MB that its process held with its libraries imported, before anything was built.
    peak_memory: MB that it held at most: libraries, weights and all.
    """

    first_step: float
    seconds: np.ndarray
    memory_before: float
    peak_memory: float


class Contestant:
    """A process that has imported a contestant's libraries and waits.

    memory_before, peak_memory: as in `Result`, so far.
    """

    def __init__(self, name: str, threads: int | None = None, environment: Mapping[str, str] | None = None):
        """Starts it, on so many cores (all if None), with these variables besides the ones that are set."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name), daemon=True)
        with bound(threads, {**ENVIRONMENT.get(framework(name), {}), **(environment or {})}):
            self._process.start()
        theirs.close()
        self.name = name
        self.memory_before = self.peak_memory = self._receive()

    def build(self, make_step: MakeStep) -> float:
        """Makes the step that is to be measured and runs it once; returns the seconds of that first step.

        Raises:
          RuntimeError: if it fails, with its message; as does `measure`.
        """
        return self._ask(make_step)

    def measure(self, steps: int) -> list[float]:
        """Runs a tenth of the steps, at least one, to warm up after the others' turns; returns the seconds of each."""
        return self._ask(steps)

    def _ask(self, request: MakeStep | int):
        with contextlib.suppress(BrokenPipeError):  # it has died: receiving says so
            self._connection.send(request)
        answer, self.peak_memory = self._receive()
        return answer

    def _receive(self):
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"{self.name} ended without a word") from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer

    def close(self) -> None:
        self._connection.close()  # which ends the process by itself, unless it hangs
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()


def framework(name: str) -> str:
    """ "torch.compile" -> "torch"."""
    return name.split(".")[0]


def available(names: Sequence[str]) -> list[str]:
    """Those contestants that can run here; the others are named, with the packages that are not installed."""
    found = []
    for name in names:
        packages = {module.split(".")[0] for module in MODULES[framework(name)]}
        missing = sorted(package for package in packages if importlib.util.find_spec(package) is None)
        if missing:
            extra = EXTRAS.get(framework(name))
            how = f': pip install -e ".[{extra}]"' if extra else ""
            print(f"left out: {name}, without {' and '.join(missing)} installed{how}")
        else:
            found.append(name)
    return found


@contextlib.contextmanager
def started(
    names: Sequence[str], threads: int | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[list[Contestant]]:
    """The contestants' processes, one after the other; they end with the context."""
    contestants = []
    try:
        for name in names:
            contestants.append(Contestant(name, threads, environment))
        yield contestants
    finally:
        for contestant in contestants:
            contestant.close()


@contextlib.contextmanager
def bound(threads: int | None, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Binds this process to so many cores and sets variables, for as long as the context; what it starts inherits both.

    Cores rather than each library's own setting, since all of them count the cores that they may use; OpenMP's besides,
    where a system cannot bind a process to cores.
    """
    if threads is not None:
        environment = {"OMP_NUM_THREADS": str(threads), **(environment or {})}
    variables = dict(os.environ)
    cores = os.sched_getaffinity(0) if threads is not None and hasattr(os, "sched_setaffinity") else None
    try:
        os.environ.update(environment or {})
        if cores:
            os.sched_setaffinity(0, sorted(cores)[:threads])
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        os.environ.clear()
        os.environ.update(variables)


def compete(
    contestants: Sequence[Contestant], make_steps: dict[str, MakeStep], rounds: int, steps: int
) -> dict[str, Result]:
    """Lets the contestants take turns at their steps; those that fail at their first one are named and left out.

    Args:
      contestants: as started.
      make_steps: by contestant's name.
      rounds: the turns of each.
      steps: in a turn.

    Raises:
      ValueError: if all fail.
    """
    first = {}
    for contestant in contestants:  # one after the other: compiling needs all cores
        try:
            first[contestant] = contestant.build(make_steps[contestant.name])
        except RuntimeError as error:
            print(f"left out: {error}")
    if not first:
        raise ValueError("nobody is left to measure")
    seconds = {contestant: [] for contestant in first}
    turns = collections.deque(first)
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        turns.rotate(-1)  # nobody always follows the same one, or goes first
        for contestant in turns:
            time.sleep(PAUSE)
            seconds[contestant].append(contestant.measure(steps))
    return {c.name: Result(first[c], np.array(seconds[c]), c.memory_before, c.peak_memory) for c in first}


def _serve(connection: Connection, name: str) -> None:
    step = None

    def answer(request: MakeStep | int) -> float | list[float]:
        nonlocal step
        if callable(request):
            step = None  # the memory of the one before
            step = request()
            give_back_freed_memory()  # of drawing the weights
            return _seconds(step)
        for _ in range(max(1, request // 10)):
            step()
        return [_seconds(step) for _ in range(request)]

    try:
        _send(connection, lambda: _prepare(framework(name)))
        while True:
            request = connection.recv()
            _send(connection, lambda request=request: (answer(request), _peak_memory(framework(name))))
    except EOFError:  # the parent is gone
        pass


def _prepare(framework: str) -> float:
    for module in MODULES[framework]:
        importlib.import_module(module)
    return _memory("VmRSS")


def _send(connection: Connection, answer: Callable[[], Any]) -> None:
    """Sends an answer, or the error met on the way to it."""
    try:
        connection.send(answer())
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _peak_memory(framework: str) -> float:
    """MB: of the GPU where the framework runs on one, else of the process."""
    if framework == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 1e6
    if framework in ("jax", "flax", "keras"):
        import jax

        if jax.default_backend() != "cpu":
            return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", float("nan")) / 1e6
    return _memory("VmHWM")


def _memory(field: Literal["VmRSS", "VmHWM"]) -> float:
    """MB that this process holds (VmRSS) or has held at most (VmHWM); nan on systems without Linux's /proc.

    Not getrusage's ru_maxrss: on Linux a process starts with that of the one that started it.
    """
    try:
        with open("/proc/self/status") as file:
            kilobytes = next(line.split()[1] for line in file if line.startswith(field))
    except OSError:
        return float("nan")
    return int(kilobytes) * 1024 / 1e6
