"""Several processes that train together: finding one another, and who of them speaks."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator

import jax

from experiments.settings import RunSettings

TIMEOUT_SECONDS = 300  # to meet; and without a sign of life before all are ended: a busy machine may be still for long


def join_processes(coordinator: str | None, process_id: int | None, num_processes: int | None) -> None:
    """Joins the other processes of a training; before anything asks JAX for a device.

    Args:
      coordinator: "host:port" of process 0, reachable from all; "auto" for what jax.distributed.initialize() finds by
        itself (Slurm, Open MPI, Cloud TPU, Kubernetes).
      process_id: from 0; num_processes: of how many. Both are given with an address, neither with "auto".

    Raises:
      ValueError: the settings do not fit together, or the others were not found.
    """
    if coordinator == "auto":
        settings = {}
    else:
        host, _, port = (coordinator or "").rpartition(":")
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
        raise ValueError(f"the processes of --coordinator {coordinator} did not meet: {error}") from error


def is_first() -> bool:
    """Whether this process writes the run's folder and speaks for all."""
    return jax.process_index() == 0


def wait_for_address(host: str, port: int) -> None:
    """Returns when somebody listens there: jax.distributed would end the process without a chance to say why.

    Raises:
      ValueError: nobody does, for long.
    """
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
def start_processes(settings: RunSettings) -> Iterator[None]:
    """Sets JAX up as the settings say, with the other processes if there are any; only the first one's print is heard.

    To be entered before anything asks JAX for a device.

    Raises:
      ValueError: see `join_processes`.
    """
    if settings.deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    if settings.coordinator is None:
        yield
        return
    join_processes(settings.coordinator, settings.process_id, settings.num_processes)
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    finally:
        jax.distributed.shutdown()


def choose_devices(wanted: str, batch_size: int) -> int:
    """How many of JAX's devices are used: --devices "all" or a number; all with several processes.

    Raises:
      ValueError: there are not so many, or they cannot share the batch equally.
    """
    there = jax.device_count()
    chosen = there if wanted == "all" or jax.process_count() > 1 else int(wanted)
    if not 1 <= chosen <= there:
        kind = jax.devices()[0].platform
        hint = (
            f"; XLA_FLAGS=--xla_force_host_platform_device_count={chosen} makes virtual ones" if kind == "cpu" else ""
        )
        raise ValueError(f"--devices {wanted}: JAX sees {there} ({kind}){hint}")
    if batch_size % chosen:
        raise ValueError(f"--batch-size {batch_size} must be a multiple of the {chosen} devices that share it")
    return chosen


def warn(text: str) -> None:
    """Prints a warning, once for all processes."""
    if is_first():
        print(f"warning: {text}", file=sys.stderr)
