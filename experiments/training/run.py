"""A training run around its loop, the same for all programs: folder, report, final message."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.data.dataset import Dataset
from experiments.frameworks.common import State, Training
from experiments.frameworks.experiment import BOUNDED, Experiment
from experiments.machine import give_back_freed_memory
from experiments.training import run_folder as files
from experiments.training import step_sizes
from experiments.training.loop import DivergedError, Loop, Results, count_steps
from experiments.training.meter import Profile
from experiments.training.plots import plot_curves, plot_layer_steps, plot_predictions
from experiments.training.preflight import report_findings
from experiments.training.processes import is_first
from experiments.training.saving import Progress, Saver, restore_run
from experiments.training.settings import RunSettings
from jax_resnet.checkpoint import Checkpoints
from jax_resnet.weights import write_arrays

PICTURES_SHOWN = 12
Prepare = Callable[[Any, Dataset], tuple[Training, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Report:
    """Writes a run's files other than metrics and checkpoints.

    title: the network, the optimizer and the data.
    description: see `prepare.describe_input`.
    """

    path: Path
    title: str
    experiment: Experiment
    dataset: Dataset
    training: Training
    description: dict[str, Any]

    def observe(self, state: State) -> dict[str, float]:
        """The step sizes of the weights, for an epoch's row; {} without bounds in the experiment or before a step."""
        bounds = self.experiment.bounds
        if bounds is None or not int(state.step):
            return {}
        moments, bounded = self.training.moments(state), self.experiment.opt in BOUNDED
        return step_sizes.summarize_steps(moments, **bounds, bounded=bounded)

    def write(self, state: State, results: Results | None) -> None:
        """Writes weights, curves and step sizes; also any test results, some of them with their pictures."""
        if not is_first():
            return
        try:
            # Both weight files hold the description in their metadata, as JSON.
            metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in self.description.items()}
            both = {
                files.WEIGHTS: (state.params, state.batch_stats),
                files.AVERAGED_WEIGHTS: self.training.averages(state),
            }
            for name, trees in both.items():
                if trees is not None:
                    write_arrays(self.path / name, self.training.arrays(*trees), metadata=metadata)
            plot_curves(self.path / files.CURVES, files.read_metrics(self.path), self.title)
            if results is not None:
                self._write_results(results)
            if self.experiment.bounds is not None and int(state.step):
                steps = step_sizes.layer_steps(self.training.moments(state), **self.experiment.bounds)
                (self.path / "step_sizes.json").write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
                plot_layer_steps(self.path / files.STEP_SIZES, steps, self.title)
        except OSError as error:
            raise OSError(f"the report in {self.path} could not be written: {error.strerror or error}") from error

    def _write_results(self, results: Results) -> None:
        test, names = self.dataset.test, self.dataset.class_names
        files.write_test_results(self.path / files.TEST_RESULTS, results, test)
        chosen = np.random.default_rng(0).permutation(len(test))[:PICTURES_SHOWN]
        true, predicted = ([names[i] for i in of[chosen]] for of in (test.labels, results["prediction"]))
        title = f"{self.title}: {len(chosen)} of {len(test):,} test pictures"
        confidences = results["confidence"][chosen]
        plot_predictions(self.path / files.PREDICTIONS, test.images[chosen], true, predicted, confidences, title)


def train_and_report(settings: RunSettings, dataset: Dataset, network: str, prepare: Prepare) -> int | None:
    """Trains in a new run folder, or with --resume in an earlier one, and prints the result.

    Args:
      network: its name.
      prepare: (settings, dataset) -> a training, which is consumed; and what `prepare.describe_input` returns.

    Returns:
      the signal that ended the run; None if all epochs were run, or with --dry-run.

    Raises:
      DivergedError: a loss or gradients are not finite.
      ValueError: bad input, with a message for the user.
    """
    experiment = settings.experiment
    title = f"{network} with {experiment.opt} on {dataset.title}"
    if experiment.limit is not None:
        title += f", {len(dataset.train):,} training pictures"
    compiles = "; the first step compiles" if experiment.framework == "jax" else ""
    print(f"{title}: {len(dataset.train):,} pictures to train, {experiment.epochs} epochs{compiles}", flush=True)
    with jax.enable_x64(experiment.precision == "float64"):
        training, description = prepare(settings, dataset)
        return _train(settings, dataset, training, title, description)


def _train(
    settings: RunSettings, dataset: Dataset, training: Training, title: str, description: dict[str, Any]
) -> int | None:
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
    restored = restore_run(settings, training, out, config)
    report_findings(settings, dataset, training, out)
    if system.dry_run:
        return None
    progress, step = Progress(), None
    if restored is not None:
        progress, step = Progress(*(restored.facts[name] for name in Progress._fields)), restored.step
        state = training.place(restored.state)
        for leaf in jax.tree.leaves(training.state):
            leaf.delete()  # frees its memory now, not at the end of the run
        training = training._replace(state=state)
        del restored
    folder = files.RunFolder(out, rows=None if step is None else progress.rows, writes=is_first())
    if step is None:
        folder.write_config(config)
    checkpoints = Checkpoints(out / files.CHECKPOINTS, keep=system.keep) if system.keep and training.in_jax else None
    saver = Saver(checkpoints, system, {"settings": config["settings"], "input": description}, step)
    report = Report(out, title, experiment, dataset, training, description)
    profile = Profile(out / files.PROFILE, system.profile) if system.profile and is_first() else None
    loop = Loop(settings, dataset, training, folder, saver, report, progress, profile)
    give_back_freed_memory()  # that compiling used
    try:
        ended_by = loop.run()
    except DivergedError as error:
        folder.write_error(error)
        raise
    finally:
        folder.close()
        saver.close()
    tested, seconds = files.read_epochs(out), time.perf_counter() - started
    reached = f"{tested[-1]['test_top1']:.1%} top-1 of {len(dataset.test):,} test pictures" if tested else "no test yet"
    print(
        f"{title}: {reached} after {tested[-1]['epoch'] if tested else 0:g} of {experiment.epochs} epochs, "
        f"{seconds // 60:.0f} min {seconds % 60:.0f} s; {out} holds "
        f"{', '.join(name for name in files.REPORTED if (out / name).exists())}"
    )
    if ended_by is not None and saver.checkpoints is not None:
        print(f"stopped by {signal.Signals(ended_by).name}: to continue, repeat the command with --out {out} --resume")
    return ended_by
