"""The folder of a run: config.json, metrics.jsonl, TensorBoard's files and test results."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from experiments.data.dataset import Split
from experiments.machine import versions

if TYPE_CHECKING:
    from jax_resnet.weights import WeightFile

CONFIG, METRICS, WEIGHTS = "config.json", "metrics.jsonl", "weights.safetensors"
CURVES, PREDICTIONS, STEP_SIZES = "curves.png", "predictions.png", "step_sizes.png"
AVERAGED_WEIGHTS, CHECKPOINTS, PROFILE = "weights_ema.safetensors", "checkpoints", "profile"
TEST_RESULTS, ERROR = "predictions.csv", "error.txt"
# In the order of a run's last line.
REPORTED = (CONFIG, METRICS, CURVES, PREDICTIONS, TEST_RESULTS, STEP_SIZES)
REPORTED += (WEIGHTS, AVERAGED_WEIGHTS, CHECKPOINTS, PROFILE)
UNFINISHED = ".weights*"  # temporary files of a killed process
ASIDE = ".new-"  # and a process ID: the suffix of a temporary file that will replace another
FILES = (*REPORTED[1:], ERROR, "step_sizes.json", f"{CONFIG}{ASIDE}*", f"{METRICS}{ASIDE}*", "events.out.tfevents.*")
FILES += (UNFINISHED, CONFIG)  # config.json is removed last: it shows that the other files are a run's
# In the metadata of a run's weight file, as JSON; also in its config.json and its checkpoints.
RUN_FACTS = ("arch", "class_names", "image_size", "grey", "mean", "std")
UNTESTED = {"tested": 0}  # in the row that ends an epoch without a test
COLUMNS = ("picture", "label", "prediction", "confidence", "top5", "loss")  # of predictions.csv
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "pillow", "torch", "torchvision")  # if installed


def refuse_earlier_run(out: Path | None, overwrite: bool) -> None:
    """Raises a ValueError if a run's folder cannot be created, or holds files that may not be replaced."""
    earlier = earlier_run(out) if out else []
    if any(file.is_dir() or file.match(UNFINISHED) for file in earlier) and not (out / CONFIG).exists():
        raise ValueError(f"{out} holds files of something else, and no {CONFIG}: choose another --out")
    if earlier and not overwrite:
        raise ValueError(f"{out} holds an earlier run: choose another --out, or pass --overwrite or --resume")


def earlier_run(path: Path) -> list[Path]:
    """The files of an earlier run in a folder; raises a ValueError if the folder cannot be created or written."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"--out {path} cannot be written: it is a broken link")
    there = nearest(path)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {path} cannot be written: {there} is {'read-only' if there.is_dir() else 'a file'}")
    return [file for pattern in FILES for file in path.glob(pattern)]


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


class RunFolder:
    """Writes a run's files during the run; every line is in the file when `log` returns.

    Args:
      path: the folder, created if it does not exist. Without `rows`, the files of an earlier run in it are removed.
      rows: continue the run in the folder: keep its files, and this many lines of its metrics.
      writes: False for all processes but the first, which alone touches files.
    """

    def __init__(self, path: Path, *, rows: int | None = None, writes: bool = True):
        self.path, self.rows, self.writes = path, rows or 0, writes
        if not writes:
            return
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as on_error:
            self._lock = on_error.enter_context(lock(path / ".lock"))
            outdated = earlier_run(path) if rows is None else [*path.glob(UNFINISHED), *path.glob(ERROR)]
            for file in outdated:
                remove = shutil.rmtree if file.is_dir() and not file.is_symlink() else os.unlink
                remove(file)
            kept = [] if rows is None else self._cut(rows)
            on_error.pop_all()
        self._metrics = open(path / METRICS, "a", encoding="utf-8")
        from tensorboardX import SummaryWriter  # imported late: it imports torch, if that is installed

        next_step = kept[-1]["step"] + 1 if kept else 1
        self._board = SummaryWriter(str(path), purge_step=None if rows is None else next_step)

    def _cut(self, count: int) -> list[dict[str, Any]]:
        """Cuts metrics.jsonl after its first `count` lines and returns these as rows."""
        path = self.path / METRICS
        lines = complete_lines(path) if path.exists() else []
        if len(lines) < count:
            raise ValueError(f"{path} has {len(lines)} lines, and had {count} at the checkpoint: it was changed")
        rows = []
        for number, line in enumerate(lines[:count], 1):
            try:
                rows.append(json.loads(line))
                rows[-1]["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {path} is no row of a training run: it was changed") from error
        replace(path, "".join(lines[:count]))
        return rows

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes config.json: `config`, and the versions, git commit and kind of machine."""
        if self.writes:
            machine = f"{platform.system()} {platform.machine()}"
            config = config | {"versions": package_versions(), "git_commit": _git_commit(), "machine": machine}
            replace(self.path / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def write_error(self, error: Exception) -> None:
        """Writes why the run failed."""
        if self.writes:
            (self.path / ERROR).write_text(f"{error}\n", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """Appends one flat object, with "step" and numbers, to metrics.jsonl and to TensorBoard; NaN becomes null."""
        self.rows += 1
        if not self.writes:
            return
        line = json.dumps({name: None if value != value else value for name, value in row.items()}) + "\n"
        try:
            self._metrics.write(line)
            self._metrics.flush()
        except OSError as error:  # Python's error does not name the file
            raise OSError(error.errno, error.strerror, self._metrics.name) from error
        for name, value in row.items():
            if name != "step" and value == value:
                self._board.add_scalar(name, value, row["step"])
        self._board.flush()

    def sync(self) -> None:
        """Returns when all lines are on the disk."""
        if self.writes:
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        for file in (self._metrics, self._board, self._lock) if self.writes else ():
            file.close()


def replace(path: Path, text: str) -> None:
    """Writes a temporary file and renames it, so that a reader sees the old file or the new one, even after a kill."""
    aside = path.with_name(f"{path.name}{ASIDE}{os.getpid()}")
    with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:  # file names need not be UTF-8
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def lock(path: Path, wait: bool = False) -> TextIO:
    """Locks a file, which stands for a run, until it is closed or this process ends.

    A child that inherits the open file holds the lock too, and keeps it when this process ends. While another process
    holds the lock, this function waits, or raises a ValueError if `wait` is False.
    """
    file = open(path, "a")
    with contextlib.suppress(ImportError):  # not on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            raise ValueError(f"{path.parent} is in use by another run that has not ended") from None
        except OSError:
            pass  # a file system without locks
    return file


def complete_lines(path: Path) -> list[str]:
    """The complete lines of a file: the last line may still be written, or a kill has cut it short."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in complete_lines(path / METRICS)]


def ends_epoch(row: Mapping[str, Any]) -> bool:
    """Whether a row holds the means of a whole epoch; other rows hold the means of some steps within an epoch."""
    return "test_loss" in row or UNTESTED.keys() <= row.keys()


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """The rows at the end of tested epochs; [] if there are none yet."""
    return [row for row in read_metrics(path) if "test_top1" in row] if (path / METRICS).exists() else []


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect the results."""
    return {"python": platform.python_version()} | versions(PACKAGES)


def _git_commit() -> str | None:
    """The commit of this checkout, followed by "-dirty" if Python files differ; None outside a checkout."""

    def git(*command: str) -> str:
        command = ("git", "-C", str(Path(__file__).parents[2]), *command)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Only code counts: a study changes results that are kept in the checkout.
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_test_results(path: Path, results: dict[str, np.ndarray], split: Split) -> None:
    """Writes the results of a test, a line for each picture, as CSV with COLUMNS.

    picture is the name of the picture, or its number if it has none; label and prediction are class numbers; confidence
    is from 0 to 1; top5 is 1 if the label is among the five most probable classes.
    """
    names = range(len(split)) if split.names is None else split.names
    confidences, losses = ([f"{value:.4f}" for value in results[name]] for name in ("confidence", "loss"))
    numbers = (split.labels, results["prediction"], confidences, results["top5"].astype(int), losses)
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *zip(names, *numbers, strict=True)])


def read_test_results(path: Path) -> dict[str, np.ndarray]:
    """Reads the columns of a file that `write_test_results` wrote; raises a ValueError for any other file."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise ValueError(f"{path} holds no test results: its columns should be {', '.join(COLUMNS)}")
    kinds = (str, int, int, float, int, float)
    try:
        return {
            name: np.array([row[column] for row in rows[1:]], kind)
            for column, (name, kind) in enumerate(zip(COLUMNS, kinds, strict=True))
        }
    except ValueError as error:
        raise ValueError(f"{path} holds no test results: {error}") from error


def run_metadata(file: WeightFile) -> Mapping[str, str]:
    """The metadata of a weight file; for a checkpoint of a run, those that the run's weight file has."""
    facts = file.settings.get("input")
    if file.metadata or not isinstance(facts, Mapping):
        return file.metadata
    return {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}


def is_of_a_run(metadata: Mapping[str, str]) -> bool:
    """Whether metadata come from a run of this project; other programs write at most two of these names."""
    return 2 * sum(name in metadata for name in RUN_FACTS) > len(RUN_FACTS)
