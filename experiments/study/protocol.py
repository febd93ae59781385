"""A protocol: the TOML file that says what a study runs.

    about = "What is asked, on which hardware, how long it takes, what came out."

    cores = 1                       # of each worker [default: all]; begin as many workers as there is room for

    [settings]                      # of every run, as experiments.cars has them
    arch = "resnet18"

    [tuning]                        # leave it out where nothing is searched
    trials = 8                      # of each contestant that has a search
    epochs = 15
    holdout = 0.1                   # the share of each class's training pictures that they are compared on
    seed = 0                        # of the random draws, and of the runs
    choose_by = "top1"              # of the held-out pictures, or "loss" [default: top1, of equals the lower loss]
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
    beside = { other = ["SGD"] }    # contestants of another study, in the folder beside, whose final runs are shown too

Contestants of a lower `group` (0 unless it says so) are run to their end before the next group begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from experiments.study_files import slug
from experiments.training.settings import CarsExperiment, CarsSystem, Settings, parse_settings

# What the study sets itself for each run: all that says how it is run, and these.
OURS = {field.name for field in dataclasses.fields(CarsSystem)} | {"seed", "epochs", "holdout"}
CARS_FIELDS = {field.name for field in dataclasses.fields(CarsExperiment)} | OURS


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What is compared.

    name: for people; `slug` for folders.
    labels: which value of each axis this is, by the axis's name.
    settings: of experiments.cars, by field.
    search: what is drawn for each tuning trial, by field.
    group, trials, seeds: see the module; trials and seeds are None where it has the protocol's.
    tuned_as: the contestant whose tuning found its settings, and which place they had there.
    """

    name: str
    labels: dict[str, str]
    settings: dict[str, Any]
    search: dict[str, BaseDistribution]
    group: int = 0
    trials: int | None = None
    seeds: tuple[int, ...] | None = None
    tuned_as: tuple[str, int] | None = None

    @property
    def slug(self) -> str:
        return slug(self.name)

    @property
    def is_tuned(self) -> bool:
        """Whether its final runs wait for tuning, its own or another's."""
        return bool(self.search or self.tuned_as)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Of each contestant that has a search; see the module."""

    trials: int
    epochs: int
    holdout: float
    seed: int = 0
    choose_by: str = "top1"
    sampler: str = "random"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a study runs; see the module.

    name: the file's, without .toml.
    text: the file.
    cores: of each worker, None for all; they decide about rounding.
    """

    name: str
    text: str
    about: str
    contestants: tuple[Contestant, ...]
    tuning: Tuning | None
    seeds: tuple[int, ...]
    epochs: int
    cores: int | None = None
    later_seeds: tuple[int, ...] = ()

    def trials_of(self, contestant: Contestant) -> int:
        """How many tuning trials a contestant has."""
        if not contestant.search:
            return 0
        return self.tuning.trials if contestant.trials is None else contestant.trials

    def seeds_of(self, contestant: Contestant) -> tuple[int, ...]:
        """The seeds of a contestant's final runs, the later ones last."""
        return (*self.seeds, *self.later_seeds) if contestant.seeds is None else contestant.seeds

    def tuning_of(self, contestant: Contestant) -> tuple[Contestant, int]:
        """The contestant whose tuning finds this one's settings, mostly itself, and the place of the settings."""
        name, place = contestant.tuned_as or (contestant.name, 1)
        return next(other for other in self.contestants if other.name == name), place


def read_protocol(path: Path) -> Protocol:
    """Reads a protocol and checks all that can be checked before anything is run.

    Raises:
      ValueError: it cannot be read or is no protocol; says where and why.
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
    _only(table, "the protocol", ("about", "cores", "settings", "tuning", "final", "contestants", "report"))
    for key, kind in dict(about=str, final=dict, contestants=list).items():
        if not isinstance(table.get(key), kind):
            raise ValueError(f"{key} is missing or of the wrong kind")
    common = _settings(table.get("settings", {}), "settings")
    contestants = [c for block in table["contestants"] for c in _contestants(block, common)]
    for what in ("name", "slug"):
        values = [getattr(contestant, what) for contestant in contestants]
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"two contestants have the {what} {twice[0]!r}")
    searched = {field for contestant in contestants for field in contestant.search}
    if both := searched & {axis for contestant in contestants for axis in contestant.labels}:
        raise ValueError(
            f"{min(both)} is an axis of one contestant and searched for another: trials.csv has one column"
        )
    tuning = _record(Tuning, table["tuning"], "tuning") if "tuning" in table else None
    searching = [contestant.name for contestant in contestants if contestant.search]
    if bool(searching) != (tuning is not None):
        missing = f"{searching[0]} has a search" if searching else "nothing is searched"
        raise ValueError(f"{missing}, and there is {'no' if searching else 'a'} table tuning")
    final = table["final"]
    _only(final, "final", ("seeds", "epochs", "later_seeds"))
    seeds = _seeds(final.get("seeds"), "final.seeds")
    later = _seeds(final["later_seeds"], "final.later_seeds") if "later_seeds" in final else ()
    epochs = final.get("epochs")
    if set(seeds) & set(later):
        raise ValueError(f"final.later_seeds has {min(set(seeds) & set(later))}, which final.seeds has too")
    if type(epochs) is not int or epochs < 1:
        raise ValueError(f"final.epochs must be a whole number from 1, got {epochs!r}")
    if tuning:
        _check_tuning(tuning)
    _check_report(table.get("report", {}), [contestant.name for contestant in contestants])
    cores = table.get("cores")
    if cores is not None and (type(cores) is not int or cores < 1):
        raise ValueError(f"cores must be a whole number from 1, got {cores!r}")
    protocol = Protocol(name, text, table["about"].strip(), tuple(contestants), tuning, seeds, epochs, cores, later)
    for contestant in contestants:
        if contestant.tuned_as:
            _check_tuned_as(protocol, contestant)
    for contestant in contestants:
        _check_runs(protocol, contestant)
    return protocol


def _seeds(seeds: Any, where: str) -> tuple[int, ...]:
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)):
        raise ValueError(f"{where} must be a list of whole numbers, got {seeds!r}")
    return tuple(dict.fromkeys(seeds))


def _check_tuned_as(protocol: Protocol, contestant: Contestant) -> None:
    name, place = contestant.tuned_as
    found = [other for other in protocol.contestants if other.name == name]
    if not found or not found[0].search:
        raise ValueError(f"{contestant.name}: tuned_as names {name!r}, which is no contestant with a search")
    if contestant.search:
        raise ValueError(f"{contestant.name}: a search of its own and tuned_as contradict one another")
    if place > (trials := protocol.trials_of(found[0])):
        raise ValueError(f"{contestant.name}: tuned_as asks for place {place}, and {name} has {trials} trials")


def _check_tuning(tuning: Tuning) -> None:
    for name, least in dict(trials=1, epochs=1, seed=0).items():
        if type(value := getattr(tuning, name)) is not int or value < least:
            raise ValueError(f"tuning.{name} must be a whole number from {least}, got {value!r}")
    if type(tuning.holdout) is not float or not 0 < tuning.holdout < 1:
        raise ValueError(f"tuning needs a holdout between 0 and 1, got {tuning.holdout!r}")
    if tuning.choose_by not in ("top1", "loss"):
        raise ValueError(f"tuning.choose_by must be top1 or loss, got {tuning.choose_by!r}")
    if tuning.sampler not in ("random", "sobol"):
        raise ValueError(f"tuning.sampler must be random or sobol, got {tuning.sampler!r}")


def _check_report(report: Any, names: Sequence[str]) -> None:
    if not isinstance(report, dict):
        raise ValueError(f"report must be a table, got {report!r}")
    _only(report, "report", ("compare", "targets", "beside"))
    compare, targets, beside = report.get("compare", []), report.get("targets", []), report.get("beside", {})
    lists = beside.values() if isinstance(beside, dict) else [None]
    if not all(isinstance(others, list) and all(isinstance(name, str) for name in others) for others in lists):
        raise ValueError(f"report.beside must be lists of contestants by the name of their study, got {beside!r}")
    names = [*names, *(name for others in lists for name in others)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"report.beside has a contestant with the name of another: {min(twice)!r}")
    if compare and not (isinstance(compare, list) and len(compare) == 2 and set(compare) <= set(names)):
        raise ValueError(f"report.compare must be two of {', '.join(names)}, got {compare!r}")
    if not (isinstance(targets, list) and all(isinstance(t, float) and 0 < t < 1 for t in targets)):
        raise ValueError(f"report.targets must be a list of numbers between 0 and 1, got {targets!r}")


def _contestants(block: Mapping[str, Any], common: dict[str, Any]) -> list[Contestant]:
    """All combinations of a block's axes."""
    if not isinstance(block, dict) or not isinstance(block.get("name"), str):
        raise ValueError(f"a contestant has no name: {block!r}")
    name = block["name"]
    _only(block, name, ("name", "settings", "search", "axes", "group", "trials", "seeds", "tuned_as"))
    for key, kind in dict(search=dict, axes=dict, group=int, trials=int, tuned_as=dict).items():
        if not isinstance(block.get(key, kind()), kind):
            raise ValueError(f"{name}: {key} must be a {'number' if kind is int else 'table'}, got {block[key]!r}")
    trials = block.get("trials")
    if trials is not None and (trials < 1 or "search" not in block):
        raise ValueError(f"{name}: trials must be at least 1, for a contestant with a search; got {trials}")
    seeds = _seeds(block["seeds"], f"{name}: seeds") if "seeds" in block else None
    tuned_as = _tuned_as(block["tuned_as"], name) if "tuned_as" in block else None
    settings = common | _settings(block.get("settings", {}), name)
    search = {field: _distribution(field, space, name) for field, space in block.get("search", {}).items()}
    _settings(dict.fromkeys(search), name)
    axes = {axis: _axis(axis, values, name) for axis, values in block.get("axes", {}).items()}
    contestants = []
    for labels in itertools.product(*axes.values()):
        chosen = dict(zip(axes, labels, strict=True))
        merged = settings.copy()
        for axis, label in chosen.items():
            merged |= axes[axis][label]
        full_name = ", ".join([name, *(_label(axis, label) for axis, label in chosen.items())])
        rest = (block.get("group", 0), trials, seeds, tuned_as)
        contestants.append(Contestant(full_name, chosen, merged, search, *rest))
    return contestants


def _tuned_as(table: Mapping[str, Any], name: str) -> tuple[str, int]:
    _only(table, f"{name}: tuned_as", ("contestant", "place"))
    contestant, place = table.get("contestant"), table.get("place", 1)
    if not isinstance(contestant, str) or type(place) is not int or place < 1:
        raise ValueError(f"{name}: tuned_as must have a contestant and a place from 1, got {table!r}")
    return contestant, place


def _label(axis: str, label: str) -> str:
    return f"{axis} {label}" if axis in CARS_FIELDS else label


def _axis(axis: str, values: Any, where: str) -> dict[str, dict[str, Any]]:
    """{label: settings} from the two forms that an axis may have."""
    if isinstance(values, list) and values:
        return {str(value): _settings({axis: value}, f"{where}, axis {axis}") for value in values}
    if isinstance(values, dict) and values:
        return {label: _settings(settings, f"{where}, axis {axis}") for label, settings in values.items()}
    raise ValueError(f"{where}: axis {axis} must be a list of values or a table of settings by name, got {values!r}")


def _distribution(field: str, space: Any, where: str) -> BaseDistribution:
    try:
        if isinstance(space, list) and space:
            return CategoricalDistribution(space)
        if isinstance(space, dict) and {"low", "high"} <= set(space) <= {"low", "high", "log"}:
            return FloatDistribution(**space)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: search.{field}: {error}") from error
    raise ValueError(f"{where}: search.{field} must be a list of values or have low, high and log, got {space!r}")


def _settings(settings: Any, where: str) -> dict[str, Any]:
    """Settings of experiments.cars that are not the study's own."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: settings must be a table, got {settings!r}")
    for field in settings:
        if field not in CARS_FIELDS:
            raise ValueError(f"{where}: experiments.cars has no setting {field!r}")
        if field in OURS:
            raise ValueError(f"{where}: {field} is set by the study itself")
    return dict(settings)


def _only(table: Mapping[str, Any], where: str, known: Sequence[str]) -> None:
    if unknown := set(table) - set(known):
        raise ValueError(f"{where} has {min(unknown)!r}: known are {', '.join(known)}")


def _record(kind: type, table: Any, where: str) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table, got {table!r}")
    fields = dataclasses.fields(kind)
    _only(table, where, [field.name for field in fields])
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in table:
            raise ValueError(f"{where} has no {field.name}")
    return kind(**table)


def _check_runs(protocol: Protocol, contestant: Contestant) -> None:
    """Raises a ValueError unless experiments.cars takes a contestant's settings, with each end of what is searched."""
    spaces = {
        field: space.choices if isinstance(space, CategoricalDistribution) else (space.low, space.high)
        for field, space in contestant.search.items()
    }
    first = contestant.settings | {field: values[0] for field, values in spaces.items()} | {"epochs": protocol.epochs}
    for settings in [first, *(first | {field: value} for field, values in spaces.items() for value in values[1:])]:
        check_command([*command(settings, Path(".")), *bookkeeping(settings, Path("run"))], contestant.name)


def bookkeeping(settings: Mapping[str, Any], folder: Path) -> list[str]:
    """The arguments of experiments.cars that say where a run is, and that it goes on from where it stands.

    Only JAX's can; what other frameworks left is replaced.
    """
    goes_on = settings.get("framework", "jax") == "jax"
    return [f"--out={folder}", *(("--resume", "--keep=1") if goes_on else ("--overwrite",))]


def command(settings: Mapping[str, Any], data: Path | None) -> list[str]:
    """The arguments of experiments.cars that stand for settings; `data` goes where pictures are needed."""
    arguments = []
    for field, value in settings.items():
        flag = field.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            arguments.append(f"--{flag}={value}")
    if data is not None and settings.get("preset") != "demo":
        arguments.append(f"--data={data}")
    return arguments


def check_command(arguments: list[str], where: str) -> Settings:
    """Reads the arguments as experiments.cars would.

    Raises:
      ValueError: it would refuse them.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parse_settings(arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except SystemExit as error:  # tyro's way, with a box around the reason
        words = " ".join(re.sub(r"[^\x20-\x7e]", " ", said.getvalue()).split())
        raise ValueError(f"{where}: experiments.cars does not take {' '.join(arguments)}: {words}") from error
