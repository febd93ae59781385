"""A training run around its loop, as all programs that train have it: folder, last words, report, exit code."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.data.dataset import Dataset
from experiments.frameworks import Training
from experiments.plots import plot_curves, plot_predictions
from experiments.run_folder import (
    CONFIG,
    CURVES,
    METRICS,
    PREDICTIONS,
    STEP_SIZES,
    WEIGHTS,
    RunFolder,
    read_metrics,
)
from experiments.settings import RunSettings
from experiments.training import DivergedError, Results, State, count_steps, fit
from jax_resnet.weights import write_arrays

BAD_INPUT, DIVERGED, INTERRUPTED = 2, 1, 130  # exit codes; 130 is the shell's for Ctrl-C
PICTURES_SHOWN = 24


def exit_code(run: Callable[[], bool]) -> int:
    """Runs a program to its end, whose mistakes become one line on stderr.

    Args:
      run: returns False if Ctrl-C ended it. A DivergedError is a failed training; a ValueError or OSError is bad input,
        with a message for the person who gave it.

    Returns:
      the exit code.
    """
    try:
        return 0 if run() else INTERRUPTED
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


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
) -> bool:
    """Trains in a new run folder and says what was reached.

    Args:
      settings: of the program.
      dataset: what to train and to test on.
      training: where it begins; consumed.
      title: see `title_of`.
      name: of the folder in runs/, a time is added; unless --out says where it is.
      description: see `describe_input`.
      write_report: writes weights and pictures into the folder, given its path, the state and the last test results.

    Returns:
      whether all epochs were run; False after Ctrl-C.

    Raises:
      DivergedError: when a loss is not finite.
    """
    started = time.perf_counter()
    out = settings.out or Path("runs") / f"{name.replace(' ', '-').lower()}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = RunFolder(out)
    folder.write_config(
        {
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()},
            "data": {"title": dataset.title} | dataset.source | {"train_used": len(dataset.train)},
            "input": description,
            "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(training.state.params)),
            "steps_per_epoch": count_steps(dataset.train, settings.batch_size),
            "device": training.device,
        }
    )
    finished = fit(
        training.state,
        training.train_step,
        training.eval_step,
        dataset,
        folder,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        log_every=settings.log_every,
        report=functools.partial(write_report, out),
    )
    folder.close()
    tested = [row for row in read_metrics(out) if "test_top1" in row]
    reached = f"{tested[-1]['test_top1']:.1%} top-1 of {len(dataset.test):,} test pictures" if tested else "no test yet"
    took = time.perf_counter() - started
    files = ", ".join(n for n in (CONFIG, METRICS, CURVES, PREDICTIONS, STEP_SIZES, WEIGHTS) if (out / n).exists())
    print(
        f"{title}: {reached} after {len(tested)} of {settings.epochs} epochs, {took // 60:.0f} min {took % 60:.0f} s; "
        f"in {out} are {files}"
    )
    return finished


def write_weights(path: Path, arrays: dict[str, np.ndarray], description: dict[str, Any]) -> None:
    """Writes a run's weight file, {torchvision's name: array}; what `describe_input` says is JSON in its metadata."""
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in description.items()}
    write_arrays(path / WEIGHTS, arrays, metadata=metadata)


def plot_report(path: Path, title: str, dataset: Dataset, results: Results | None) -> None:
    """Draws the curves of a run folder, and some test pictures with their predictions once there are test results."""
    plot_curves(path / CURVES, read_metrics(path), title)
    if results is None:
        return
    test = dataset.test
    chosen = np.random.default_rng(0).permutation(len(test))[:PICTURES_SHOWN]
    plot_predictions(
        path / PREDICTIONS,
        test.images[chosen],
        [dataset.class_names[i] for i in test.labels[chosen]],
        [dataset.class_names[i] for i in results["prediction"][chosen]],
        results["confidence"][chosen],
        f"{title}: {len(chosen)} of {len(test):,} test pictures",
    )
