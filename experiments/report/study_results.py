"""The results of a study, from the files that it leaves: protocol.toml, trials.csv, and the runs' folders."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.analysis import Interval, bootstrap_difference, mean_interval, paired_difference
from experiments.metrics import read_test_results
from experiments.run_folder import CONFIG, METRICS, TEST_RESULTS, read_epochs
from experiments.study import PROTOCOL, TRIALS

KNOWN_COLUMNS = {"contestant", "stage", "number", "state", "seed", "epochs", "folder", "command"}


@dataclasses.dataclass(frozen=True)
class Trial:
    """A line of trials.csv, and the run behind it.

    columns: the line, without what was not measured.
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

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Those of its metrics that end an epoch."""
        try:
            return read_epochs(self.folder)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.folder / METRICS} is damaged: {error}") from error

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its settings, data and input."""
        try:
            config = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
            return {name: config[name] for name in ("settings", "data", "input")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / CONFIG} is damaged: {error}") from error

    @functools.cached_property
    def test_results(self) -> dict[str, np.ndarray]:
        """See `experiments.metrics.read_test_results`."""
        return read_test_results(self.folder / TEST_RESULTS)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What was compared: its trials, those of one axis value each where it has axes."""

    name: str
    labels: dict[str, str]
    tuning: list[Trial]
    final: list[Trial]

    @property
    def finals(self) -> list[Trial]:
        """Those that reached their end."""
        return [trial for trial in self.final if trial.state == "done"]

    def by_seed(self, column: str = "top1") -> dict[int, float]:
        """A column of the final runs that reached their end."""
        return {trial.seed: trial.number(column) for trial in self.finals}

    def interval(self, column: str = "top1") -> Interval:
        return mean_interval(list(self.by_seed(column).values()))

    def curve(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Epochs (E,) and the column of each final run (S, E), as far as all have it."""
        rows = [[row for row in trial.rows if column in row] for trial in self.finals]
        length = min((len(of_run) for of_run in rows), default=0)
        if not length:
            return np.empty(0), np.empty((0, 0))
        epochs = np.array([row["epoch"] for row in rows[0][:length]])
        return epochs, np.array([[row[column] for row in of_run[:length]] for of_run in rows], float)

    def right(self) -> dict[int, np.ndarray]:
        """By seed whether each test picture was named rightly, (N,) booleans."""
        results = {trial.seed: trial.test_results for trial in self.finals}
        return {seed: result["label"] == result["prediction"] for seed, result in results.items()}


@dataclasses.dataclass(frozen=True)
class StudyResults:
    """A study.

    name, about: of its protocol.
    compared: the names of the two contestants that its question is about, the second the one to beat; () for none.
    targets: top-1 whose reaching is told.
    searched: the settings that tuning draws.
    """

    name: str
    about: str
    contestants: list[Contestant]
    compared: tuple[str, ...]
    targets: tuple[float, ...]
    searched: tuple[str, ...]
    folder: Path

    @property
    def trials(self) -> list[Trial]:
        return [trial for contestant in self.contestants for trial in (*contestant.tuning, *contestant.final)]

    @property
    def title(self) -> str:
        """The data and the network, as its runs call them; one at least must have reached its end."""
        config = next(trial.config for c in self.contestants for trial in c.finals)
        height, width = config["input"]["image_size"]
        grey = "grey " if config["input"]["grey"] else ""
        return f"{config['data']['title']}, {grey}{height}x{width}, {config['input']['arch']}"

    def find(self, name: str) -> Contestant:
        return next(contestant for contestant in self.contestants if contestant.name == name)

    @functools.cached_property
    def answers(self) -> dict[str, tuple[Interval, Interval | None]]:
        """What is said of each other contestant against the one to beat, by name: see `against`."""
        if not self.compared or not (theirs := self.find(self.compared[1])).finals:
            return {}
        return {c.name: against(c, theirs) for c in self.contestants if c is not theirs and c.finals}


def against(ours: Contestant, theirs: Contestant) -> tuple[Interval, Interval | None]:
    """The difference of final top-1: over seeds, and over seeds and test pictures (None without predictions)."""
    difference = paired_difference(ours.by_seed(), theirs.by_seed())
    both = sorted(set(ours.by_seed()) & set(theirs.by_seed()))
    if len(both) < 2 or not all((trial.folder / TEST_RESULTS).exists() for trial in (*ours.finals, *theirs.finals)):
        return difference, None
    our_right, their_right = ours.right(), theirs.right()
    right = [np.stack([of_seed[seed] for seed in both]) for of_seed in (our_right, their_right)]
    return difference, bootstrap_difference(*right)


def read_study(folder: Path) -> StudyResults:
    """Reads a study's folder.

    Raises:
      ValueError: it is none, or a file in it is damaged; says which.
    """
    try:
        with open(folder / PROTOCOL, "rb") as file:
            protocol = tomllib.load(file)
        with open(folder / TRIALS, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"{folder} holds no study: {error.strerror}: {error.filename}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / PROTOCOL} is damaged: {error}") from error
    if not lines or not set(lines[0]) >= KNOWN_COLUMNS:
        raise ValueError(f"{folder / TRIALS} is not that of a study, or empty")
    labelled = {axis for block in protocol["contestants"] for axis in block.get("axes", {})}
    found: dict[str, Contestant] = {}
    for line in lines:
        name = line["contestant"]
        labels = {axis: line[axis] for axis in labelled if line.get(axis)}
        contestant = found.setdefault(name, Contestant(name, labels, [], []))
        columns = {column: text for column, text in line.items() if text}
        getattr(contestant, line["stage"]).append(Trial(columns, folder / line["folder"]))
    drawn = {field for block in protocol["contestants"] for field in block.get("search", {})}
    report = protocol.get("report", {})
    compared = tuple(name for name in report.get("compare", ()) if name in found)
    return StudyResults(
        folder.name,
        protocol["about"].strip(),
        list(found.values()),
        compared if len(compared) == 2 else (),
        tuple(report.get("targets", ())),
        tuple(column for column in lines[0] if column in drawn),
        folder,
    )


def find_studies(folder: Path) -> Sequence[Path]:
    """The folders of studies in a folder, itself included, those first that the protocols' names put first.

    Raises:
      ValueError: there is none.
    """
    found = [path.parent for path in (folder / TRIALS, *sorted(folder.glob(f"*/{TRIALS}"))) if path.exists()]
    if not found:
        raise ValueError(f"{folder} holds no study: neither {TRIALS} nor folders with one")
    order = ["cars96", "cars64_small", "origins", "sensitivity"]
    return sorted(found, key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))
