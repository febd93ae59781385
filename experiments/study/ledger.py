"""Which runs a study has, and how far each is: kept by Optuna, in a journal file beside the runs or in a database.

Each contestant has up to two of Optuna's studies: NAME/SLUG/tuning and NAME/SLUG/final. The number of a trial says
which run it is, so what is drawn for a tuning trial follows from the protocol's seed and its number alone, whoever runs
it. A run belongs to the worker that holds the lock beside its folder; the operating system gives the lock back when a
worker dies, and the next one goes on with the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from scipy.stats.qmc import Sobol

from experiments.study.protocol import Contestant, Protocol
from experiments.study_files import PROTOCOL, Stage, State
from experiments.training.run_folder import METRICS, lock, read_epochs

JOURNAL = "journal.log"
MOST_SEARCHED = 8  # fields of a contestant's search, where a Sobol sequence draws them
STATES: dict[TrialState, State] = {
    TrialState.WAITING: "open",
    TrialState.RUNNING: "begun",
    TrialState.COMPLETE: "done",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "failed",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a study.

    number: of the tuning trial, or the place of the seed in the protocol.
    drawn: what the search gave it; of a final run, what won.
    state: "begun" is also that of a run whose worker has died.
    """

    contestant: Contestant
    stage: Stage
    number: int
    drawn: dict[str, Any]
    seed: int
    epochs: int
    holdout: float | None
    state: State

    @property
    def folder(self) -> str:
        """Where it is, in the study's folder."""
        last = f"seed-{self.seed}" if self.stage == "final" else f"tuning-{self.number:03}"
        return f"{self.contestant.slug}/{last}"

    @property
    def settings(self) -> dict[str, Any]:
        """Of experiments.cars, by field; without its folder."""
        settings = self.contestant.settings | self.drawn | {"seed": self.seed, "epochs": self.epochs}
        return settings if self.holdout is None else settings | {"holdout": self.holdout}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run reached; all but the loss, the epoch and the seconds are fractions from 0 to 1."""

    top1: float
    top5: float
    macro_f1: float
    loss: float
    best_top1: float
    best_epoch: float
    seconds: float


def outcome_of(rows: list[dict[str, Any]]) -> Outcome:
    """What the last epoch reached, and the best."""
    last, best = rows[-1], max(rows, key=lambda row: row["test_top1"])
    loss = math.nan if last["test_loss"] is None else last["test_loss"]  # JSON has no NaN
    measured = [last[name] for name in ("test_top1", "test_top5", "test_macro_f1")]
    return Outcome(*measured, loss, best["test_top1"], best["epoch"], last["seconds"])


class Ledger:
    """The runs of a protocol and their states.

    Args:
      protocol: what is to be run.
      folder: of the study; made if it is not there. All workers must see it.
      url: of Optuna's database; None for a journal file in the folder.

    Raises:
      ValueError: the database cannot be used.
    """

    def __init__(self, protocol: Protocol, folder: Path, url: str | None = None):
        self.protocol, self.folder = protocol, folder
        folder.mkdir(parents=True, exist_ok=True)
        with self.exclusive():
            self._storage = _open_storage(folder, url)
        self._studies: dict[str, optuna.Study] = {}

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within it no other worker chooses or records."""
        with open(self.folder / ".lock", "a") as file:
            with contextlib.suppress(ImportError):  # not on Windows
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def runs(self) -> list[Run]:
        """All runs of the protocol in the order in which they are begun.

        By group; within it tuning before final runs, and number by number, so that all contestants are equally far at
        any time; runs of later seeds after all groups. Final runs of a contestant that is still being tuned are among
        them, with nothing drawn yet.
        """
        runs, later = [], set(self.protocol.later_seeds)
        for group in sorted({contestant.group for contestant in self.protocol.contestants}):
            contestants = [c for c in self.protocol.contestants if c.group == group]
            of_each = [self._runs_of(contestant) for contestant in contestants]
            for stage in range(2):
                most = max(len(stages[stage]) for stages in of_each)
                runs += [
                    stages[stage][number] for number in range(most) for stages in of_each if number < len(stages[stage])
                ]
        return sorted(runs, key=lambda run: run.stage == "final" and run.contestant.seeds is None and run.seed in later)

    def _runs_of(self, contestant: Contestant) -> tuple[list[Run], list[Run]]:
        final, protocol = [], self.protocol
        tuner, place = protocol.tuning_of(contestant)
        best = self.best(self._tuning_runs(tuner), place)
        trials = self._trials(contestant, "final")
        for number, seed in enumerate(protocol.seeds_of(contestant)):
            state, _ = trials.get(number, ("open", {}))
            drawn = best.drawn if best else {}
            final.append(Run(contestant, "final", number, drawn, seed, protocol.epochs, None, state))
        return self._tuning_runs(contestant), final

    def _tuning_runs(self, contestant: Contestant) -> list[Run]:
        if not contestant.search:
            return []
        protocol, trials = self.protocol, self._trials(contestant, "tuning")
        settings = (protocol.tuning.seed, protocol.tuning.epochs, protocol.tuning.holdout)
        runs = []
        for number in range(protocol.trials_of(contestant)):
            state, drawn = trials.get(number, ("open", {}))
            runs.append(Run(contestant, "tuning", number, drawn, *settings, state))
        return runs

    def publish_protocol(self) -> None:
        """Leaves the protocol's file beside what came of it."""
        self._studies_of_all()
        replace(self.folder / PROTOCOL, self.protocol.text)

    def _studies_of_all(self) -> None:
        """Raises a ValueError if the study was begun with another protocol."""
        for contestant in self.protocol.contestants:
            for stage in ("tuning", "final") if contestant.search else ("final",):
                self._study(contestant, stage)
            if contestant.search and self._trials(contestant, "final"):
                tried, wanted = len(self._trials(contestant, "tuning")), self.protocol.trials_of(contestant)
                if tried != wanted:
                    raise ValueError(
                        f"{self.folder}: {contestant.name} has begun its final runs after {tried} tuning trials, and "
                        f"the protocol has {wanted}: settings are not chosen again once test results may be known"
                    )

    def best(self, tuning: list[Run], place: int = 1) -> Run | None:
        """The tuning run at a place on held-out pictures, by what the protocol chooses by.

        None unless all have ended, and as many of them well.
        """
        if any(run.state in ("open", "begun") for run in tuning):
            return None
        outcomes = {run.number: outcome_of(self.rows(run)) for run in tuning if run.state == "done"}
        if len(outcomes) < place:
            return None
        losses = {number: math.inf if math.isnan(of.loss) else of.loss for number, of in outcomes.items()}
        by_loss = self.protocol.tuning.choose_by == "loss"
        score = {number: (0 if by_loss else of.top1, -losses[number]) for number, of in outcomes.items()}
        return tuning[sorted(score, key=score.get, reverse=True)[place - 1]]

    def rows(self, run: Run) -> list[dict[str, Any]]:
        """The rows of a run's metrics that end an epoch.

        Raises:
          ValueError: the run has ended, and its files are gone.
        """
        rows = read_epochs(self.folder / run.folder)
        if run.state == "done" and not rows:
            raise ValueError(f"{self.folder / run.folder} has no {METRICS}, and the run in it has ended: put it back")
        return rows

    def ready(self, run: Run) -> bool:
        """Whether a run can be begun, or gone on with if its worker has died."""
        if run.state not in ("open", "begun"):
            return False
        return run.stage == "tuning" or not run.contestant.is_tuned or bool(run.drawn)

    def take(self) -> tuple[Run, TextIO] | None:
        """The next run that nobody is at, and its lock, which is held until it is closed; None if there is none now."""
        with self.exclusive():
            for run in self.runs():
                if self.ready(run) and (held := self._hold(run)):
                    return (self._begin(run) if run.state == "open" else run), held
        return None

    def _hold(self, run: Run) -> TextIO | None:
        path = self.folder / f"{run.folder}.lock"
        path.parent.mkdir(exist_ok=True)
        try:
            return lock(path)
        except ValueError:
            return None

    def busy(self, run: Run) -> bool:
        """Whether a worker is at it."""
        if run.state != "begun":
            return False
        with self.exclusive():  # or a worker that looks for its next run would find this one held
            held = self._hold(run)
            if held:
                held.close()
        return held is None

    def _begin(self, run: Run) -> Run:
        study, search = self._study(run.contestant, run.stage), {}
        if run.stage == "tuning":
            study.sampler, search = self._sampler(run), run.contestant.search
        facts = self._facts(run.contestant, run.stage)
        if study.user_attrs["protocol"] != facts:  # seeds were added: now they are begun, and may change no more
            study.set_user_attr("protocol", facts)
        trial = study.ask(search)
        if trial.number != run.number:
            raise ValueError(f"another worker on {study.study_name} does not see {self.folder}: all must share it")
        return dataclasses.replace(run, drawn=trial.params if search else run.drawn, state="begun")

    def _sampler(self, run: Run) -> BaseSampler:
        """Draws the same point of the unit cube for trial n of every contestant."""
        tuning = self.protocol.tuning
        seed = np.random.SeedSequence([tuning.seed, run.number]).generate_state(1)[0]
        sampler = RandomSampler(seed=int(seed))
        if tuning.sampler == "random":
            return sampler
        return PartialFixedSampler(sobol_draw(run.contestant.search, tuning.seed, run.number), sampler)

    def end(self, run: Run, *, failed: bool = False) -> None:
        """Records that a run has reached its end, or never will."""
        study = self._study(run.contestant, run.stage)
        with self.exclusive():
            if failed:
                study.tell(run.number, state=TrialState.FAIL)
            else:
                study.tell(run.number, outcome_of(read_epochs(self.folder / run.folder)).top1)

    def _trials(self, contestant: Contestant, stage: Stage) -> dict[int, tuple[State, dict[str, Any]]]:
        return {
            trial.number: (STATES[trial.state], trial.params)
            for trial in self._study(contestant, stage).get_trials(deepcopy=False)
        }

    def _study(self, contestant: Contestant, stage: Stage) -> optuna.Study:
        name = f"{self.protocol.name}/{contestant.slug}/{stage}"
        if name not in self._studies:
            try:  # to create it again would add a line to the journal each time that somebody looks
                study = optuna.load_study(study_name=name, storage=self._storage)
            except KeyError:
                study = optuna.create_study(
                    study_name=name, storage=self._storage, direction="maximize", load_if_exists=True
                )
            facts = self._facts(contestant, stage)
            if "protocol" not in study.user_attrs:
                study.set_user_attr("protocol", facts)
            elif different := ", ".join(_different(study.user_attrs["protocol"], facts)):
                raise ValueError(
                    f"{self.folder} was begun with another protocol: {different} of {contestant.name} differ. "
                    "Choose another --out, or take the change back"
                )
            self._studies[name] = study
        return self._studies[name]

    def _facts(self, contestant: Contestant, stage: Stage) -> dict[str, Any]:
        """What may not change once runs have begun; more seeds may come, and until the final runs more trials."""
        protocol = self.protocol
        facts: dict[str, Any] = {"settings": contestant.settings, "cores": protocol.cores}
        if stage == "final":
            tuned_as = {"tuned_as": list(contestant.tuned_as)} if contestant.tuned_as else {}
            return facts | tuned_as | {"epochs": protocol.epochs, "seeds": list(protocol.seeds_of(contestant))}
        search = {field: distribution_to_json(space) for field, space in contestant.search.items()}
        return facts | {
            "search": search,
            "epochs": protocol.tuning.epochs,
            "holdout": protocol.tuning.holdout,
            "seed": protocol.tuning.seed,
            "choose_by": protocol.tuning.choose_by,
            "sampler": protocol.tuning.sampler,
        }


def sobol_draw(search: Mapping[str, BaseDistribution], seed: int, number: int) -> dict[str, Any]:
    """Point `number` of a scrambled Sobol sequence: every power of two of them fills each range evenly.

    A field's coordinate is its place in the search, so that contestants whose searches begin alike draw alike.
    """
    point = Sobol(MOST_SEARCHED, rng=seed).random(2 ** (number + 1).bit_length())[number]
    drawn = {}
    for (field, space), share in zip(search.items(), point, strict=False):
        if isinstance(space, CategoricalDistribution):
            drawn[field] = space.choices[int(share * len(space.choices))]
        elif space.log:
            drawn[field] = float(space.low * (space.high / space.low) ** share)
        else:
            drawn[field] = float(space.low + (space.high - space.low) * share)
    return drawn


def replace(path: Path, text: str) -> None:
    """Writes a file that other workers may be reading or writing: they meet the old one or the new one."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _different(earlier: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """In which facts a protocol is another one; seeds may have been added."""
    earlier = {"choose_by": "top1", "sampler": "random"} | earlier  # which were the only ways once, and not recorded
    seeds = facts.get("seeds", [])[: len(earlier.get("seeds", []))]
    return [key for key, value in facts.items() if earlier.get(key) != (seeds if key == "seeds" else value)]


def _open_storage(folder: Path, url: str | None) -> BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is not None:
        try:
            return get_storage(url)
        except Exception as error:  # SQLAlchemy's, or of the database's own driver
            raise ValueError(f"--storage {url} cannot be used: {str(error).splitlines()[0]}") from error
    path = folder / JOURNAL
    _cut_half_line(path)
    return JournalStorage(JournalFileBackend(str(path)))


def _cut_half_line(path: Path) -> None:
    """A worker killed, or a disk full, in the middle of a line: Optuna could read no further."""
    if not path.exists():
        return
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)
            os.fsync(file.fileno())
