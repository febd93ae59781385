"""What a run leaves behind: config.json, metrics.jsonl and TensorBoard's files."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
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

if TYPE_CHECKING:
    from jax_resnet.weights import WeightFile

CONFIG, METRICS, WEIGHTS = "config.json", "metrics.jsonl", "weights.safetensors"
CURVES, PREDICTIONS, STEP_SIZES = "curves.png", "predictions.png", "step_sizes.png"
AVERAGED_WEIGHTS, CHECKPOINTS, PROFILE = "weights_ema.safetensors", "checkpoints", "profile"
TEST_RESULTS, ERROR = "predictions.csv", "error.txt"
# In the order in which a run's last line names them.
REPORTED = (
    CONFIG,
    METRICS,
    CURVES,
    PREDICTIONS,
    TEST_RESULTS,
    STEP_SIZES,
    WEIGHTS,
    AVERAGED_WEIGHTS,
    CHECKPOINTS,
    PROFILE,
)
# In the metadata of the file, as JSON; of a run that has not ended, in its config.json.
RUN_FACTS = ("arch", "class_names", "image_size", "grey", "mean", "std")
UNTESTED = {"tested": 0}  # in the row that ends an epoch without a test
FILES = (
    *REPORTED[1:],
    ERROR,
    "step_sizes.json",
    "metrics.cut",
    f"{CONFIG}.new",
    "events.out.tfevents.*",
    ".weights*",  # what a killed process has left
    CONFIG,  # removed last: it tells that the rest is a run's
)

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "pillow", "torch", "torchvision")  # as far as installed


def refuse_earlier_run(out: Path | None, overwrite: bool) -> None:
    """Raises a ValueError if a run's folder cannot be made, or holds what may not be replaced."""
    earlier = earlier_run(out) if out else []
    if any(file.is_dir() or file.name.startswith(".weights") for file in earlier) and not (out / CONFIG).exists():
        raise ValueError(f"{out} holds files of something else, and no {CONFIG}: choose another --out")
    if earlier and not overwrite:
        raise ValueError(f"{out} holds an earlier run: choose another --out, or pass --overwrite or --resume")


def earlier_run(path: Path) -> list[Path]:
    """The files of a run that are in a folder, [] if there are none.

    Raises:
      ValueError: if the path is no folder, or one that cannot be made or written.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"--out {path} cannot be written: it is a link to nowhere")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {path} cannot be written: {there} is {'read-only' if there.is_dir() else 'a file'}")
    return [file for pattern in FILES for file in path.glob(pattern)]


class RunFolder:
    """Writes a run's files as the run goes; every line is in the file when `log` returns.

    Args:
      path: the folder; made if it is not there. The files of an earlier run in it are removed.
      rows: go on with the run in it: keep its files, and as many lines of its metrics.
      writes: False for a process that only runs along: it touches nothing.
    """

    def __init__(self, path: Path, *, rows: int | None = None, writes: bool = True):
        self.path, self.rows, self._writes = path, rows or 0, writes
        if not writes:
            return
        path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(path / ".lock")
        if rows is None:
            for file in earlier_run(path):
                _remove(file)
        else:
            for file in (*path.glob(".weights*"), *path.glob(ERROR)):
                _remove(file)
            try:
                self._cut(rows)
            except ValueError:
                self._lock.close()
                raise
        self._metrics = open(path / METRICS, "a", encoding="utf-8")
        last = read_metrics(path)[-1]["step"] if self.rows else 0
        from tensorboardX import SummaryWriter  # which imports torch, where it is installed

        self._board = SummaryWriter(str(path), purge_step=last + 1 if rows is not None else None)

    def _cut(self, rows: int) -> None:
        """Leaves the first lines of metrics.jsonl, by a new file in its place: a kill leaves the one or the other."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # a kill may have left half of one
        if len(lines) < rows:
            raise ValueError(f"{path} has {len(lines)} lines, and had {rows} at the checkpoint: it was changed")
        for number, line in enumerate(lines[:rows], 1):
            try:
                json.loads(line)["step"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {path} is not that of a training run: it was changed") from error
        aside = path.with_suffix(".cut")
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines(lines[:rows])
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes config.json: `config` and what this machine adds (versions, git commit)."""
        if self._writes:
            text = json.dumps(config | environment(), indent=2, ensure_ascii=False) + "\n"
            aside = self.path / f"{CONFIG}.new"
            aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # of file names
            os.replace(aside, self.path / CONFIG)

    def log(self, row: dict[str, Any]) -> None:
        """Appends one flat object, with "step" and numbers, to metrics.jsonl and to TensorBoard; NaN becomes null."""
        self.rows += 1
        if not self._writes:
            return
        line = json.dumps({name: None if value != value else value for name, value in row.items()}) + "\n"
        try:
            self._metrics.write(line)
            self._metrics.flush()
        except OSError as error:  # Python's has no name of the file in it
            raise OSError(error.errno, error.strerror, self._metrics.name) from error
        for name, value in row.items():
            if name != "step" and value == value:
                self._board.add_scalar(name, value, row["step"])
        self._board.flush()

    def sync(self) -> None:
        """Returns when all lines are on the disk."""
        if self._writes:
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        if self._writes:
            self._metrics.close()
            self._board.close()
            self._lock.close()


def lock(path: Path) -> TextIO:
    """Takes a file, which stands for a run, for this process alone, until it is closed or the process ends.

    A child that inherits the open file has it as well, and keeps it when this process ends.

    Raises:
      ValueError: another one has it.
    """
    file = open(path, "a")
    with contextlib.suppress(ImportError):  # not on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{path.parent} is in use by another run that has not ended") from None
        except OSError:
            pass  # a file system without locks
    return file


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.jsonl, without a last line that is being written or that a kill cut short."""
    lines = (path / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def ends_epoch(row: Mapping[str, Any]) -> bool:
    """Whether a row holds the means of a whole epoch; the others hold those of some steps within one."""
    return "test_loss" in row or UNTESTED.keys() <= row.keys()


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """Those of the rows that end an epoch that was tested; [] if there are none yet."""
    if not (path / METRICS).exists():
        return []
    return [row for row in read_metrics(path) if "test_top1" in row]


def environment() -> dict[str, Any]:
    """Versions, git commit and machine, as plain JSON values."""
    return {
        "versions": {"python": platform.python_version()} | _versions(),
        "git_commit": _git_commit(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _git_commit() -> str | None:
    """The commit of this checkout, "-dirty" behind it where Python files differ; None outside of a checkout."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    # Results that are kept in the checkout change while a study runs, and change nothing.
    commands = [[*git, "rev-parse", "HEAD"], [*git, "status", "--porcelain", "--", "*.py"]]
    try:
        commit, changed = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


COLUMNS = ("picture", "label", "prediction", "confidence", "top5", "loss")


def write_test_results(path: Path, results: dict[str, np.ndarray], split: Split) -> None:
    """Writes what `experiments.training.loop.evaluate` returns, a line for each picture, as CSV with COLUMNS.

    picture is its name, or its number where it has none; label and prediction are class numbers, confidence is from 0
    to 1, top5 is 1 where the label is among the five best classes.
    """
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i, label in enumerate(split.labels):
            name = i if split.names is None else split.names[i]
            numbers = (f"{results['confidence'][i]:.4f}", int(results["top5"][i]), f"{results['loss'][i]:.4f}")
            writer.writerow((name, label, results["prediction"][i], *numbers))


def read_test_results(path: Path) -> dict[str, np.ndarray]:
    """The columns of a file of `write_test_results`, "picture" of text and the others of numbers.

    Raises:
      ValueError: it is no such file.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise ValueError(f"{path} holds no test results: its columns should be {', '.join(COLUMNS)}")
    columns = dict(zip(COLUMNS, zip(*rows[1:], strict=True), strict=True)) if rows[1:] else dict.fromkeys(COLUMNS, ())
    kinds = dict.fromkeys(("label", "prediction", "top5"), int) | dict.fromkeys(("confidence", "loss"), float)
    try:
        return {name: np.array(values, kinds.get(name, str)) for name, values in columns.items()}
    except ValueError as error:
        raise ValueError(f"{path} holds no test results: {error}") from error


def run_metadata(file: WeightFile) -> Mapping[str, str]:
    """The metadata of a weight file; of a checkpoint of a run those that its weight file will have."""
    facts = file.settings.get("input")
    if file.metadata or not isinstance(facts, Mapping):
        return file.metadata
    return {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}


def is_of_a_run(metadata: Mapping[str, str]) -> bool:
    """Whether metadata are those of a run of this project: other programs write one of these names, or two."""
    return 2 * sum(name in metadata for name in RUN_FACTS) > len(RUN_FACTS)
