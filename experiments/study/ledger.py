"""Which runs a study has, and how far each is, from the files in the study's folder alone.

A run is done when its metrics have a tested row of its last epoch, and has failed when it left an error.txt. It is
neither as long as it has checkpoints, which the worker removes last. A worker holds the lock file beside a run's folder
while it trains; the operating system releases the lock when a worker dies, and the next worker continues the run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from pathlib import Path
from typing import Any, TextIO

from experiments.study.draws import draw
from experiments.study.protocol import Contestant, Protocol
from experiments.study_files import PROTOCOL, Stage, State
from experiments.training.run_folder import CHECKPOINTS, CONFIG, ERROR, lock, read_epochs
from experiments.training.settings import settings_from

COLUMNS = ("top1", "top5", "macro_f1", "loss", "best_top1", "best_epoch", "seconds")  # of trials.csv; fractions


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a study.

    number: of the tuning trial, or the place of the seed in the protocol.
    drawn: what the search draws for it; for a final run what tuning chose, {} until tuning has ended.
    state: "begun" is also the state of a run whose worker has died.
    rows: its metrics after tested epochs; [] unless it is done.
    """

    contestant: Contestant
    stage: Stage
    number: int
    drawn: dict[str, Any]
    seed: int
    epochs: int
    holdout: float | None
    state: State = "open"
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def folder(self) -> str:
        """Its path inside the study's folder."""
        last = f"seed-{self.seed}" if self.stage == "final" else f"tuning-{self.number:03}"
        return f"{self.contestant.slug}/{last}"

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings of experiments.cars, by field; without --out and --data."""
        settings = self.contestant.settings | self.drawn | {"seed": self.seed, "epochs": self.epochs}
        return settings if self.holdout is None else settings | {"holdout": self.holdout}

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed")

    @property
    def ready(self) -> bool:
        """Whether a worker can begin it, or resume it if its worker has died."""
        return not self.ended and (self.stage == "tuning" or self.contestant.tuned_as is None or bool(self.drawn))

    @property
    def outcome(self) -> dict[str, float]:
        """The results of a done run, by COLUMNS: after the last epoch, and of the best epoch."""
        last, best = self.rows[-1], max(self.rows, key=lambda row: row["test_top1"])
        measured = [last[f"test_{name}"] for name in ("top1", "top5", "macro_f1", "loss")]
        measured[-1] = math.nan if measured[-1] is None else measured[-1]  # JSON has no NaN
        return dict(zip(COLUMNS, (*measured, best["test_top1"], best["epoch"], last["seconds"]), strict=True))


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The runs of a protocol and their states; all workers must see the study's folder, which need not exist."""

    protocol: Protocol
    folder: Path

    def exclusive(self) -> TextIO:
        """A lock: until it is closed no other worker chooses a run or writes the study's files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return lock(self.folder / ".lock", wait=True)

    def runs(self) -> list[Run]:
        """All runs of the protocol in the order in which they are begun.

        Groups follow one another. In a group, tuning comes before final runs, and the contestants advance together,
        number by number. Runs of later seeds come after all groups.
        """
        tuning = {contestant.name: self._tuning_runs(contestant) for contestant in self.protocol.contestants}
        runs = [run for of_one in tuning.values() for run in of_one]
        for contestant in self.protocol.contestants:
            tuner, place = contestant.tuned_as or (None, 1)
            best = self._best(tuning[tuner], place) if tuner else None
            drawn = best.drawn if best else {}
            for number, seed in enumerate(contestant.seeds):
                runs.append(self.with_state(Run(contestant, "final", number, drawn, seed, self.protocol.epochs, None)))

        def place_of(run: Run) -> tuple[bool, int, bool, int]:
            is_final = run.stage == "final"
            return is_final and run.seed in run.contestant.later, run.contestant.group, is_final, run.number

        return sorted(runs, key=place_of)

    def _tuning_runs(self, contestant: Contestant) -> list[Run]:
        tuning, runs = self.protocol.tuning, []
        for number in range(contestant.trials):
            drawn = draw(contestant.search, tuning.seed, number, tuning.sampler)
            runs.append(Run(contestant, "tuning", number, drawn, tuning.seed, tuning.epochs, tuning.holdout))
        return list(map(self.with_state, runs))

    def with_state(self, run: Run) -> Run:
        """The run with its state and rows as they are now."""
        folder = self.folder / run.folder
        if not (folder / CONFIG).exists():
            return run
        if not (folder / CHECKPOINTS).exists():
            if (folder / ERROR).exists():
                return dataclasses.replace(run, state="failed")
            rows = read_epochs(folder)
            if rows and rows[-1]["epoch"] == run.epochs:
                return dataclasses.replace(run, state="done", rows=rows)
        return dataclasses.replace(run, state="begun")

    def _best(self, tuning: list[Run], place: int) -> Run | None:
        """The tuning run at this place (1 is the best) by the held-out measure that the protocol chooses by.

        None until all tuning runs have ended, or if fewer than `place` of them are done.
        """
        done = [run for run in tuning if run.state == "done"]
        if len(done) < place or not all(run.ended for run in tuning):
            return None
        by_loss = self.protocol.tuning.choose_by == "loss"

        def score(run: Run) -> tuple[float, float]:
            loss = run.outcome["loss"]
            return 0 if by_loss else run.outcome["top1"], -math.inf if math.isnan(loss) else -loss

        return sorted(done, key=score, reverse=True)[place - 1]

    def check(self) -> None:
        """Raises a ValueError if runs in the folder belong to another protocol."""
        runs = self.runs()
        configs = {file.parent.relative_to(self.folder).as_posix(): file for file in self.folder.glob(f"*/*/{CONFIG}")}
        if unknown := configs.keys() - {run.folder for run in runs}:
            raise ValueError(self._other_protocol(f"this one has no run {min(unknown)}"))
        for run in runs:
            if run.folder in configs:
                self._check_run(run, json.loads(configs[run.folder].read_text(encoding="utf-8")))
        published = self.folder / PROTOCOL
        if self.protocol.tuning and configs and published.exists():
            earlier = tomllib.loads(published.read_text(encoding="utf-8")).get("tuning", {}).get("choose_by", "top1")
            if earlier != self.protocol.tuning.choose_by:
                raise ValueError(self._other_protocol(f"tuning.choose_by was {earlier!r}"))

    def _check_run(self, run: Run, config: dict[str, Any]) -> None:
        """Raises a ValueError unless a run was trained as the protocol says."""
        if run.stage == "final" and run.contestant.tuned_as and not run.drawn:
            raise ValueError(
                f"{self.folder}: {run.contestant.name} has begun its final runs, and the protocol has tuning trials "
                "that have not ended: settings are not chosen again once test results may be known"
            )
        trained, cores = config["settings"].copy(), config.get("device", {}).get("cores")
        if trained.get("model") == "torchvision":  # before --framework torchvision existed
            trained["framework"] = "torchvision"
        wanted = dataclasses.asdict(settings_from(run.settings).experiment)
        if wanted["gamma_times_steps"]:
            del wanted["gamma"]  # follows from gamma_times_steps and the number of updates
        if None not in (cores, self.protocol.cores):
            trained["cores"], wanted["cores"] = cores, self.protocol.cores
        for name, value in wanted.items():
            if trained.get(name, value) != value:
                raise ValueError(self._other_protocol(f"{run.folder} has {name} {trained[name]!r}, this one {value!r}"))

    def _other_protocol(self, difference: str) -> str:
        return f"{self.folder} was begun with another protocol: {difference}. Choose another --out, or undo the change"

    def take(self) -> tuple[Run, TextIO] | None:
        """The next ready run that no worker trains, and its lock, held until closed; None if there is none now."""
        with self.exclusive():
            for run in self.runs():
                if run.ready and (held := self._hold(run)):
                    return run, held
        return None

    def _hold(self, run: Run) -> TextIO | None:
        path = self.folder / f"{run.folder}.lock"
        path.parent.mkdir(exist_ok=True)
        try:
            return lock(path)
        except ValueError:
            return None

    def busy(self, run: Run) -> bool:
        """Whether a worker trains this run."""
        if not (self.folder / f"{run.folder}.lock").exists():
            return False
        with self.exclusive():  # otherwise a worker that looks for a run could find this one locked
            held = self._hold(run)
            if held:
                held.close()
        return held is None
