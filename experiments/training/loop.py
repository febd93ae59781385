"""The training loop that the programs here share: batches, steps, evaluation, checkpoints, progress."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from experiments.cli import FailedError
from experiments.data.dataset import DataError, Dataset, Split, epoch_order
from experiments.data.stream import Batches, EvaluationBatches, put_ahead
from experiments.frameworks.common import State
from experiments.training.meter import Meter, NotFiniteError, Profile, macro_f1
from experiments.training.processes import Stopped, StopRequest
from experiments.training.run_folder import RunFolder
from experiments.training.saving import Progress, Saver

Results = dict[str, np.ndarray]


class DivergedError(FailedError):
    """The loss or the gradients are no longer finite numbers."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long is trained, on which batches, and how often is said where it stands.

    epochs, batch_size, seed: the batches are those of `Batches`; batch_size is that of all processes together.
    log_every: steps between two rows.
    test_every: epochs between two tests; the last epoch is always tested.
    workers: processes that make batches ahead; 0 for threads.
    skip_nonfinite: how many steps may be not finite.
    report_seconds: least time between two reports.
    """

    epochs: int
    batch_size: int
    seed: int
    log_every: int
    test_every: int = 1
    workers: int = 0
    skip_nonfinite: int = 0
    report_seconds: float = 60.0


class Steps(Protocol):
    """What computes: see `experiments.frameworks.common.Training`."""

    train_step: Callable[..., tuple[State, dict[str, Any]]]
    eval_step: Callable[..., Any]
    put: Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]
    averages: Callable[[State], tuple[Any, Any] | None]
    search: Callable[[State, Any, Any], list[str]] | None


def evaluate(
    eval_step: Callable[..., Any],
    params: Any,
    batch_stats: Any,
    split: Split,
    batch_size: int,
    *,
    put: Callable[[np.ndarray, np.ndarray], tuple[Any, Any]] = lambda images, labels: (images, labels),
    workers: int = 0,
    check: Callable[[], None] = lambda: None,
) -> Results:
    """Runs the evaluation step over a whole split, in its order, with a progress bar; calls `check` between batches.

    Args:
      eval_step, params, batch_stats, put: see `Steps`.
      split: N pictures.
      batch_size: of all processes together.
      workers: as many threads read ahead, at least two.

    Returns:
      per picture, each (N,): "loss", "prediction", "confidence", "top5".
    """
    results, running = [], None
    # Threads in any case: workers would be started anew for each test, for a few seconds each.
    ahead = max(2, workers)
    with EvaluationBatches(split, batch_size, part=part_of_this_process(), prefetch=ahead) as batches:
        total = -(-len(split) // batch_size)
        hidden = True if jax.process_index() else None  # None: hidden unless this is a terminal
        bar = tqdm(
            put_ahead(batches, put), desc="testing", total=total, leave=False, dynamic_ncols=True, disable=hidden
        )
        for images, labels in bar:
            check()
            ended = running
            running = eval_step(params, batch_stats, images, labels)
            if ended is not None:  # read one batch late; read at the end, dozens would run, and take memory, at once
                results.append(jax.device_get(ended))
        results.append(jax.device_get(running))
    return {name: np.concatenate([result[name] for result in results])[: len(split)] for name in results[0]}


def summarize(results: Results, labels: np.ndarray) -> dict[str, float]:
    """The test metrics of a run's metrics.jsonl; all but the loss are fractions from 0 to 1."""
    return {
        "test_loss": float(results["loss"].mean(dtype=np.float64)),
        "test_top1": float((results["prediction"] == labels).mean()),
        "test_top5": float(results["top5"].mean()),
        "test_macro_f1": macro_f1(labels, results["prediction"]),
    }


def count_steps(split: Split, batch_size: int) -> int:
    """The steps of an epoch.

    Raises:
      ValueError: if there is not one.
    """
    if batch_size > len(split):
        raise ValueError(f"--batch-size {batch_size} exceeds the {len(split)} training pictures")
    return len(split) // batch_size


def part_of_this_process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def fit(
    state: State,
    steps: Steps,
    dataset: Dataset,
    folder: RunFolder,
    saver: Saver,
    plan: Plan,
    report: Callable[[State, Results | None], None],
    observe: Callable[[State], dict[str, float]] = lambda state: {},
    *,
    progress: Progress | None = None,
    profile: Profile | None = None,
) -> int | None:
    """Trains, evaluates after each epoch, logs to the run's folder, writes checkpoints and shows a progress bar.

    Args:
      state: where it begins; consumed.
      steps: what computes.
      dataset: what to train and to test on.
      folder: takes a row every plan.log_every steps and one at the end of each epoch.
      saver: takes the state and where it stands: when it is due, after each epoch that is the best so far, and at the
        end, also when told to stop.
      plan: how long, on which batches.
      report: called with the state and the last test results (None before the first) after an epoch if the last call
        is plan.report_seconds ago, and in any case at the end, also when told to stop.
      observe: called with the state at the end of each epoch; what it returns goes into the epoch's row.
      progress: where it begins; None for the beginning.
      profile: records some steps.

    Returns:
      the signal that ended it; None if all epochs were run.

    Raises:
      DivergedError: when a loss or gradients are not finite, and not to be skipped; a checkpoint from before is there.
      DataError: a picture can no longer be read.
    """
    return _Fit(state, steps, dataset, folder, saver, plan, report, observe, progress or Progress(), profile).run()


class _Fit:
    """A call of `fit`: what changes while it runs."""

    def __init__(self, state, steps, dataset, folder, saver, plan, report, observe, progress, profile):
        self.state, self.steps, self.dataset, self.folder, self.saver = state, steps, dataset, folder, saver
        self.plan, self.report, self.observe, self.progress, self.profile = plan, report, observe, progress, profile
        self.steps_per_epoch = count_steps(dataset.train, plan.batch_size)
        self.results: Results | None = None
        self.reported = time.perf_counter()
        self.started = self.reported - progress.seconds
        self.step = int(state.step)  # of the state once all that was dispatched has ended
        self.skipped = int(getattr(state, "nonfinite", 0))

    def run(self) -> int | None:
        # Until the end: a second signal may not keep the last checkpoint from the disk.
        with StopRequest() as self.stop:
            ended_by = self.train()
            self.save_if_missing()
            self.report(self.state, self.results)
            self.saver.wait()
        return ended_by

    def train(self) -> int | None:
        plan = self.plan
        seldom = 0.1 if sys.stderr.isatty() else 30.0  # seconds between two lines: a log file is no place for a bar
        # The pictures of before a restart are no part of the time left that the bar tells.
        self.bar = tqdm(
            total=plan.epochs * self.steps_per_epoch * plan.batch_size,
            initial=self.step * plan.batch_size,
            unit=" img",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=seldom,
            disable=jax.process_index() > 0,
        )
        try:
            with self.batches(self.step, plan.workers, prefetch=max(2, 2 * plan.workers)) as batches:
                on_device = put_ahead(batches, self.steps.put)
                while self.progress.epoch < plan.epochs:
                    self.run_epoch(on_device)
        except Stopped as stopped:
            return stopped.signal
        except NotFiniteError as error:
            raise self.diverged(error) from error
        except (DataError, ChildProcessError):  # a picture or a worker is gone: that can be mended
            self.finish_step()
            self.save_if_missing()
            raise
        finally:
            self.bar.close()
            if self.profile is not None:
                self.profile.close()
        return None

    def batches(self, start_step: int, workers: int, prefetch: int) -> Batches:
        plan = self.plan
        return Batches(
            self.dataset.train,
            plan.batch_size,
            plan.seed,
            epochs=plan.epochs,
            start_step=start_step,
            part=part_of_this_process(),
            workers=workers,
            prefetch=prefetch,
        )

    def save_if_missing(self) -> None:
        if not self.saver.has(self.step):
            self.save()

    def run_epoch(self, batches: Iterator[tuple[Any, Any]]) -> None:
        plan, epoch = self.plan, self.progress.epoch + 1
        self.bar.set_description(f"{self.dataset.title}, epoch {epoch}/{plan.epochs}")
        labels = self.dataset.train.labels[epoch_order(len(self.dataset.train), plan.seed, epoch - 1)]
        self.meter = Meter(
            epoch,
            self.steps_per_epoch,
            plan.batch_size,
            self.started,
            plan.skip_nonfinite - self.skipped,
            labels,
            self.progress.meter,
        )
        while self.step < epoch * self.steps_per_epoch:
            self.check_stop()
            images, batch_labels = next(batches)
            if self.profile is not None:
                self.profile.before_step()
            self.state, metrics = self.steps.train_step(self.state, images, batch_labels)
            self.step += 1
            if self.meter.add(metrics):
                self.show_step()
            if self.step < epoch * self.steps_per_epoch and self.saver.due(self.step):
                self.finish_step()
                self.save()
        self.finish_step()
        self.skipped += self.meter.skipped
        self.end_epoch()

    def finish_step(self) -> None:
        if self.meter.finish():
            self.show_step()

    def check_stop(self) -> None:
        try:
            self.stop.check(self.step)
        except Stopped:
            self.finish_step()
            raise

    def show_step(self) -> None:
        self.bar.update(self.plan.batch_size)
        self.bar.set_postfix(loss=f"{self.meter.loss:.3f}", top1=f"{self.meter.top1:.1%}", refresh=False)
        if self.meter.steps % self.plan.log_every == 0:
            self.folder.log(self.meter.row(self.plan.log_every))

    def test(self, params: Any, batch_stats: Any) -> Results:
        return evaluate(
            self.steps.eval_step,
            params,
            batch_stats,
            self.dataset.test,
            self.plan.batch_size,
            put=self.steps.put,
            workers=self.plan.workers,
            check=self.stop.check,
        )

    def end_epoch(self) -> None:
        plan, epoch, labels = self.plan, self.progress.epoch + 1, self.dataset.test.labels
        row, score = self.meter.row(self.steps_per_epoch), None
        if epoch % plan.test_every == 0 or epoch == plan.epochs:
            self.results = self.test(self.state.params, self.state.batch_stats)
            row |= summarize(self.results, labels)
            score = row["test_top1"]
            if (averages := self.steps.averages(self.state)) is not None:
                averaged = summarize(self.test(*averages), labels)
                row |= {f"ema_{name}": value for name, value in averaged.items()}
                score = row["ema_test_top1"]
        row |= self.observe(self.state)
        row["seconds"] = round(time.perf_counter() - self.started, 3)
        self.folder.log(row)
        if jax.process_index() == 0:
            self.bar.write(f"epoch {epoch}/{plan.epochs}: {describe_epoch(self.dataset.title, row)}")
        best = score is not None and (self.progress.best is None or score > self.progress.best)
        self.progress = Progress(epoch, best=score if best else self.progress.best)
        if best or self.saver.due(self.step):
            self.save(score)
        if time.perf_counter() - self.reported > plan.report_seconds and epoch < plan.epochs:
            self.report(self.state, self.results)
            self.reported = time.perf_counter()

    def save(self, score: float | None = None) -> None:
        """Begins a checkpoint of the state, whose steps have all ended."""
        within = self.step > self.progress.epoch * self.steps_per_epoch
        self.folder.sync()
        self.saver.save(
            self.state,
            self.progress._replace(
                meter=self.meter.facts() if within else None,
                rows=self.folder.rows,
                seconds=time.perf_counter() - self.started,
            ),
            score=score,
        )

    def diverged(self, error: NotFiniteError) -> DivergedError:
        """Looks for the cause, saves the state from before the step, and says what was found."""
        text = f"{error} at step {error.step} (epoch {self.meter.epoch})"
        if self.steps.search is None:
            return DivergedError(f"{text}: try a lower --learning-rate")
        # The step that failed, and the one that was dispatched after it, have left the state what it was before.
        self.step = int(self.state.step)
        self.state = self.state.replace(nonfinite=self.state.nonfinite - 1)
        where = "no checkpoint was asked for"
        if self.saver.checkpoints is not None:
            self.save_if_missing()
            where = f"the checkpoint of step {self.step}, before it, is in {self.saver.checkpoints.folder}"
            if not self.saver.wait():
                where = "the checkpoint of the step before could not be written"
        with self.batches(error.step - 1, workers=0, prefetch=0) as again:
            found = self.steps.search(self.state, *self.steps.put(*next(again)))
        text += f". Not finite are {shorten(found)}" if found else ". Computed once more it is finite"
        advice = "try a lower --learning-rate or --clip-norm in a new --out"
        if self.saver.checkpoints is not None:
            advice += ", or --resume with --skip-nonfinite"
        return DivergedError(f"{text}; {where}: {advice}")


def describe_epoch(title: str, row: dict[str, float]) -> str:
    """The row at the end of an epoch, tested or not, as a line."""
    trained = f"train loss {row['train_loss']:.3f} top-1 {row['train_top1']:.1%} macro-F1 {row['train_macro_f1']:.1%}"
    if "test_loss" not in row:
        return f"{trained} | {title}, not tested"
    averaged = f" (averaged weights {row['ema_test_top1']:.1%})" if "ema_test_top1" in row else ""
    speed = f" | {row['images_per_second']:.1f} images/s" if "images_per_second" in row else ""
    return (
        f"{trained} | {title}, test loss {row['test_loss']:.3f} top-1 {row['test_top1']:.1%}{averaged} "
        f"top-5 {row['test_top5']:.1%} macro-F1 {row['test_macro_f1']:.1%}{speed}"
    )


def shorten(names: list[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
