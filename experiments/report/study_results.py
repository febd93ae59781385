"""The results of a study, from the files that it leaves: protocol.toml, trials.csv, and the runs' folders."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from experiments.report.analysis import (
    Interval,
    choice_stability,
    difference_beyond_pictures,
    mean_interval,
    paired_difference,
)
from experiments.study_files import PROTOCOL, TRIALS, Stage, State
from experiments.training.run_folder import CONFIG, METRICS, TEST_RESULTS, read_metrics, read_test_results

ACCURACIES = ("top1", "best_top1", "top5", "macro_f1")
CONFIG_PARTS = ("settings", "data", "input", "device", "versions", "git_commit")
ROUNDING = 1e-5  # of the numbers in trials.csv
KNOWN_COLUMNS = {"contestant", "stage", "number", "state", "seed", "epochs", "folder", "command"}


@dataclasses.dataclass(frozen=True)
class Trial:
    """A line of trials.csv, and the run behind it.

    columns: the line, without its empty cells.
    folder: of the run.
    """

    columns: dict[str, str]
    folder: Path

    @property
    def stage(self) -> str:
        return self.columns["stage"]

    @property
    def state(self) -> str:
        return self.columns["state"]

    @property
    def seed(self) -> int:
        return int(self.columns["seed"])

    def number(self, column: str) -> float:
        return float(self.columns[column])

    def accuracy(self, column: str = "top1") -> float:
        """One of ACCURACIES; 0 for a failed training."""
        return 0.0 if self.state == "failed" else self.number(column)

    @functools.cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """The last row of each whole epoch in its metrics; rows of untested epochs have no test_top1."""
        try:
            rows = {row["epoch"]: row for row in read_metrics(self.folder) if float(row["epoch"]).is_integer()}
            last = list(rows.values())[-1]
            if self.state == "done" and abs(last["test_top1"] - self.accuracy()) > ROUNDING:
                raise ValueError(f"it ends with a top-1 of {last['test_top1']}, {TRIALS} has {self.accuracy()}")
        except (OSError, IndexError, KeyError):
            raise ValueError(f"{self.folder / METRICS} is missing, or its last epoch was not tested") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.folder / METRICS} is damaged: {error}") from error
        return list(rows.values())

    @property
    def opt(self) -> str:
        return self.config["settings"]["opt"]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The parts of its config.json that CONFIG_PARTS names."""
        try:
            config = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
            return {name: config[name] for name in CONFIG_PARTS}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / CONFIG} is damaged: {error}") from error

    @functools.cached_property
    def test_results(self) -> dict[str, np.ndarray]:
        """See `experiments.training.run_folder.read_test_results`; {} without that file."""
        path = self.folder / TEST_RESULTS
        return read_test_results(path) if path.exists() else {}

    @property
    def right(self) -> np.ndarray:
        """Whether each test picture was classified correctly, (N,) booleans."""
        return self.test_results["label"] == self.test_results["prediction"]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What was compared: a block of the protocol, or one combination of the block's axes, with its trials.

    block: the name of the block, which all combinations of its axes share.
    colour: matplotlib's, the same in all pictures of a study.
    beside: whether it belongs to another study.
    """

    name: str
    block: str
    labels: dict[str, str]
    colour: str
    beside: bool = False
    tuning: list[Trial] = dataclasses.field(default_factory=list)
    final: list[Trial] = dataclasses.field(default_factory=list)

    @property
    def finals(self) -> list[Trial]:
        """Final runs that reached their end."""
        return [trial for trial in self.final if trial.state == "done"]

    @property
    def ended_tuning(self) -> list[Trial]:
        """Tuning trials that reached their end or failed."""
        return [trial for trial in self.tuning if trial.state in ("done", "failed")]

    @property
    def failed(self) -> list[Trial]:
        """Final runs that failed, as they would again."""
        return [trial for trial in self.final if trial.state == "failed"]

    @property
    def opt(self) -> str | None:
        """The optimizer of its final runs; None if none has reached its end."""
        return self.finals[0].opt if self.finals else None

    def by_seed(self, column: str = "top1") -> dict[int, float]:
        """One of ACCURACIES, of all final runs that have ended or failed."""
        return {trial.seed: trial.accuracy(column) for trial in (*self.failed, *self.finals)}

    def interval(self, column: str = "top1") -> Interval:
        return mean_interval(list(self.by_seed(column).values()))

    def curve(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs (E,) and the column of each final run (S, E), up to the last epoch that all have."""
        rows = [[row for row in trial.epochs if column in row] for trial in self.finals]
        length = min((len(of_run) for of_run in rows), default=0)
        if not length:
            return np.empty(0), np.empty((0, 0))
        epochs = np.array([row["epoch"] for row in rows[0][:length]])
        return epochs, np.array([[row[column] for row in of_run[:length]] for of_run in rows], float)

    def right(self) -> dict[int, np.ndarray]:
        """By seed whether each test picture was classified correctly, (N,) booleans; {} if unknown for some run."""
        if not all(trial.test_results for trial in self.finals):
            return {}
        right = {trial.seed: trial.right for trial in self.finals}
        return right | {trial.seed: np.zeros_like(next(iter(right.values()))) for trial in self.failed if right}


@dataclasses.dataclass(frozen=True)
class StudyResults:
    """The results of a study.

    name, about: the study's name, and `about` of its protocol.
    contestants: its own, then those of other studies that it is shown beside.
    compared: the names of the two contestants that its question is about, the second the one to beat; () for none.
    targets: values of top-1; the report says how soon they were reached.
    searched: the settings that tuning draws, and whether each is a choice (or a number from a range).
    chosen_by_loss: whether tuning chose by the loss on held-out pictures, not by top-1.
    absent: the studies that it should be shown beside and that are missing.
    measure: what decides its question, "top1" or "train_loss", after the last epoch.
    """

    name: str
    about: str
    contestants: list[Contestant]
    compared: tuple[str, ...]
    targets: tuple[float, ...]
    searched: dict[str, bool]
    chosen_by_loss: bool = False
    absent: tuple[str, ...] = ()
    measure: str = "top1"

    @property
    def trials(self) -> list[Trial]:
        """Its own runs, without those of other studies."""
        own = [contestant for contestant in self.contestants if not contestant.beside]
        return [trial for contestant in own for trial in (*contestant.tuning, *contestant.final)]

    @property
    def pictures(self) -> int:
        """How many pictures its first ended run was trained on; 0 if none has ended."""
        return next((t.config["data"].get("train_used", 0) for t in self.trials if t.state == "done"), 0)

    @property
    def seeds(self) -> int:
        """The largest number of seeds whose final runs have ended for one contestant."""
        return max((len(contestant.by_seed()) for contestant in self.contestants), default=0)

    @property
    def title(self) -> str:
        """The data and the network, as its runs call them; its name if none has reached its end."""
        configs = [trial.config for contestant in self.contestants for trial in contestant.finals]
        if not configs:
            return self.name
        height, width = configs[0]["input"]["image_size"]
        grey = "grey " if configs[0]["input"]["grey"] else ""
        networks = dict.fromkeys(config["input"]["arch"] for config in configs)
        return f"{configs[0]['data']['title']}, {grey}{height}x{width}, {', '.join(networks)}"

    @property
    def heading(self) -> str:
        """Its name, data and network, and how many of its runs have ended if some have not."""
        ended = sum(trial.state in ("done", "failed") for trial in self.trials)
        part = "" if ended == len(self.trials) else f" ({ended} of {len(self.trials)} runs)"
        return f"{self.name}{'' if self.title == self.name else f': {self.title}'}{part}"

    def find(self, name: str) -> Contestant:
        return next(contestant for contestant in self.contestants if contestant.name == name)

    def chosen_again(self, contestant: Contestant) -> float | None:
        """How often `choice_stability` would have chosen the same setting; None where that is not known."""
        ended = [trial for trial in contestant.tuning if trial.state == "done" and trial.test_results]
        if len(ended) < 2 or not contestant.final:
            return None
        right = np.stack([trial.right for trial in ended])
        losses = np.stack([trial.test_results["loss"] for trial in ended])
        final = contestant.final[0].columns
        same = [all(trial.columns.get(field) == final.get(field) for field in self.searched) for trial in ended]
        return float(choice_stability(right, losses, by_loss=self.chosen_by_loss)[same].sum())

    @functools.cached_property
    def answers(self) -> dict[str, tuple[Interval, Interval | None]]:
        """By name: each other contestant `against` the one to beat."""
        if not self.compared or not (theirs := self.find(self.compared[1])).by_seed():
            return {}
        return {c.name: against(c, theirs) for c in self.contestants if c is not theirs and c.by_seed()}


def against(ours: Contestant, theirs: Contestant) -> tuple[Interval, Interval | None]:
    """The difference of final top-1: over seeds, and over seeds and test pictures (None without predictions)."""
    difference = paired_difference(ours.by_seed(), theirs.by_seed())
    our_right, their_right = ours.right(), theirs.right()
    both = sorted(set(our_right) & set(their_right))
    if len(both) < 2:
        return difference, None
    right = [np.stack([of_seed[seed] for seed in both]) for of_seed in (our_right, their_right)]
    return difference, difference_beyond_pictures(*right)


def read_study(folder: Path) -> StudyResults:
    """Reads a study's folder, and from the folders beside it the contestants that it is shown with.

    Raises:
      ValueError: the folder holds no study, or a file in it is damaged; the message says which.
    """
    protocol, columns, found = _read(folder)
    spaces = [item for block in protocol["contestants"] for item in block.get("search", {}).items()]
    chosen = {field: isinstance(space, list) for field, space in spaces}
    report = protocol.get("report", {})
    beside = report.get("beside", {})
    absent = [other for other in beside if not (folder.parent / other / TRIALS).exists()]
    for other, names in ((other, beside[other]) for other in beside if other not in absent):
        _, _, theirs = _read(folder.parent / other)
        for name in names:
            if name not in theirs:
                raise ValueError(f"{folder} is to be shown beside {name} of {other}, which has no such contestant")
            found[name] = dataclasses.replace(theirs[name], tuning=[], colour=f"C{len(found)}", beside=True)
    compared = tuple(report.get("compare", ()))
    return StudyResults(
        folder.name,
        protocol["about"].strip(),
        list(found.values()),
        compared if found.keys() >= set(compared) else (),
        tuple(report.get("targets", ())),
        {column: chosen[column] for column in columns if column in chosen},
        protocol.get("tuning", {}).get("choose_by") == "loss",
        tuple(absent),
        report.get("measure", "top1"),
    )


def _read(folder: Path) -> tuple[dict[str, Any], Sequence[str], dict[str, Contestant]]:
    """A study's protocol, the columns of its trials.csv, and its own contestants by name."""
    reading = PROTOCOL
    try:
        protocol = tomllib.loads((folder / PROTOCOL).read_text(encoding="utf-8"))
        reading = TRIALS
        with open(folder / TRIALS, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"{folder} holds no study: {error.strerror}: {error.filename}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{folder / reading} is damaged: {error}") from error
    if missing := {"about", "contestants", "final"} - protocol.keys():
        raise ValueError(f"{folder / PROTOCOL} is damaged: {min(missing)} is missing")
    known = KNOWN_COLUMNS.union(*(block.get("axes", {}) for block in protocol["contestants"]))
    if not lines or not lines[0].keys() >= known:
        raise ValueError(f"{folder / TRIALS} is not that of a study, or empty")
    if len(lines) < (runs := _count_runs(protocol)):
        raise ValueError(f"{folder / TRIALS} has {len(lines)} runs, and {PROTOCOL} beside it {runs}")
    axes = {block["name"]: list(block.get("axes", {})) for block in protocol["contestants"]}
    found: dict[str, Contestant] = {}
    for number, line in enumerate(lines, 2):
        try:
            _check_line(line)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / TRIALS}, line {number}, is damaged: {error}") from error
        name = line["contestant"]
        # An older trials.csv has no column for the block: take the longest one that the name begins with.
        block = line.get("block") or max((b for b in axes if name.startswith(f"{b}, ")), key=len, default=name)
        labels = {axis: line[axis] for axis in axes.get(block, ())}
        contestant = found.setdefault(name, Contestant(name, block, labels, f"C{len(found)}"))
        columns = {column: text for column, text in line.items() if text}
        getattr(contestant, line["stage"]).append(Trial(columns, folder / line["folder"]))
    return protocol, list(lines[0]), found


def _count_runs(protocol: Mapping[str, Any]) -> int:
    """How many runs a protocol has, tuning and final ones."""
    total = 0
    for block in protocol["contestants"]:
        tuning = block.get("trials", protocol["tuning"]["trials"]) if block.get("search") else 0
        combinations = math.prod(len(values) for values in block.get("axes", {}).values())
        final = protocol["final"]
        seeds = block.get("seeds", [*final["seeds"], *final.get("later_seeds", [])])
        total += combinations * (tuning + len(set(seeds)))
    return total


def _check_line(line: Mapping[str, str | None]) -> None:
    """Raises a ValueError or TypeError for a line of trials.csv that no study wrote."""
    if None in line or None in line.values():
        raise ValueError("it has another number of columns than the first")
    for column, kind in (("stage", Stage), ("state", State)):
        if line[column] not in (values := get_args(kind)):
            raise ValueError(f"{column} {line[column]!r} is none of {', '.join(values)}")
    int(line["seed"])
    if line["state"] == "done":
        for column in ACCURACIES:
            if not 0 <= float(line[column]) <= 1:
                raise ValueError(f"{column} is {line[column]}, not between 0 and 1")


def find_studies(folder: Path) -> Sequence[Path]:
    """The folders of studies in a folder, itself included, by name.

    Raises:
      ValueError: there is none.
    """
    found = [path.parent for path in (folder / TRIALS, *sorted(folder.glob(f"*/{TRIALS}"))) if path.exists()]
    if not found:
        raise ValueError(f"{folder} holds no study: neither it nor a folder inside has a {TRIALS}")
    return found
