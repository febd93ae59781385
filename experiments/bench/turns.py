"""Contestants that take turns, each in its own process.

Each has its own process because thread pools would interfere with one another, and because memory is counted by
process. A contestant measures only when it is told to.
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from experiments.cli import FailedError
from experiments.machine import give_back_freed_memory

Step = Callable[[], Any]  # what is timed; tests check what it returns
MakeStep = Callable[[], Step]  # can be pickled: a function of a module, or functools.partial of one
Who, Answer = TypeVar("Who"), TypeVar("Answer")

# What a contestant imports before it builds anything, by framework (its name up to the first dot).
MODULES = {
    "numpy": ("numpy", "experiments.frameworks.numpy"),
    "jax": ("jax", "experiments.frameworks.jax"),
    "flax": ("jax", "flax.linen", "optax"),
    "keras": ("jax", "keras", "optax"),
    "torch": ("torch", "torchvision", "experiments.frameworks.torch"),
}
ENVIRONMENT = {"keras": {"KERAS_BACKEND": "jax"}}
EXTRAS = {"torch": "torch", "keras": "bench"}  # of setup.cfg
NOBODY_LEFT = "nobody is left to measure"
PAUSE = 0.05  # seconds between turns: OpenBLAS's threads keep a core busy for some 30 ms after their last product


class Result(NamedTuple):
    """The measurements of a contestant.

    first_step: seconds, compilation included.
    seconds: (rounds, steps), of each step.
    memory_before: MB of its process after the imports, before anything was built; 0 on a GPU.
    peak_memory: MB of its process at the peak, libraries included; on a GPU what the framework allocated there.
    """

    first_step: float
    seconds: np.ndarray
    memory_before: float
    peak_memory: float

    @property
    def above_libraries(self) -> float:
        return self.peak_memory - self.memory_before


class Contestant:
    """A process that has imported a contestant's libraries and waits; memory_before and peak_memory as in `Result`."""

    def __init__(self, name: str, threads: int, environment: Mapping[str, str]):
        """Starts it on `threads` cores, with these additional environment variables."""
        self.name = name
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with bound(threads, {**ENVIRONMENT.get(framework(name), {}), **environment}):
            self._ask(_prepare, framework(name))

    def build(self, make_step: MakeStep) -> float:
        """Makes the step to measure and runs it once; returns the seconds of this first run.

        Raises:
          FailedError: the step fails, with its message; `measure` raises it too.
        """
        return self._ask(_build, make_step)

    def measure(self, steps: int) -> list[float]:
        """Warms up again by a tenth of the steps, at least one; then runs the steps and returns the seconds of each."""
        return self._ask(_measure, steps)

    def _ask(self, function: Callable[[Any], Any], argument: Any) -> Any:
        try:
            answer, (self.memory_before, self.peak_memory) = self._process.submit(_answer, function, argument).result()
        except BrokenProcessPool:
            raise FailedError(f"the process of {self.name} ended without a message") from None
        except RuntimeError as error:
            raise FailedError(f"{self.name}: {error}") from None
        return answer

    def close(self) -> None:
        self._process.shutdown()


# In the contestant's process:

_state: dict[str, Any] = {}  # "framework", "step", and "memory" before anything was built


def _answer(function: Callable[[Any], Any], argument: Any) -> tuple[Any, tuple[float, float]]:
    """The function's result and the memory use; raises any error as a RuntimeError, since not all can be pickled."""
    try:
        return function(argument), _memory_use(_state["framework"], _state["memory"])
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _prepare(framework: str) -> None:
    for module in MODULES[framework]:
        importlib.import_module(module)
    _state.update(framework=framework, memory=_memory("VmRSS"))


def _build(make_step: MakeStep) -> float:
    _state.pop("step", None)  # frees the memory of the previous step
    _state["step"] = make_step()
    give_back_freed_memory()  # drawing the weights has used it
    return _seconds(_state["step"])


def _measure(steps: int) -> list[float]:
    for _ in range(max(1, steps // 10)):
        _state["step"]()
    return [_seconds(_state["step"]) for _ in range(steps)]


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _memory_use(framework: str, before: float) -> tuple[float, float]:
    """MB before anything was built and at the peak: of the GPU if the framework runs on one, else of the process."""
    if framework == "torch":
        import torch

        if torch.cuda.is_available():
            return 0.0, torch.cuda.max_memory_allocated() / 1e6
    if framework in ("jax", "flax", "keras") and "step" in _state:  # asking earlier would start JAX
        import jax

        if jax.default_backend() != "cpu":
            stats = jax.local_devices()[0].memory_stats() or {}
            return 0.0, stats.get("peak_bytes_in_use", float("nan")) / 1e6
    return before, _memory("VmHWM")


def _memory(field: Literal["VmRSS", "VmHWM"]) -> float:
    """The memory of this process in MB, now (VmRSS) or at its peak (VmHWM); nan on systems without Linux's /proc.

    getrusage's ru_maxrss is no alternative: on Linux a process inherits its parent's value.
    """
    try:
        with open("/proc/self/status") as file:
            kilobytes = next(line.split()[1] for line in file if line.startswith(field))
    except OSError:
        return float("nan")
    return int(kilobytes) * 1024 / 1e6


# In the process that compares:


def framework(name: str) -> str:
    """ "torch.compile" -> "torch"."""
    return name.split(".")[0]


def available(names: Sequence[str]) -> list[str]:
    """The contestants that can run here; prints the others, with the packages that are not installed.

    Raises:
      ValueError: if none can.
    """
    found = []
    for name in names:
        packages = {module.split(".")[0] for module in MODULES[framework(name)]} - {"experiments"}
        missing = sorted(package for package in packages if importlib.util.find_spec(package) is None)
        if missing:
            extra = EXTRAS.get(framework(name))
            how = f': pip install -e ".[{extra}]"' if extra else ""
            print(f"left out: {name}, without {' and '.join(missing)} installed{how}")
        else:
            found.append(name)
    if not found:
        raise ValueError(NOBODY_LEFT)
    return found


@contextlib.contextmanager
def started(
    names: Sequence[str], threads: int, environment: Mapping[str, str] | None = None
) -> Iterator[list[Contestant]]:
    """Starts the contestants' processes one after the other; they end with the context."""
    with contextlib.ExitStack() as ending:
        yield [ending.enter_context(contextlib.closing(Contestant(name, threads, environment or {}))) for name in names]


@contextlib.contextmanager
def bound(threads: int, environment: Mapping[str, str]) -> Iterator[None]:
    """Binds this process to some cores and sets environment variables in the context; child processes inherit both.

    All libraries count the cores that they may use, so none needs its own setting. OpenMP's variable is set as well,
    for systems that cannot bind a process to cores.
    """
    variables = dict(os.environ)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    try:
        os.environ.update({"OMP_NUM_THREADS": str(threads), **environment})
        if cores:
            os.sched_setaffinity(0, sorted(cores)[:threads])
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        os.environ.clear()
        os.environ.update(variables)


def who_can(those: Sequence[Who], do: Callable[[Who], Answer]) -> dict[Who, Answer]:
    """Calls `do` for each, one after the other, and returns the results; prints which fail and leaves them out.

    Raises:
      ValueError: if all fail.
    """
    done = {}
    for who in those:
        try:
            done[who] = do(who)
        except FailedError as error:
            print(f"left out: {error}")
    if not done:
        raise ValueError(NOBODY_LEFT)
    return done


def compete(
    contestants: Sequence[Contestant], make_steps: dict[str, MakeStep], rounds: int, steps: int
) -> dict[str, Result]:
    """Runs the contestants alternately, `steps` steps in each round; leaves out those that fail at the first step.

    Raises:
      ValueError: if all fail.
    """
    # One after the other: compiling needs all cores.
    first = who_can(contestants, lambda contestant: contestant.build(make_steps[contestant.name]))
    seconds = {contestant: [] for contestant in first}
    turns = collections.deque(first)
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        turns.rotate(-1)  # so that nobody always goes first or always follows the same contestant
        for contestant in turns:
            time.sleep(PAUSE)
            seconds[contestant].append(contestant.measure(steps))
    return {c.name: Result(first[c], np.array(seconds[c]), c.memory_before, c.peak_memory) for c in first}
