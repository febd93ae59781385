"""A training run around its loop, as all programs that train have it: folder, last words, report, exit code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.data.check import format_findings
from experiments.data.dataset import Dataset
from experiments.frameworks.common import State, Training
from experiments.machine import give_back_freed_memory
from experiments.training.loop import DivergedError, Plan, Results, count_steps, fit
from experiments.training.meter import Profile
from experiments.training.plots import plot_curves, plot_predictions
from experiments.training.preflight import check_data, disk_findings, measure_memory, memory_findings
from experiments.training.processes import choose_devices, is_first, warn
from experiments.training.run_folder import (
    AVERAGED_WEIGHTS,
    CHECKPOINTS,
    CONFIG,
    CURVES,
    ERROR,
    METRICS,
    PREDICTIONS,
    PROFILE,
    STEP_SIZES,
    TEST_RESULTS,
    WEIGHTS,
    RunFolder,
    environment,
    read_epochs,
    read_metrics,
    write_test_results,
)
from experiments.training.saving import Progress, Saver, last_good
from experiments.training.settings import RunSettings
from jax_resnet.checkpoint import Checkpoints, Restored
from jax_resnet.weights import write_arrays

REPORTED = (
    CONFIG,
    METRICS,
    CURVES,
    PREDICTIONS,
    TEST_RESULTS,
    STEP_SIZES,
    WEIGHTS,
    AVERAGED_WEIGHTS,
    CHECKPOINTS,
    PROFILE,
)

NUMERIC_PACKAGES = ("jax", "jaxlib", "optax", "numpy")
PICTURES_SHOWN = 24
# Settings that say how a run is run, not what comes out: with --resume they may be others than at the start.
FREE = {
    "data",
    "out",
    "overwrite",
    "compare",
    "resume",
    "dry_run",
    "keep",
    "checkpoint_steps",
    "checkpoint_minutes",
    "workers",
    "devices",
    "coordinator",
    "process_id",
    "num_processes",
    "skip_nonfinite",
    "profile",
    "decode",
    "skip_bad",
}


def system_options(settings: RunSettings) -> dict[str, Any]:
    """What the settings that all programs share say to a `Recipe`.

    Raises:
      ValueError: for devices that there are not, or that cannot share the batch.
    """
    names = ("precision", "clip_norm", "accumulate", "ema", "skip_nonfinite", "remat")
    devices = choose_devices(settings.devices, settings.batch_size) if settings.framework == "jax" else 1
    return {name: getattr(settings, name) for name in names} | {"devices": devices}


def title_of(network: str, opt: str, dataset: Dataset, limit: int | None) -> str:
    """What was trained on what, for every line, plot and report of a run."""
    part = "" if limit is None else f", {len(dataset.train):,} training pictures"
    return f"{network} with {opt} on {dataset.title}{part}"


def describe_input(arch: str, dataset: Dataset, mean: np.ndarray, std: np.ndarray) -> dict[str, Any]:
    """What a weight file must tell about its network and its input, as plain JSON values."""
    *_, height, width, channels = dataset.train.images.shape
    return {
        "arch": arch,
        "class_names": dataset.class_names,
        "data": dataset.title,
        "image_size": (height, width),
        "grey": channels == 1,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }


def train_and_report(
    settings: RunSettings,
    dataset: Dataset,
    training: Training,
    *,
    title: str,
    name: str,
    description: dict[str, Any],
    write_report: Callable[[Path, State, Results | None], None],
    observe: Callable[[State], dict[str, float]] = lambda state: {},
) -> int | None:
    """Trains in a run folder, a new one or with --resume an earlier one, and says what was reached.

    Args:
      settings: of the program.
      dataset: what to train and to test on.
      training: where it begins; consumed.
      title: see `title_of`.
      name: of the folder in runs/, a time is added; unless --out says where it is.
      description: see `describe_input`.
      write_report: writes weights and pictures into the folder, given its path, the state and the last test results.
      observe: the state at the end of an epoch -> what else goes into that epoch's row of metrics.

    Returns:
      the signal that ended it, None if all epochs were run, or with --dry-run none.

    Raises:
      DivergedError: when a loss or gradients are not finite.
      ValueError: the run to go on with is another one.
      DataError: the data is not to be trained on.
    """
    started = time.perf_counter()
    out = settings.out or Path("runs") / f"{name.replace(' ', '-').lower()}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()},
        "data": {"title": dataset.title} | dataset.source | {"train_used": len(dataset.train)},
        "input": description,
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(training.state.params)),
        "steps_per_epoch": count_steps(dataset.train, settings.batch_size),
        "device": training.device,
    }
    if settings.resume and (out / CONFIG).exists():
        refuse_other_run(out, json.loads(json.dumps(config)), settings)
    restored = restore_run(settings, training, out)
    refuse_other_processes(config, restored)
    report_findings(settings, dataset, training, out)
    if settings.dry_run:
        return None
    if restored is None:
        state, progress, step = training.state, Progress(), None
        folder = RunFolder(out, writes=is_first())
        folder.write_config(config)
    else:
        state, step = training.place(restored.state), restored.step
        progress = Progress(**{name: restored.facts[name] for name in Progress._fields})
        folder = RunFolder(out, rows=progress.rows, writes=is_first())
        for leaf in jax.tree.leaves(training.state):
            leaf.delete()  # or it would take its memory until the end
        del restored
    saver = Saver(
        out,
        keep=settings.keep if training.place else 0,
        every_steps=settings.checkpoint_steps,
        every_minutes=settings.checkpoint_minutes,
        step=step,
        settings=config["settings"],
    )
    plan = Plan(
        settings.epochs,
        settings.batch_size,
        settings.seed,
        settings.log_every,
        settings.test_every,
        workers=settings.workers,
        skip_nonfinite=settings.skip_nonfinite,
    )

    def report(state: State, results: Results | None) -> None:
        if is_first():
            try:
                write_report(out, state, results)
            except OSError as error:
                raise OSError(f"the report in {out} could not be written: {error.strerror or error}") from error

    give_back_freed_memory()  # of compiling
    profile = Profile(out / PROFILE, settings.profile) if settings.profile and is_first() else None
    try:
        ended_by = fit(
            state, training, dataset, folder, saver, plan, report, observe, progress=progress, profile=profile
        )
    except DivergedError as error:
        if is_first():
            (out / ERROR).write_text(f"{error}\n", encoding="utf-8")
        raise
    finally:
        folder.close()
        saver.close()
    if not is_first():
        return ended_by
    tested = read_epochs(out)
    after = tested[-1]["epoch"] if tested else 0
    reached = f"{tested[-1]['test_top1']:.1%} top-1 of {len(dataset.test):,} test pictures" if tested else "no test yet"
    took = time.perf_counter() - started
    files = ", ".join(n for n in REPORTED if (out / n).exists())
    print(
        f"{title}: {reached} after {after:g} of {settings.epochs} epochs, {took // 60:.0f} min {took % 60:.0f} s; "
        f"in {out} are {files}"
    )
    if ended_by is not None and saver.checkpoints is not None:
        print(f"stopped by {signal.Signals(ended_by).name}: the same command with --out {out} --resume goes on")
    return ended_by


def refuse_other_processes(config: dict[str, Any], restored: Restored | None) -> None:
    """Raises a ValueError unless all processes train the same: their states would differ without a word."""
    if jax.process_count() == 1:
        return
    settings = {name: value for name, value in config["settings"].items() if name != "process_id"}
    same = [settings, config["input"], config["data"]["train_used"], restored.step if restored else None]
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).digest()
    from jax.experimental import multihost_utils

    try:
        multihost_utils.assert_equal(np.frombuffer(digest, np.uint8))
    except AssertionError:
        raise ValueError(
            "the processes have other settings, other data or another checkpoint: start all alike"
        ) from None


def report_findings(settings: RunSettings, dataset: Dataset, training: Training, out: Path) -> None:
    """Prints what a look at data, memory and disk has found; of the data's facts only with --dry-run.

    Raises:
      DataError: the data is not to be trained on.
    """
    of_data = check_data(dataset, thoroughly=settings.dry_run)
    rows = settings.batch_size // jax.process_count()
    images = np.zeros((rows, *dataset.train.images.shape[1:]), np.uint8)
    memory = measure_memory(training, images, np.zeros(rows, np.int32))
    of_system = memory_findings(memory) if memory else []
    of_system += disk_findings(out, training, settings.keep) if training.place else []
    if not is_first():
        return
    warnings = [finding for finding in of_data + of_system if finding.severity != "fact"]
    told = of_data + of_system if settings.dry_run else of_system
    facts = [finding for finding in told if finding.severity == "fact"]
    for findings, file in ((warnings, sys.stderr), (facts, sys.stdout)):
        if findings:
            print(format_findings(findings), file=file)
    if settings.dry_run:
        print("nothing was trained: --dry-run")


def refuse_other_run(out: Path, config: dict[str, Any], defaults: RunSettings) -> None:
    """Raises a ValueError that says in which settings the run in a folder is another one; warns of other versions."""
    try:
        earlier = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        settings, data = earlier["settings"], earlier["input"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out / CONFIG} cannot be read ({error}): --resume cannot know what run this was") from error
    if settings.get("keep") == 0:
        raise ValueError(f"{out} holds a run without checkpoints, made with --keep 0: only --overwrite begins it anew")
    # A run that was begun before a setting existed was trained at its default.
    settings = {field.name: field.default for field in dataclasses.fields(defaults)} | settings
    different = [
        f"--{name.replace('_', '-')} {settings.get(name)} there, {value} here"
        for name, value in config["settings"].items()
        if name not in FREE and settings.get(name) != value
    ]
    if not different:
        facts = {"class_names": "classes", "mean": "mean", "std": "deviation", "image_size": "picture size"}
        different = [f"the data's {what}" for name, what in facts.items() if data.get(name) != config["input"][name]]
        if earlier.get("data", {}).get("train_used") != config["data"]["train_used"]:
            different.append("the number of training pictures")
    if different:
        raise ValueError(
            f"{out} holds a run with other settings: {'; '.join(different)}. --resume goes on with the same ones"
        )
    now = environment()["versions"]
    others = [
        f"{name} {version} then, {now.get(name)} now"
        for name, version in earlier.get("versions", {}).items()
        if name in NUMERIC_PACKAGES and now.get(name) != version
    ]
    if others:
        warn(f"not bit for bit as without the break: {', '.join(others)}")
    if (device := earlier.get("device")) != config["device"]:
        warn(f"not bit for bit as without the break: it ran on {device}, and goes on on {config['device']}")


def restore_run(settings: RunSettings, training: Training, out: Path) -> Restored | None:
    """The last good checkpoint of the run to go on with, after saying which; None to begin."""
    if not settings.resume:
        return None
    path = out / CHECKPOINTS
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is no folder")
    checkpoints = Checkpoints(path)
    restored = last_good(checkpoints, training.state)
    if restored is None and (steps := checkpoints.steps()):
        raise ValueError(f"none of the {len(steps)} checkpoints in {path} can be read: move them away to begin anew")
    if restored is not None and set(restored.facts) != {*Progress._fields, "settings"}:
        facts = ", ".join(restored.facts)
        raise ValueError(f"{path / str(restored.step)} is not of a run of this program: its facts are {facts}")
    if restored is None:
        print(f"{out} has no complete checkpoint: starting at step 0")
    else:
        print(f"going on at step {restored.step} with {path / str(restored.step)}")
    return restored


def write_weights(path: Path, training: Training, state: State, description: dict[str, Any]) -> None:
    """Writes a run's weight file, and that of their averages; what `describe_input` says is JSON in its metadata."""
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in description.items()}
    write_arrays(path / WEIGHTS, training.arrays(state.params, state.batch_stats), metadata=metadata)
    if (averages := training.averages(state)) is not None:
        write_arrays(path / AVERAGED_WEIGHTS, training.arrays(*averages), metadata=metadata)


def plot_report(path: Path, title: str, dataset: Dataset, results: Results | None) -> None:
    """Draws the curves of a run folder; once there are test results, writes them and draws some with their pictures."""
    plot_curves(path / CURVES, read_metrics(path), title)
    if results is None:
        return
    test = dataset.test
    write_test_results(path / TEST_RESULTS, results, test)
    chosen = np.random.default_rng(0).permutation(len(test))[:PICTURES_SHOWN]
    plot_predictions(
        path / PREDICTIONS,
        test.images[chosen],
        [dataset.class_names[i] for i in test.labels[chosen]],
        [dataset.class_names[i] for i in results["prediction"][chosen]],
        results["confidence"][chosen],
        f"{title}: {len(chosen)} of {len(test):,} test pictures",
    )
