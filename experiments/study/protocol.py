"""A protocol: the TOML file that says what a study runs.

    about = "What is asked, on which hardware, how long it takes, what came out."

    cores = 1                       # of each worker [default: all]; start as many workers as there is room for

    [settings]                      # of every run, named as in experiments.cars
    arch = "resnet18"

    [tuning]                        # leave this out if nothing is searched
    trials = 8                      # of each contestant that has a search
    epochs = 15
    holdout = 0.1                   # the share of each class's training pictures that trials are compared on
    seed = 0                        # of the random draws, and of the runs
    choose_by = "top1"              # on the held-out pictures, or "loss" [default: top1; the lower loss breaks ties]
    sampler = "random"              # independent draws, or "sobol": draws that spread evenly [default: random]

    [final]
    seeds = [0, 1, 2, 3, 4]         # of the runs of each contestant
    epochs = 30
    later_seeds = [5, 6]            # begun when all else has ended [default: none]

    [[contestants]]
    name = "Adam"
    settings = { opt = "adam" }
    search.learning_rate = { low = 1e-4, high = 1e-2, log = true }
    search.weight_decay = [0.0, 1e-5, 1e-4]

    [[contestants]]                 # with axes: one contestant for each combination
    name = "AdaBound"
    settings = { opt = "adabound" }
    axes.final_lr = [0.01, 0.1]     # a setting and its values, or names and the settings that each stands for:
    axes.input = { raw = { normalize = false }, normalized = {} }

    [[contestants]]                 # trained at a setting that another contestant's tuning found
    name = "Adam, second setting"
    settings = { opt = "adam" }
    tuned_as = { contestant = "Adam", place = 2 }    # the second best [default: the best]
    seeds = [0]                     # in place of all of [final]'s; a contestant with a search may have trials = 4

    [report]
    compare = ["AdaBound", "Adam"]  # the two that the question is about, the second the one to beat
    targets = [0.25, 0.5]           # top-1: how soon was it reached?
    measure = "top1"                # what decides the question, or "train_loss" [default: top1]
    beside = { other = ["SGD"] }    # contestants of another study, in the folder beside, whose final runs are shown too

A contestant may have a `group` [default: 0]: runs of a lower group are begun before those of a higher one.
"""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from experiments.from_table import from_table
from experiments.study_files import slug
from experiments.training.settings import CarsExperiment, CarsSystem, settings_from

# What the study itself sets for each run: everything that says how to run it, and these fields.
OURS = {field.name for field in dataclasses.fields(CarsSystem)} | {"seed", "epochs", "holdout"}
CARS_FIELDS = {field.name for field in dataclasses.fields(CarsExperiment)} | OURS


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What is compared.

    name: for people; `slug` for folders.
    block: the name of its block in the protocol.
    labels: which value of each axis this is, by the axis's name.
    settings: of experiments.cars, by field.
    search: what is drawn for each tuning trial, by field.
    trials, seeds: how many tuning trials, and the seeds of its final runs, later seeds last.
    later: the seeds that are begun when everything else has ended.
    tuned_as: the contestant whose tuning finds its settings (itself, if it has a search), and their place there; None
      if it is not tuned.
    """

    name: str
    block: str
    labels: dict[str, str]
    settings: dict[str, Any]
    search: dict[str, BaseDistribution]
    group: int
    trials: int
    seeds: tuple[int, ...]
    later: tuple[int, ...]
    tuned_as: tuple[str, int] | None

    @property
    def slug(self) -> str:
        return slug(self.name)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The tuning of each contestant that has a search; see the module's docstring."""

    trials: int
    epochs: int
    holdout: float
    seed: int = 0
    choose_by: Literal["top1", "loss"] = "top1"
    sampler: Literal["random", "sobol"] = "random"

    def __post_init__(self):
        _at_least(1, {"tuning.trials": self.trials, "tuning.epochs": self.epochs})
        _at_least(0, {"tuning.seed": self.seed})
        if not 0 < self.holdout < 1:
            raise ValueError(f"tuning.holdout must be between 0 and 1, got {self.holdout}")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a study runs; see the module's docstring."""

    name: str  # of the file, without .toml
    text: str  # of the file
    about: str
    contestants: tuple[Contestant, ...]
    tuning: Tuning | None
    epochs: int  # of the final runs
    cores: int | None = None  # of each worker, None for all; their number affects rounding


# The tables of the file, as they are written there.


@dataclasses.dataclass(frozen=True)
class _File:
    about: str
    final: dict[str, Any]
    contestants: list[dict[str, Any]]
    cores: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    tuning: dict[str, Any] | None = None
    report: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _at_least(1, {"cores": self.cores})


@dataclasses.dataclass(frozen=True)
class _Final:
    seeds: list[int]
    epochs: int
    later_seeds: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        _at_least(1, {"final.epochs": self.epochs})
        _check_seeds([*self.seeds, *self.later_seeds], "final")
        if both := set(self.seeds) & set(self.later_seeds):
            raise ValueError(f"final.later_seeds has {min(both)}, which final.seeds has too")


@dataclasses.dataclass(frozen=True)
class _Block:
    name: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    search: dict[str, Any] = dataclasses.field(default_factory=dict)
    axes: dict[str, Any] = dataclasses.field(default_factory=dict)
    group: int = 0
    trials: int | None = None
    seeds: list[int] | None = None
    tuned_as: dict[str, Any] | None = None

    def check(self, tuning: Tuning | None) -> None:
        if self.search and tuning is None:
            raise ValueError(f"{self.name} has a search, and there is no table tuning")
        if self.trials is not None and (self.trials < 1 or not self.search):
            raise ValueError(f"{self.name}: trials must be at least 1 and needs a search; got {self.trials}")
        if self.seeds is not None:
            _check_seeds(self.seeds, self.name)
        if self.tuned_as is not None and self.search:
            raise ValueError(f"{self.name} has tuned_as and a search of its own; only one is possible")


@dataclasses.dataclass(frozen=True)
class _TunedAs:
    contestant: str
    place: int = 1


@dataclasses.dataclass(frozen=True)
class _Report:
    compare: list[str] = dataclasses.field(default_factory=list)
    targets: list[float] = dataclasses.field(default_factory=list)
    beside: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    measure: Literal["top1", "train_loss"] = "top1"

    def check(self, contestants: list[Contestant]) -> None:
        names = [contestant.name for contestant in contestants] + list(itertools.chain(*self.beside.values()))
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"report.beside has a contestant with the name of another: {min(twice)!r}")
        if self.compare and not (len(self.compare) == 2 and set(self.compare) <= set(names)):
            raise ValueError(f"report.compare must be two of {', '.join(names)}, got {self.compare}")
        if not all(0 < target < 1 for target in self.targets):
            raise ValueError(f"report.targets must be between 0 and 1, got {self.targets}")


def _at_least(least: int, values: Mapping[str, int | None]) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_seeds(seeds: list[int], where: str) -> None:
    if not seeds or min(seeds) < 0:
        raise ValueError(f"{where}: seeds must be one or more numbers from 0, got {seeds}")


def read_protocol(path: Path) -> Protocol:
    """Reads a protocol and checks everything that can be checked before a run begins.

    Raises:
      ValueError: the file cannot be read or is no protocol; the message says where and why.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    try:
        return _protocol(path.stem, text, table)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _protocol(name: str, text: str, table: Mapping[str, Any]) -> Protocol:
    file = from_table(_File, table, "the protocol")
    final = from_table(_Final, file.final, "final")
    tuning = None if file.tuning is None else from_table(Tuning, file.tuning, "tuning")
    common = _settings(file.settings, "settings")
    contestants = [c for block in file.contestants for c in _contestants(block, common, final, tuning)]
    _check_contestants(contestants)
    if tuning and not any(contestant.search for contestant in contestants):
        raise ValueError("nothing is searched, and there is a table tuning")
    from_table(_Report, file.report, "report").check(contestants)
    for contestant in contestants:
        _check_runs(contestant, final.epochs)
    return Protocol(name, text, file.about.strip(), tuple(contestants), tuning, final.epochs, file.cores)


def _contestants(
    table: dict[str, Any], common: dict[str, Any], final: _Final, tuning: Tuning | None
) -> list[Contestant]:
    """A contestant for each combination of values of a block's axes."""
    block = from_table(_Block, table, str(table.get("name", "a contestant")))
    block.check(tuning)
    name = block.name
    settings = common | _settings(block.settings, name)
    search = {field: _distribution(space, f"{name}: search.{field}") for field, space in block.search.items()}
    _settings(dict.fromkeys(search), name)
    axes = {axis: _axis(axis, values, name) for axis, values in block.axes.items()}
    trials = 0 if not search else tuning.trials if block.trials is None else block.trials
    later = final.later_seeds if block.seeds is None else []
    seeds = dict.fromkeys([*final.seeds, *later] if block.seeds is None else block.seeds)
    contestants = []
    for labels in itertools.product(*axes.values()):
        chosen, merged = dict(zip(axes, labels, strict=True)), settings.copy()
        for axis, label in chosen.items():
            merged |= axes[axis][label]
        told = [f"{axis} {label}" if axis in CARS_FIELDS else label for axis, label in chosen.items()]
        full_name = ", ".join([name, *told])
        tuned_as = (full_name, 1) if search else None
        if block.tuned_as is not None:
            tuned_as = dataclasses.astuple(from_table(_TunedAs, block.tuned_as, f"{name}: tuned_as"))
        rest = (block.group, trials, tuple(seeds), tuple(later), tuned_as)
        contestants.append(Contestant(full_name, name, chosen, merged, search, *rest))
    return contestants


def _axis(axis: str, values: Any, where: str) -> dict[str, dict[str, Any]]:
    """{label: settings} from the two forms that an axis may have."""
    if isinstance(values, list):
        values = {str(value): {axis: value} for value in values}
    if isinstance(values, dict) and values:
        return {label: _settings(settings, f"{where}, axis {axis}") for label, settings in values.items()}
    raise ValueError(f"{where}: axis {axis} must be a list of values or a table of settings by name, got {values!r}")


def _distribution(space: Any, where: str) -> BaseDistribution:
    try:
        if isinstance(space, list) and space:
            return CategoricalDistribution(space)
        if isinstance(space, dict) and {"low", "high"} <= set(space) <= {"low", "high", "log"}:
            return FloatDistribution(**space)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    raise ValueError(f"{where} must be a list of values or have low, high and log, got {space!r}")


def _settings(settings: Any, where: str) -> dict[str, Any]:
    """Returns the settings; raises for those that experiments.cars does not have or that the study sets itself."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: settings must be a table, got {settings!r}")
    for field in settings:
        if field not in CARS_FIELDS:
            raise ValueError(f"{where}: experiments.cars has no setting {field!r}")
        if field in OURS:
            raise ValueError(f"{where}: {field} is set by the study itself")
    return dict(settings)


def _check_contestants(contestants: list[Contestant]) -> None:
    for what in ("name", "slug"):
        values = [getattr(contestant, what) for contestant in contestants]
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"two contestants have the {what} {twice[0]!r}")
    searched = {field for contestant in contestants for field in contestant.search}
    if both := searched & {axis for contestant in contestants for axis in contestant.labels}:
        raise ValueError(
            f"{min(both)} is an axis of one contestant and searched for another: trials.csv has one column"
        )
    trials = {contestant.name: contestant.trials for contestant in contestants}
    for contestant in contestants:
        tuner, place = contestant.tuned_as or (None, 0)
        if tuner is not None and not trials.get(tuner):
            raise ValueError(f"{contestant.name}: tuned_as names {tuner!r}, which is no contestant with a search")
        if tuner is not None and not 1 <= place <= trials[tuner]:
            asked = f"tuned_as asks for place {place}, and {tuner} has {trials[tuner]} trials"
            raise ValueError(f"{contestant.name}: {asked}")


def _check_runs(contestant: Contestant, epochs: int) -> None:
    """Raises a ValueError unless experiments.cars takes a contestant's settings, for all ends and choices searched."""
    spaces = {
        field: space.choices if isinstance(space, CategoricalDistribution) else (space.low, space.high)
        for field, space in contestant.search.items()
    }
    first = contestant.settings | {field: values[0] for field, values in spaces.items()} | {"epochs": epochs}
    for settings in [first, *(first | {field: value} for field, values in spaces.items() for value in values[1:])]:
        try:
            settings_from(settings)
        except ValueError as error:
            raise ValueError(f"{contestant.name}: {error}") from error
