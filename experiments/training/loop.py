"""The training loop that the programs here share: batches, steps, evaluation, checkpoints, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

from experiments.cli import FailedError
from experiments.data.dataset import Dataset, Split, epoch_order
from experiments.data.stream import Batch, evaluation_batches, put_ahead, training_batches
from experiments.frameworks.common import Training
from experiments.training.meter import Meter, NotFiniteError, Profile, macro_f1
from experiments.training.processes import Stopped, StopRequest
from experiments.training.run_folder import UNTESTED, RunFolder
from experiments.training.saving import Progress, Saver
from experiments.training.settings import RunSettings

if TYPE_CHECKING:
    import grain

    from experiments.training.run import Report

Results = dict[str, np.ndarray]  # per test picture, each (N,): "loss", "prediction", "confidence", "top5"
REPORT_SECONDS = 60.0  # the minimum between two reports


class DivergedError(FailedError):
    """The loss or the gradients are no longer finite numbers."""


def count_steps(split: Split, batch_size: int) -> int:
    """The number of steps in an epoch; raises a ValueError if the pictures do not fill one batch."""
    if batch_size > len(split):
        raise ValueError(f"--batch-size {batch_size} exceeds the {len(split)} training pictures")
    return len(split) // batch_size


@dataclasses.dataclass
class Loop:
    """Trains, evaluates after each epoch, logs to the run's folder, writes checkpoints and shows a progress bar.

    training: the steps and the initial state, which is consumed.
    folder: gets a row every log_every steps and one at the end of each epoch.
    saver: writes a checkpoint whenever one is due, after each epoch that is the best so far, and at the end, even if
      the run is told to stop.
    report: adds to an epoch's row; is written after an epoch if the last report is older than REPORT_SECONDS, and
      always at the end, even if the run is told to stop.
    progress: where the training begins.
    """

    settings: RunSettings
    dataset: Dataset
    training: Training
    folder: RunFolder
    saver: Saver
    report: Report
    progress: Progress
    profile: Profile | None = None
    results: Results | None = None  # of the last test

    def __post_init__(self):
        self.experiment, self.state = self.settings.experiment, self.training.state
        self.steps_per_epoch = count_steps(self.dataset.train, self.experiment.batch_size)
        self.part = (jax.process_index(), jax.process_count())
        self.reported = time.perf_counter()
        self.started = self.reported - self.progress.seconds
        self.step = int(self.state.step)  # of the state once all dispatched steps have ended
        self.left_to_skip = self.settings.system.skip_nonfinite - int(getattr(self.state, "nonfinite", 0))

    def run(self) -> int | None:
        """Runs the epochs that are left; returns the signal that ended the run early, or None.

        Raises:
          DivergedError: a loss or gradients are not finite and may not be skipped; its message says what was saved.
        """
        # StopRequest covers the last checkpoint too: a first signal must not interrupt its writing.
        with StopRequest() as self.stop:
            ended_by = self.train()
            self.save_if_missing()
            self.report.write(self.state, self.results)
            self.saver.wait()
        return ended_by

    def train(self) -> int | None:
        experiment = self.experiment
        # The bar starts at the restored step; otherwise its time left would count pictures from before a restart.
        self.bar = tqdm(
            total=experiment.epochs * self.steps_per_epoch * experiment.batch_size,
            initial=self.step * experiment.batch_size,
            unit=" img",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30.0,  # seconds; rarely in a log file
        )
        try:
            with contextlib.closing(self.batches(self.step)) as batches:
                on_device = put_ahead(batches, self.training.put)
                while self.progress.epoch < experiment.epochs:
                    self.run_epoch(on_device)
        except Stopped as stopped:
            return stopped.signal
        except NotFiniteError as error:
            raise self.diverged(error) from error
        finally:
            self.bar.close()
            if self.profile is not None:
                self.profile.close()
        return None

    def batches(self, start_step: int, prefetch: int | None = None) -> grain.DatasetIterator[Batch]:
        experiment = self.experiment
        options = dict(epochs=experiment.epochs, start_step=start_step, part=self.part, prefetch=prefetch)
        return training_batches(self.dataset.train, experiment.batch_size, experiment.seed, **options)

    def save_if_missing(self) -> None:
        if not self.saver.has(self.step):
            self.save()

    def run_epoch(self, batches: Iterator[tuple[Any, Any]]) -> None:
        experiment, epoch, train = self.experiment, self.progress.epoch + 1, self.dataset.train
        self.bar.set_description(f"{self.dataset.title}, epoch {epoch}/{experiment.epochs}")
        shape = (self.steps_per_epoch, experiment.batch_size)
        labels = train.labels[epoch_order(len(train), experiment.seed, epoch - 1)[: shape[0] * shape[1]]].reshape(shape)
        self.meter = Meter(epoch, labels, self.started, self.left_to_skip, self.progress.meter)
        while self.step < epoch * self.steps_per_epoch:
            try:
                self.stop.check(self.step)
            except Stopped:
                self.finish_step()
                raise
            images, batch_labels = next(batches)
            if self.profile is not None:
                self.profile.before_step()
            self.state, metrics = self.training.train_step(self.state, images, batch_labels)
            self.step += 1
            if self.meter.add(metrics):
                self.show_step()
            if self.step < epoch * self.steps_per_epoch and self.saver.due(self.step):
                self.finish_step()
                self.save()
        self.finish_step()
        self.left_to_skip -= self.meter.skipped
        self.end_epoch()

    def finish_step(self) -> None:
        if self.meter.finish():
            self.show_step()

    def show_step(self) -> None:
        self.bar.update(self.experiment.batch_size)
        means = self.meter.means(20)
        self.bar.set_postfix(loss=f"{means['train_loss']:.3f}", top1=f"{means['train_top1']:.1%}", refresh=False)
        if self.meter.steps % self.experiment.log_every == 0:
            self.folder.log(self.meter.row(self.experiment.log_every))

    def test(self, params: Any, batch_stats: Any) -> tuple[Results, dict[str, float]]:
        """Evaluates all test pictures, with a progress bar; returns the results by picture and the metrics of a row."""
        split, batch_size, results, running = self.dataset.test, self.experiment.batch_size, [], None
        with contextlib.closing(evaluation_batches(split, batch_size, part=self.part)) as batches:
            # disable=None hides the bar unless stderr is a terminal.
            options = dict(desc="testing", total=-(-len(split) // batch_size), leave=False, disable=None)
            for images, labels in tqdm(put_ahead(batches, self.training.put), dynamic_ncols=True, **options):
                self.stop.check()
                ended = running
                running = self.training.eval_step(params, batch_stats, images, labels)
                if ended is not None:  # read one batch late; later, dozens would be in memory at once
                    results.append(jax.device_get(ended))
            results.append(jax.device_get(running))
        of_all = {name: np.concatenate([result[name] for result in results])[: len(split)] for name in results[0]}
        return of_all, {
            "test_loss": float(of_all["loss"].mean(dtype=np.float64)),
            "test_top1": float((of_all["prediction"] == split.labels).mean()),
            "test_top5": float(of_all["top5"].mean()),
            "test_macro_f1": macro_f1(split.labels, of_all["prediction"]),
        }

    def end_epoch(self) -> None:
        experiment, epoch = self.experiment, self.progress.epoch + 1
        row, score = self.meter.row(self.steps_per_epoch), None
        if epoch % experiment.test_every == 0 or epoch == experiment.epochs:
            self.results, tested = self.test(self.state.params, self.state.batch_stats)
            row |= tested
            if (averages := self.training.averages(self.state)) is not None:
                _, tested = self.test(*averages)
                row |= {f"ema_{name}": value for name, value in tested.items()}
            score = tested["test_top1"]
        else:
            row |= UNTESTED
        row |= self.report.observe(self.state)
        row["seconds"] = round(time.perf_counter() - self.started, 3)
        self.folder.log(row)
        self.bar.write(f"epoch {epoch}/{experiment.epochs}: {describe_epoch(self.dataset.title, row)}")
        best = score is not None and (self.progress.best is None or score > self.progress.best)
        self.progress = Progress(epoch, best=score if best else self.progress.best)
        if best or self.saver.due(self.step):
            self.save(score)
        if time.perf_counter() - self.reported > REPORT_SECONDS and epoch < experiment.epochs:
            self.report.write(self.state, self.results)
            self.reported = time.perf_counter()

    def save(self, score: float | None = None) -> None:
        """Starts writing a checkpoint of the state, whose steps must all have ended."""
        within = self.step > self.progress.epoch * self.steps_per_epoch
        meter = self.meter.facts() if within else None
        self.folder.sync()
        seconds = time.perf_counter() - self.started
        progress = self.progress._replace(meter=meter, rows=self.folder.rows, seconds=seconds)
        self.saver.save(self.state, progress, score=score)

    def diverged(self, error: NotFiniteError) -> DivergedError:
        """Returns an error. In JAX it saves the state before the step, and the error names checkpoint and cause."""
        text = f"{error} at step {error.step} (epoch {self.meter.epoch})"
        if not self.training.in_jax:
            return DivergedError(f"{text}: try a lower --learning-rate")
        # The failed step, and the one dispatched after it, left the state unchanged, except for this count.
        self.step = int(self.state.step)
        self.state = self.state.replace(nonfinite=self.state.nonfinite - 1)
        where, advice = "--keep 0 writes no checkpoint", "try a lower --learning-rate or --clip-norm in a new --out"
        if self.saver.checkpoints is not None:
            advice += ", or --resume with --skip-nonfinite"
            self.save_if_missing()
            where = f"the checkpoint of the step before, {self.step}, is in {self.saver.checkpoints.folder}"
            if not self.saver.wait():
                where = "the checkpoint of the step before could not be written"
        with contextlib.closing(self.batches(error.step - 1, prefetch=0)) as again:
            found = self.training.search(self.state, *self.training.put(*next(again)))
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        text += f". Not finite: {', '.join(found[:4])}{more}" if found else ". A second computation was finite"
        return DivergedError(f"{text}; {where}: {advice}")


def describe_epoch(title: str, row: dict[str, float]) -> str:
    """Describes the row at the end of an epoch, tested or not, in one line."""
    trained = f"train loss {row['train_loss']:.3f} top-1 {row['train_top1']:.1%} macro-F1 {row['train_macro_f1']:.1%}"
    speed = f" | {row['images_per_second']:.1f} images/s" if "images_per_second" in row else ""
    if "test_loss" not in row:
        return f"{trained} | {title}, not tested{speed}"
    averaged = f" (averaged weights {row['ema_test_top1']:.1%})" if "ema_test_top1" in row else ""
    return (
        f"{trained} | {title}, test loss {row['test_loss']:.3f} top-1 {row['test_top1']:.1%}{averaged} "
        f"top-5 {row['test_top5']:.1%} macro-F1 {row['test_macro_f1']:.1%}{speed}"
    )
