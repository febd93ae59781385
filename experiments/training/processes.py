"""Training in several processes: how they connect, which of them prints, and how all stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from tqdm import tqdm

from experiments.cli import handling
from experiments.machine import use_compilation_cache
from experiments.training.settings import System

TIMEOUT_SECONDS = 300  # to connect, or without a heartbeat before all are ended; a busy machine may pause for long


def join_processes(coordinator: str, process_id: int | None, num_processes: int | None) -> None:
    """Joins the other processes of a training; call this before anything asks JAX for a device.

    Args:
      coordinator: "host:port" of process 0, with process_id, from 0, and num_processes; or "auto" for what
        jax.distributed.initialize() finds by itself (Slurm, Open MPI, Cloud TPU, Kubernetes).

    Raises:
      ValueError: the settings contradict one another, or the other processes were not found.
    """
    settings = {}
    if coordinator != "auto":
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or process_id is None or num_processes is None:
            raise ValueError(
                "--coordinator takes HOST:PORT of process 0, with --process-id and --num-processes, or auto; "
                f"got {coordinator}"
            )
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process-id must be from 0 to {num_processes - 1}, got {process_id}")
        if process_id:
            wait_for_address(host, int(port))
        settings = dict(coordinator_address=coordinator, process_id=process_id, num_processes=num_processes)
    try:
        jax.distributed.initialize(
            **settings, initialization_timeout=TIMEOUT_SECONDS, heartbeat_timeout_seconds=TIMEOUT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes of --coordinator {coordinator} could not connect: {error}") from error


def wait_for_address(host: str, port: int) -> None:
    """Waits until a process listens there; after TIMEOUT_SECONDS raises a ValueError (JAX would end the process)."""
    end = time.monotonic() + TIMEOUT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > end or isinstance(error, (OverflowError, socket.gaierror)):
                raise ValueError(f"nobody listens at --coordinator {host}:{port} ({error}): start process 0") from error
        time.sleep(0.2)


@contextlib.contextmanager
def start_processes(system: System) -> Iterator[None]:
    """Turns JAX's cache on and joins the other processes of --coordinator, if any; only the first one prints.

    Enter this before anything asks JAX for a device.
    """
    use_compilation_cache()
    if system.coordinator is None:
        yield
        return
    join_processes(system.coordinator, system.process_id, system.num_processes)
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the process that writes the run's folder and prints for all."""
    return jax.process_index() == 0


def choose_devices(wanted: str, batch_size: int) -> int:
    """How many of JAX's devices to use: the number of --devices; all for "all" or with several processes.

    Raises:
      ValueError: there are too few, or they cannot share the batch equally.
    """
    there = jax.device_count()
    chosen = there if wanted == "all" or jax.process_count() > 1 else int(wanted)
    if not 1 <= chosen <= there:
        kind = jax.devices()[0].platform
        hint = f"; XLA_FLAGS=--xla_force_host_platform_device_count={chosen} makes virtual ones"
        raise ValueError(f"--devices {wanted}: JAX sees {there} ({kind}){hint if kind == 'cpu' else ''}")
    if batch_size % chosen:
        raise ValueError(f"--batch-size {batch_size} must be a multiple of the {chosen} devices that share it")
    return chosen


def warn(text: str) -> None:
    """Prints a warning, above the progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


class Stopped(Exception):
    """A signal told the run to stop; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


class StopRequest(contextlib.ExitStack):
    """Makes `check` raise `Stopped` after Ctrl-C or SIGTERM; the same signal again acts at once.

    Python alone would raise anywhere, even between a step's end and the assignment of its result. By then the step has
    consumed the old state, and nothing would be left to save.

    With several processes, a signal to one of them stops all before the same step: jax.distributed handles SIGTERM
    itself, and this class turns Ctrl-C into SIGTERM.
    """

    def __init__(self):
        super().__init__()
        self.requested: int | None = None
        self.together = jax.process_count() > 1
        numbers = (signal.SIGINT,) if self.together else (signal.SIGINT, signal.SIGTERM)
        self.restore = self.enter_context(handling(numbers, self._request))

    def _request(self, number: int, frame: Any) -> None:
        if self.together:
            os.kill(os.getpid(), signal.SIGTERM)
        self.requested = number
        again = "Ctrl-C again" if number == signal.SIGINT else "another SIGTERM"
        tqdm.write(f"stopping after this step; {again} stops at once", file=sys.stderr)
        self.restore()

    def check(self, step: int | None = None) -> None:
        """Raises Stopped if a signal has come; several processes must all pass the same number of steps done."""
        if not self.together:
            stopped = self.requested is not None
        else:
            from jax.experimental import multihost_utils

            stopped = step is not None and multihost_utils.reached_preemption_sync_point(step)
        if stopped:
            raise Stopped(self.requested or signal.SIGTERM)
