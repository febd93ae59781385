"""What a run leaves behind: config.json, metrics.jsonl and TensorBoard's files."""

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
# In the order in which a run's last line names them.
REPORTED = (CONFIG, METRICS, CURVES, PREDICTIONS, TEST_RESULTS, STEP_SIZES)
REPORTED += (WEIGHTS, AVERAGED_WEIGHTS, CHECKPOINTS, PROFILE)
UNFINISHED = ".weights*"  # what a killed process has left
ASIDE = ".new-"  # and a process number: the suffix of what will replace a file
FILES = (*REPORTED[1:], ERROR, "step_sizes.json", f"{CONFIG}{ASIDE}*", f"{METRICS}{ASIDE}*", "events.out.tfevents.*")
FILES += (UNFINISHED, CONFIG)  # config.json is removed last: it tells that the rest is a run's
# In the metadata of the weight file, as JSON; of a run that has not ended, in its config.json.
RUN_FACTS = ("arch", "class_names", "image_size", "grey", "mean", "std")
UNTESTED = {"tested": 0}  # in the row that ends an epoch without a test
COLUMNS = ("picture", "label", "prediction", "confidence", "top5", "loss")  # of predictions.csv
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "pillow", "torch", "torchvision")  # as far as installed


def refuse_earlier_run(out: Path | None, overwrite: bool) -> None:
    """Raises a ValueError if a run's folder cannot be made, or holds what may not be replaced."""
    earlier = earlier_run(out) if out else []
    if any(file.is_dir() or file.match(UNFINISHED) for file in earlier) and not (out / CONFIG).exists():
        raise ValueError(f"{out} holds files of something else, and no {CONFIG}: choose another --out")
    if earlier and not overwrite:
        raise ValueError(f"{out} holds an earlier run: choose another --out, or pass --overwrite or --resume")


def earlier_run(path: Path) -> list[Path]:
    """The files of a run that are in a folder; raises a ValueError if it cannot be made or written."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"--out {path} cannot be written: it is a link to nowhere")
    there = nearest(path)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {path} cannot be written: {there} is {'read-only' if there.is_dir() else 'a file'}")
    return [file for pattern in FILES for file in path.glob(pattern)]


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


class RunFolder:
    """Writes a run's files as the run goes; every line is in the file when `log` returns.

    Args:
      path: the folder; made if it is not there. The files of an earlier run in it are removed.
      rows: go on with the run in it: keep its files, and as many lines of its metrics.
      writes: False for a process that only runs along: it touches nothing.
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
        from tensorboardX import SummaryWriter  # which imports torch, where it is installed

        next_step = kept[-1]["step"] + 1 if kept else 1
        self._board = SummaryWriter(str(path), purge_step=None if rows is None else next_step)

    def _cut(self, count: int) -> list[dict[str, Any]]:
        """Leaves the first lines of metrics.jsonl and returns them as rows."""
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
                raise ValueError(f"line {number} of {path} is not that of a training run: it was changed") from error
        replace(path, "".join(lines[:count]))
        return rows

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes config.json: `config` and what this machine adds (versions, git commit)."""
        if self.writes:
            machine = f"{platform.system()} {platform.machine()}"
            config = config | {"versions": package_versions(), "git_commit": _git_commit(), "machine": machine}
            replace(self.path / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def write_error(self, error: Exception) -> None:
        """Writes why the run has failed."""
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
        except OSError as error:  # Python's has no name of the file in it
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
    """Writes a temporary file and renames it, so that a reader meets the old file or the new one, also after a kill."""
    aside = path.with_name(f"{path.name}{ASIDE}{os.getpid()}")
    with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:  # of file names
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def lock(path: Path, wait: bool = False) -> TextIO:
    """Takes a file, which stands for a run, for this process alone, until it is closed or the process ends.

    A child that inherits the open file has it as well, and keeps it when this process ends. If another process has it
    and this one is not to wait, a ValueError is raised.
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
    """The lines of a file, without a last one that is being written or that a kill cut short."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in complete_lines(path / METRICS)]


def ends_epoch(row: Mapping[str, Any]) -> bool:
    """Whether a row holds the means of a whole epoch; the others hold those of some steps within one."""
    return "test_loss" in row or UNTESTED.keys() <= row.keys()


def read_epochs(path: Path) -> list[dict[str, Any]]:
    """Those of the rows that end an epoch that was tested; [] if there are none yet."""
    return [row for row in read_metrics(path) if "test_top1" in row] if (path / METRICS).exists() else []


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what comes out."""
    return {"python": platform.python_version()} | versions(PACKAGES)


def _git_commit() -> str | None:
    """The commit of this checkout, "-dirty" behind it where Python files differ; None outside of a checkout."""

    def git(*command: str) -> str:
        command = ("git", "-C", str(Path(__file__).parents[2]), *command)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Results that are kept in the checkout change while a study runs, and change nothing.
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_test_results(path: Path, results: dict[str, np.ndarray], split: Split) -> None:
    """Writes the results of a test, a line for each picture, as CSV with COLUMNS.

    picture is its name, or its number where it has none; label and prediction are class numbers, confidence is from 0
    to 1, top5 is 1 where the label is among the five best classes.
    """
    names = range(len(split)) if split.names is None else split.names
    confidences, losses = ([f"{value:.4f}" for value in results[name]] for name in ("confidence", "loss"))
    numbers = (split.labels, results["prediction"], confidences, results["top5"].astype(int), losses)
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *zip(names, *numbers, strict=True)])


def read_test_results(path: Path) -> dict[str, np.ndarray]:
    """The columns of a file of `write_test_results`; raises a ValueError if it is no such file."""
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
    """The metadata of a weight file; of a checkpoint of a run those that its weight file will have."""
    facts = file.settings.get("input")
    if file.metadata or not isinstance(facts, Mapping):
        return file.metadata
    return {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}


def is_of_a_run(metadata: Mapping[str, str]) -> bool:
    """Whether metadata are those of a run of this project: other programs write one of these names, or two."""
    return 2 * sum(name in metadata for name in RUN_FACTS) > len(RUN_FACTS)
