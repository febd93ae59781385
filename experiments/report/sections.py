"""What the report says of a study, and of the benchmarks: words, tables and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from experiments.data.dataset import Dataset
from experiments.output.page import figure_bytes
from experiments.output.tables import as_text
from experiments.report import figures
from experiments.report.analysis import confusions, paired_difference, reached, verdict
from experiments.report.answer import limits, percent, points
from experiments.report.blocks import Block, Command, Heading, Picture, Text, TextTable
from experiments.report.grids import Grid, find_grids, grid_differences, plot_grid, plot_grid_curves
from experiments.report.study_results import Contestant, StudyResults, Trial
from experiments.study_files import slug
from experiments.training.prepare import load_cars
from experiments.training.settings import Settings

CONFUSED_SHOWN = 8
MEASURES = {"top1": "final top-1", "best_top1": "best epoch", "top5": "top-5", "macro_f1": "macro-F1"}


def study_section(results: StudyResults, dataset_folder: Path | None) -> Iterator[Block]:
    """All that a study has shown."""
    yield Heading(results.name)
    yield Text(" ".join(results.about.split()))
    ended = [trial for trial in results.trials if trial.state == "done"]
    data = " --data DIR" if any(trial.config["settings"]["data"] for trial in ended) else ""
    again = f"--out runs/again/{results.name}"  # without it the command goes on with what is published
    yield Command(f"python -m experiments.study experiments/protocols/{results.name}.toml{data} {again}")
    yield from _counts(results)
    if ended:
        yield Text(_where(ended))
    trained = [contestant for contestant in results.contestants if contestant.by_seed()]
    if not trained:
        yield from _tuning(results)
        return
    if results.absent:
        yield Text(f"Not in the same folder: {', '.join(results.absent)}, with contestants that belong beside these.")
    grids = find_grids(results.contestants)
    in_grids = [contestant.name for grid in grids for contestant in grid.cells.values()]
    if listed := [contestant for contestant in trained if contestant.name not in in_grids]:
        yield TextTable([_row(results, contestant) for contestant in listed])
        yield Text(_how_to_read(results, listed))
    if chosen := [_chosen(results, contestant) for contestant in trained if contestant.tuning]:
        by = "loss" if results.chosen_by_loss else "top-1"
        yield Text(
            f"The settings that tuning chose, by {by} on held-out pictures; a star: no larger or no smaller value was "
            "tried (0 has none)."
        )
        yield TextTable(chosen)
        yield Text(
            "Chosen again: how often the same trial would have been chosen on other held-out pictures of their kind (a "
            "bootstrap). Where that is seldom, the setting is one among equals. A value with a star may have a better "
            "one beyond it."
        )
    if results.compared:
        yield from _differences(results)
        yield Text(limits(results))
    yield from _pictures(results, trained, grids)
    yield from _confusions(results, dataset_folder)


def _counts(results: StudyResults) -> Iterator[Block]:
    """What was run, what failed, and what was not run."""
    trials = results.trials
    count = {state: sum(trial.state == state for trial in trials) for state in ("done", "failed", "open", "begun")}
    missing = count["open"] + count["begun"]
    rest = f" {missing} have not been run to their end." if missing else " Nothing is left to run."
    yield Text(
        f"{len(trials)} runs: {count['done']} reached their end, {count['failed']} failed.{rest} Each is in trials.csv."
    )
    failures = [
        {
            "run": trial.columns["folder"],
            "what was drawn": _drawn(results, trial),
            "why": trial.columns.get("error", "")[:160],
        }
        for trial in trials
        if trial.state == "failed"
    ]
    if failures:
        yield TextTable(failures)
    for contestant in results.contestants:
        if contestant.tuning and all(trial.state == "failed" for trial in contestant.tuning):
            yield Text(f"{contestant.name}: no tuning run reached its end, so there is no setting for final runs.")


def _where(ended: list[Trial]) -> str:
    """With what the runs were trained."""
    configs = [trial.config for trial in ended]
    used = [("jax", "jaxlib") if c["settings"]["framework"] == "jax" else ("torch", "torchvision") for c in configs]
    versions = {f"{name} {c['versions'][name]}" for c, names in zip(configs, used, strict=True) for name in names}
    devices = {_device(config["device"]) for config in configs}
    commits = dict.fromkeys(c["git_commit"] or "unknown" for c in configs)
    return (
        f"Device of each run: {' or '.join(sorted(devices))}. {', '.join(sorted(versions))}. Commits: "
        f"{', '.join(f'{commit[:7]}{commit[40:]}' for commit in commits)}."
    )


def _device(device: dict[str, Any]) -> str:
    if device["platform"] != "cpu":
        return f"{device['count']} {device['kind']}"
    cores = device.get("cores", device["count"])
    return f"{cores} core{'s' * (cores > 1)} of {device.get('processor', 'a CPU that was not recorded')}"


def _drawn(results: StudyResults, trial: Trial) -> str:
    return ", ".join(f"{name} {_short(trial.columns[name])}" for name in results.searched if name in trial.columns)


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text


def _row(results: StudyResults, contestant: Contestant) -> dict[str, str]:
    failed = f", {len(contestant.failed)} failed" if contestant.failed else ""
    row = {"": contestant.name, "runs": f"{len(contestant.by_seed())}{failed}"}
    row |= {title: percent(contestant.interval(column)) for column, title in MEASURES.items()}
    for target in results.targets:
        times = [reached(trial.rows, target) for trial in contestant.finals]
        times += [(math.inf, math.inf)] * len(contestant.failed)
        epochs, seconds = np.median(times, axis=0)
        count = sum(not math.isinf(of_run) for of_run, _ in times)
        said = [] if math.isinf(epochs) else [f"{epochs:g} epochs, {seconds:.0f} s"]
        said += [f"{count} of {len(times)}"] if count < len(times) else []
        row[f"to {target:.0%}"] = ", ".join(said) if count else "never"
    return row


def _how_to_read(results: StudyResults, listed: list[Contestant]) -> str:
    said = ["The final epoch is what counts; the best one is chosen on the test pictures, and flatters."]
    if any(len(contestant.by_seed()) > 1 for contestant in listed):
        said.insert(0, "Means with 95% intervals (Student's) over seeds.")
    if results.targets:
        said.append(
            "Epochs and seconds to a target are medians over seeds, infinite where it was never reached, and left out "
            "if they are; then how many of the runs reached it, if not all. Seconds are those of one run beside others."
        )
    if any(contestant.failed for contestant in listed):
        said.append("A training that failed counts as 0.")
    if beside := [contestant.name for contestant in listed if contestant.beside]:
        said.append(f"Of another study: {', '.join(beside)}.")
    return " ".join(said)


def _chosen(results: StudyResults, contestant: Contestant) -> dict[str, str]:
    """What tuning chose; a star where no larger or no smaller value was tried."""
    columns = contestant.final[0].columns
    row = {"": contestant.name}
    for field in results.searched:
        tried = [trial.number(field) for trial in contestant.tuning if field in trial.columns]
        edge = field in columns and (value := float(columns[field])) and value in (min(tried), max(tried))
        row[field.replace("_", " ")] = f"{_short(columns.get(field, '-'))}{' *' if edge else ''}"
    again = results.chosen_again(contestant)
    return row | {"chosen again": "-" if again is None else f"{again:.0%}"}


def _differences(results: StudyResults) -> Iterator[Block]:
    """Against the second of the two that are compared."""
    baseline = results.find(results.compared[1])
    if not baseline.by_seed():
        return
    words = {"better": "better", "worse": "worse", "tie": "tie", "unknown": "one run"}
    ours = results.find(results.compared[0])
    minus_it = {c.name: points(paired_difference(ours.by_seed(), c.by_seed())) for c in results.contestants}
    rows = [
        {
            "": name,
            f"minus {baseline.name}": points(difference),
            "for other pictures too": points(wider) if wider else "-",
            "so it is": words[verdict(difference)],
            f"{ours.name} minus it": "" if name == ours.name else minus_it[name],
        }
        for name, (difference, wider) in results.answers.items()
    ]
    if not rows:
        return
    yield TextTable(rows)
    yield Text(
        "Paired by seed: same first weights, same batches. A tie is an interval over seeds that holds 0, or a "
        "difference below 0.3 points; intervals are not corrected for how many there are. The second interval takes "
        "the test pictures for a sample as well: the difference may be that on other pictures of these classes."
    )
    caption = f"Differences from {baseline.name}: each seed, the mean, and its 95% interval over seeds."
    yield _picture(results, "differences", figures.plot_differences(results, baseline), caption)


def _pictures(results: StudyResults, trained: list[Contestant], grids: list[Grid]) -> Iterator[Block]:
    few = len(trained) <= figures.MOST_CURVES
    if few:
        caption = (
            f"Curves: means over seeds, and their 95% intervals from {figures.LEAST_BAND} seeds on. Losses end at "
            f"{figures.MOST_LOSS} times the lowest after one epoch; what goes beyond that has no band."
        )
        yield _picture(results, "curves", figures.plot_curves(trained), caption)
    yield from _tuning(results)
    yield from _grids(results, grids)
    if not few:
        return
    if (figure := figures.plot_steps(trained)) is not None:
        caption = (
            "What AdaBound's step is. Left: the share of all weights whose step before clipping is at a bound or "
            "beyond it (mean over seeds). Right, of the first seed: the step on the averaged gradient, median over "
            "layers of each layer's median, with 5% to 95% of the layers; dashed: AdaBound's bounds; dash-dotted: SGD "
            "with momentum has one step for all. At the peak learning rate, wherever the schedule is."
        )
        yield _picture(results, "steps", figure, caption)
    if (figure := figures.plot_layer_steps(trained)) is not None:
        caption = (
            "The median step of each layer after the last epoch, from the stem to the dense layer (first seed), given "
            "for the peak learning rate: a schedule has scaled all of them down by then."
        )
        yield _picture(results, "layer-steps", figure, caption)
    if (figure := figures.plot_step_map(trained)) is not None:
        caption = (
            "Each layer's median step over AdaBound's upper bound, by epoch (first seed): red is above, where AdaBound "
            "would cut it, blue below. AdaBound's own is white where it is cut. One without bounds is compared with "
            "those of its run's settings."
        )
        yield _picture(results, "step-map", figure, caption)


def _grids(results: StudyResults, grids: list[Grid]) -> Iterator[Block]:
    for grid in grids:
        trained = [cell for cell in grid.cells.values() if cell.by_seed()]
        if not trained:
            continue
        yield TextTable([_row(results, cell) for cell in trained])
        yield Text(_how_to_read(results, trained))
        if rows := grid_differences(grid):
            yield Text("Final top-1, by what else differs: each optimizer minus the first, paired by seed.")
            yield TextTable(rows)
        caption = "Final top-1: means over seeds, with 95% intervals where there are several."
        yield _picture(results, f"{slug(grid.name)}-grid", plot_grid(grid), caption)
        for column, title, bounded in (
            ("test_top1", "test top-1", False),
            ("at_upper", "share of weights whose step is at the upper bound", True),
        ):
            if (figure := plot_grid_curves(grid, column, title, bounded=bounded)) is not None:
                yield _picture(results, f"{slug(grid.name)}-{column}", figure, f"By epoch: {title}.")


def _tuning(results: StudyResults) -> Iterator[Block]:
    if (figure := figures.plot_tuning(results)) is not None:
        caption = (
            "Tuning: every trial, by each setting that was drawn for it; crosses are those that failed. AdamW's weight "
            "decay is of the weights themselves, the others' is L2 in the gradient."
        )
        yield _picture(results, "tuning", figure, caption)
    if (figure := figures.plot_tuning_effort(results)) is not None:
        caption = (
            "What tuning is worth: the best of so many of the trials, on average over all choices of them. The right "
            "end is the best single one, whatever more would have brought."
        )
        yield _picture(results, "tuning-effort", figure, caption)


def _picture(results: StudyResults, name: str, figure: plt.Figure, caption: str) -> Picture:
    return Picture(f"{results.name}-{name}.png", caption, figure_bytes(figure, "png"))


def _confusions(results: StudyResults, dataset_folder: Path | None) -> Iterator[Block]:
    """Which classes the two that are compared take for one another, all seeds together."""
    if not results.compared:
        return
    pair = [c for c in map(results.find, results.compared) if c.finals]
    if not pair or not all(trial.has_test_results for c in pair for trial in c.finals):
        return
    names = pair[0].finals[0].config["input"]["class_names"]
    counts = {}
    for contestant in pair:
        of_runs = [trial.test_results for trial in contestant.finals]
        labels, predictions = (np.concatenate([r[column] for r in of_runs]) for column in ("label", "prediction"))
        counts[contestant.name] = confusions(labels, predictions, len(names))
    figure, axes = plt.subplots(1, len(counts), figsize=(6.8 * len(counts), 6.6), layout="constrained", squeeze=False)
    for axis, (name, of_it) in zip(axes[0], counts.items(), strict=True):
        figures.plot_confusions(of_it, names, name, axis)
    yield _picture(results, "confusions", figure, "Which class is taken for which, all seeds together.")
    for name, of_it in counts.items():
        wrong = of_it - np.diag(np.diag(of_it))
        order = np.argsort(wrong / of_it.sum(1, keepdims=True), axis=None)[::-1][:CONFUSED_SHOWN]
        found = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
        if not found:
            continue
        yield TextTable(
            [
                {
                    f"{name}: is": names[i],
                    "taken for": names[j],
                    "of its pictures": f"{wrong[i, j] / of_it[i].sum():.0%}",
                }
                for i, j in found
            ]
        )
        if dataset_folder is not None:
            contestant = results.find(name)
            dataset = _dataset(contestant, dataset_folder)
            figure = plot_confused(contestant, dataset, found)
            caption = (
                f"{name}: above a picture that was taken for the class below it (first seed), and one of that class."
            )
            yield _picture(results, f"confused-{slug(name)}", figure, caption)


def _dataset(contestant: Contestant, folder: Path) -> Dataset:
    """The pictures that a contestant's runs were tested on."""
    known = contestant.finals[0].config["settings"]
    chosen = {name: known[name] for name in ("preset", "arch", "image_size", "grey", "classes", "seed")}
    return load_cars(Settings().replace(**chosen, data=None if known["preset"] == "demo" else folder))


def plot_confused(contestant: Contestant, dataset: Dataset, pairs: list[tuple[int, int]]) -> plt.Figure:
    """Above a picture that was taken for another class, below one of that class."""
    results = contestant.finals[0].test_results
    figure, axes = plt.subplots(2, len(pairs), figsize=(1.9 * len(pairs), 4.4), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for column, (label, prediction) in enumerate(pairs):
        wrong = np.flatnonzero((results["label"] == label) & (results["prediction"] == prediction))
        of_other = np.flatnonzero(results["label"] == prediction)
        for axis, indices, name in ((axes[0, column], wrong, label), (axes[1, column], of_other, prediction)):
            if len(indices):
                axis.imshow(np.asarray(dataset.test.images[int(indices[0])]).squeeze(), cmap="gray", vmin=0, vmax=255)
            axis.set_title("\n".join(dataset.class_names[name].rsplit(" ", 2)), fontsize=6, parse_math=False)
    return figure


def speed_section(folder: Path) -> Iterator[Block]:
    """The ratios in the JSON files of `experiments.bench step` in a folder: those of equal measurements side by side.

    Raises:
      ValueError: one is not such a file.
    """
    ratios: dict[str, dict[str, list[str]]] = {}  # by what was measured, then by contestant
    machines = set()
    for file in sorted(folder.glob("*.json")):
        try:
            bench = json.loads(file.read_text(encoding="utf-8"))
            if bench["benchmark"] != "step":
                continue
            machines.add(bench["machine"])
            for table in bench["tables"]:
                measured = table["title"].partition(":")[0]  # what a step consists of is the same in all
                for name, row in table["rows"].items():
                    if "ratio" in row:
                        ratios.setdefault(measured, {}).setdefault(name, []).append(as_text(row["ratio"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not what experiments.bench --json writes: {error!r}") from error
    if not ratios:
        return
    yield Heading("Speed of the implementations")
    names = list(dict.fromkeys(name for of_title in ratios.values() for name in of_title))
    yield TextTable(
        [
            {"": title} | {name: ", ".join(of_title.get(name, [])) for name in names}
            for title, of_title in ratios.items()
        ]
    )
    yield Text(
        "Time over that of the faster form of PyTorch, less is better: one number for each run of experiments.bench "
        f"step, the median of its rounds. Every single time is in {folder}. On {'; '.join(sorted(machines))}."
    )
