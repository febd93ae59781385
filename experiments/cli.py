"""Common parts of the command lines: arguments, errors as messages and exit codes, and signals that stop a program."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

# Exit codes. If a signal ended a run, the code is 128 plus the signal's number, as in a shell.
FAILED, BAD_INPUT = 1, 2
MAX_SIZE = 4096  # pixels per side; a larger number is taken for a typing error
MIN_SIZE = 32  # copied from jax_resnet.resnet, whose import takes a second
Arch = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


class FailedError(RuntimeError):
    """The program could not finish, although its input was fine: exit code FAILED."""


def exit_code(run: Callable[[], int | None]) -> int:
    """Runs a program and turns its errors into one message on stderr and an exit code.

    `run` returns the number of the signal that stopped the program, or None. If it raises a ValueError or OSError, the
    input is bad, and the error's text is the message for the user. A FailedError is a failure for another reason.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the program began
            setattr(sys, name, nowhere())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    # JAX logs errors, with tracebacks, that it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        try:
            ended_by = run()
        except SystemExit as ended:  # after --help
            if not ended.code:
                flush_output()
            raise
        flush_output()
        return 0 if ended_by is None else 128 + ended_by
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        closed = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(closed, stream.fileno())  # otherwise Python reports an error when it flushes at exit
        return 128 + getattr(signal, "SIGPIPE", 13)
    except FailedError as error:
        code, message = FAILED, str(error)
    except (ValueError, OSError) as error:
        code, message = BAD_INPUT, str(error)
    except MemoryError as error:
        code, message = BAD_INPUT, f"not enough memory: {error}"
    except RuntimeError as error:
        jax = sys.modules.get("jax")
        if jax is None or not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        # The device is out of memory, or another process is gone. The first line says which.
        code, message = FAILED, str(error).splitlines()[0]
    print(f"error: {message}", file=sys.stderr)
    return code


def nowhere() -> TextIO:
    """A stream that drops what is written, whatever it is."""
    return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")


def flush_output() -> None:
    """Writes what has been printed; raises a FailedError if it cannot be written, for instance to a full disk."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = nowhere()  # otherwise Python reports the error once more at exit
        raise FailedError(f"the work is done, but what it printed could not be written: {error.strerror}") from error


def parse_image_size(text: str) -> tuple[int, int]:
    """Reads --image-size: "96" -> (96, 96), "64x96" -> (64, 96), height first; raises a ValueError for other text."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or not MIN_SIZE <= min(sides) <= max(sides) <= MAX_SIZE:
        raise ValueError(f"--image-size takes one side or HEIGHTxWIDTH, {MIN_SIZE} to {MAX_SIZE} each, got {text!r}")
    return sides[0], sides[-1]


def parse(kind: Any, arguments: list[str] | None, program: str, **options: Any) -> Any:
    """Parses a command line of `python -m experiments.PROGRAM` with tyro.cli; expands ~ in paths."""
    import tyro

    return tyro.cli(kind, args=expanded(arguments), prog=f"python -m experiments.{program}", **options)


def check_output_file(name: str, path: Path) -> None:
    """Raises a ValueError if `path`, a value of the option or argument `name`, is a folder or would lie in none."""
    if path.is_dir():
        raise ValueError(f"{name} {path} is a folder: name the file to write")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{name} {path}: there is no folder {path.parent}")


def expanded(arguments: list[str] | None) -> list[str]:
    """The arguments, by default those of this process, with ~ in paths expanded; see `parse`."""
    return [expand_home(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]


def expand_home(argument: str) -> str:
    """Expands ~ in a path, also in --out=~/run and "~/run", which shells leave as they are.

    >>> import os; os.environ["HOME"] = "/home/me"
    >>> [expand_home(argument) for argument in ("--out=~/run", "~/run", "run~", "--opt=adam")]
    ['--out=/home/me/run', '/home/me/run', 'run~', '--opt=adam']
    """
    option, equals, path = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path and not os.path.exists(path):
        raise ValueError(f"{path} does not exist: there is no home folder of that name")
    return f"{option}{equals}{expanded}"


@contextlib.contextmanager
def handling(numbers: Sequence[int], handler: Callable[[int, Any], None]) -> Iterator[Callable[[], None]]:
    """Makes signals call a handler; yields a function that restores the earlier handlers before the context ends."""
    # Python lets only the main thread set handlers.
    in_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in numbers if in_main}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    try:
        yield restore
    finally:
        restore()


@contextlib.contextmanager
def leaving_stops_to_a_child(terminate: Callable[[], None]) -> Iterator[list[int]]:
    """Lets a child process end by itself, with a report, when this process is told to stop.

    Ctrl-C in a terminal reaches the child too; SIGTERM reaches only this process, and `terminate` passes it on.

    Yields:
      the signals that have come, a list that grows.
    """
    came: list[int] = []

    def take(number: int, frame: Any) -> None:
        came.append(number)
        if number == signal.SIGTERM:
            terminate()

    with handling((signal.SIGINT, signal.SIGTERM), take):
        yield came
