"""A training run around its loop, the same for all programs: folder, report, last words, exit code."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.data.check import format_findings
from experiments.data.dataset import Dataset
from experiments.frameworks.common import State, Training
from experiments.frameworks.experiment import BOUNDED, Experiment
from experiments.machine import give_back_freed_memory
from experiments.training import step_sizes
from experiments.training.loop import DivergedError, Loop, Results, count_steps
from experiments.training.meter import Profile
from experiments.training.plots import plot_curves, plot_layer_steps, plot_predictions
from experiments.training.preflight import check_data, disk_findings, measure_memory, memory_findings
from experiments.training.processes import is_first
from experiments.training.run_folder import (
    AVERAGED_WEIGHTS,
    CONFIG,
    CURVES,
    ERROR,
    PREDICTIONS,
    PROFILE,
    REPORTED,
    STEP_SIZES,
    TEST_RESULTS,
    WEIGHTS,
    RunFolder,
    read_epochs,
    read_metrics,
    write_test_results,
)
from experiments.training.saving import Progress, Saver, refuse_other_processes, refuse_other_run, restore_run
from experiments.training.settings import RunSettings
from jax_resnet.weights import write_arrays

PICTURES_SHOWN = 24


@dataclasses.dataclass(frozen=True)
class Report:
    """Writes what a run leaves beside its metrics and checkpoints.

    path: the run's folder.
    title: what was trained on what.
    experiment, dataset, training: of the run.
    description: see `prepare.describe_input`.
    """

    path: Path
    title: str
    experiment: Experiment
    dataset: Dataset
    training: Training
    description: dict[str, Any]

    def observe(self, state: State) -> dict[str, float]:
        """The sizes of the steps that the weights get, for an epoch's row; none where the experiment has no bounds."""
        bounds = self.experiment.bounds
        if bounds is None or not int(state.step):
            return {}
        return step_sizes.summarize_steps(
            self.training.moments(state), **bounds, bounded=self.experiment.opt in BOUNDED
        )

    def write(self, state: State, results: Results | None) -> None:
        """Writes weights, curves and step sizes; once there are test results these, and some with their pictures.

        Raises:
          OSError: they could not be written.
        """
        if not is_first():
            return
        try:
            self._write_weights(state)
            plot_curves(self.path / CURVES, read_metrics(self.path), self.title)
            if results is not None:
                self._write_results(results)
            if self.experiment.bounds is not None and int(state.step):
                steps = step_sizes.layer_steps(self.training.moments(state), **self.experiment.bounds)
                (self.path / "step_sizes.json").write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
                plot_layer_steps(self.path / STEP_SIZES, steps, self.title)
        except OSError as error:
            raise OSError(f"the report in {self.path} could not be written: {error.strerror or error}") from error

    def _write_weights(self, state: State) -> None:
        """The weight file, and that of the averages; the description is JSON in their metadata."""
        metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in self.description.items()}
        arrays = self.training.arrays
        write_arrays(self.path / WEIGHTS, arrays(state.params, state.batch_stats), metadata=metadata)
        if (averages := self.training.averages(state)) is not None:
            write_arrays(self.path / AVERAGED_WEIGHTS, arrays(*averages), metadata=metadata)

    def _write_results(self, results: Results) -> None:
        test, names = self.dataset.test, self.dataset.class_names
        write_test_results(self.path / TEST_RESULTS, results, test)
        chosen = np.random.default_rng(0).permutation(len(test))[:PICTURES_SHOWN]
        plot_predictions(
            self.path / PREDICTIONS,
            test.images[chosen],
            [names[i] for i in test.labels[chosen]],
            [names[i] for i in results["prediction"][chosen]],
            results["confidence"][chosen],
            f"{self.title}: {len(chosen)} of {len(test):,} test pictures",
        )


def announce(settings: RunSettings, dataset: Dataset, network: str) -> str:
    """Prints what is trained on what, before weights are drawn and programs compiled; returns it, for every title."""
    experiment = settings.experiment
    title = f"{network} with {experiment.opt} on {dataset.title}"
    if experiment.limit is not None:
        title += f", {len(dataset.train):,} training pictures"
    compiles = "; the first step compiles" if experiment.framework == "jax" else ""
    print(f"{title}: {len(dataset.train):,} pictures to train, {experiment.epochs} epochs{compiles}", flush=True)
    return title


def train_and_report(
    settings: RunSettings,
    dataset: Dataset,
    training: Training,
    *,
    title: str,
    description: dict[str, Any],
) -> int | None:
    """Trains in a run folder, a new one or with --resume an earlier one, and says what was reached.

    Args:
      settings: of the program.
      dataset: what to train and to test on.
      training: where it begins; consumed.
      title: see `announce`.
      description: see `prepare.describe_input`.

    Returns:
      the signal that ended it, None if all epochs were run, or with --dry-run none.

    Raises:
      DivergedError: when a loss or gradients are not finite.
      ValueError: the run to go on with is another one.
      DataError: the data is not to be trained on.
    """
    started, experiment, system = time.perf_counter(), settings.experiment, settings.system
    name = re.sub("[^a-z0-9]+", "-", title.lower())
    out = system.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = {
        "settings": settings.flat(),
        "data": {"title": dataset.title} | dataset.source | {"train_used": len(dataset.train)},
        "input": description,
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(training.state.params)),
        "steps_per_epoch": count_steps(dataset.train, experiment.batch_size),
        "device": training.device,
    }
    if system.resume and (out / CONFIG).exists():
        refuse_other_run(out, json.loads(json.dumps(config)), settings)
    restored = restore_run(settings, training, out)
    refuse_other_processes(config, restored)
    report_findings(settings, dataset, training, out)
    if system.dry_run:
        return None
    progress = Progress() if restored is None else Progress.of(restored.facts)
    folder = RunFolder(out, rows=None if restored is None else progress.rows, writes=is_first())
    if restored is None:
        folder.write_config(config)
    else:
        state = training.place(restored.state)
        for leaf in jax.tree.leaves(training.state):
            leaf.delete()  # or it would take its memory until the end
        training = training._replace(state=state)
    facts = {"settings": config["settings"], "input": description}
    saver = Saver(out, system, facts, in_jax=training.in_jax, step=restored and restored.step)
    del restored
    report = Report(out, title, experiment, dataset, training, description)
    profile = Profile(out / PROFILE, system.profile) if system.profile and is_first() else None
    loop = Loop(experiment, dataset, training, folder, saver, report, progress, system.skip_nonfinite, profile)
    give_back_freed_memory()  # of compiling
    try:
        ended_by = loop.run()
    except DivergedError as error:
        if is_first():
            (out / ERROR).write_text(f"{error}\n", encoding="utf-8")
        raise
    finally:
        folder.close()
        saver.close()
    if is_first():
        print_outcome(settings, dataset, title, out, ended_by, time.perf_counter() - started)
    return ended_by


def print_outcome(
    settings: RunSettings, dataset: Dataset, title: str, out: Path, ended_by: int | None, seconds: float
) -> None:
    """The last lines: what was reached, where the files are, and how a run that was stopped goes on."""
    tested = read_epochs(out)
    after = tested[-1]["epoch"] if tested else 0
    reached = f"{tested[-1]['test_top1']:.1%} top-1 of {len(dataset.test):,} test pictures" if tested else "no test yet"
    files = ", ".join(n for n in REPORTED if (out / n).exists())
    print(
        f"{title}: {reached} after {after:g} of {settings.experiment.epochs} epochs, {seconds // 60:.0f} min "
        f"{seconds % 60:.0f} s; in {out} are {files}"
    )
    if ended_by is not None and settings.experiment.framework == "jax" and settings.system.keep:
        print(f"stopped by {signal.Signals(ended_by).name}: the same command with --out {out} --resume goes on")


def report_findings(settings: RunSettings, dataset: Dataset, training: Training, out: Path) -> None:
    """Prints what a look at data, memory and disk has found; of the data's facts only with --dry-run.

    Raises:
      DataError: the data is not to be trained on.
    """
    dry_run = settings.system.dry_run
    of_data = check_data(dataset, thoroughly=dry_run)
    rows = settings.experiment.batch_size // jax.process_count()
    images = np.zeros((rows, *dataset.train.images.shape[1:]), np.uint8)
    of_system = []
    if training.in_jax:
        of_system = memory_findings(measure_memory(training, images, np.zeros(rows, np.int32)))
        of_system += disk_findings(out, training, settings.system.keep)
    if not is_first():
        return
    said = dataset.source.get("notes", [])  # by the reader of the data
    warnings = [f for f in of_data + of_system if f.severity != "fact" and f.text not in said]
    told = of_data + of_system if dry_run else of_system
    facts = [finding for finding in told if finding.severity == "fact"]
    for findings, file in ((warnings, sys.stderr), (facts, sys.stdout)):
        if findings:
            print(format_findings(findings), file=file)
    if dry_run:
        print("nothing was trained: --dry-run")
