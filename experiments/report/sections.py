"""What the report says about a study: words, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.output.page import Block, picture, table
from experiments.report import curves
from experiments.report.analysis import paired_difference, reached, verdict
from experiments.report.answer import answer, answer_row, limits, percent, points
from experiments.report.grids import Grid, find_grids, grid_differences, plot_grid
from experiments.report.study_results import Contestant, StudyResults, Trial
from experiments.report.upper_bound import plot_upper_bounds, upper_bound_rows
from experiments.study_files import slug

MEASURES = {"top1": "final top-1", "best_top1": "best epoch", "top5": "top-5", "macro_f1": "macro-F1"}


def overview(studies: list[StudyResults], in_words: list[str]) -> Iterator[Block]:
    """The top of the report: the answer, its table, and the picture that explains it.

    Args:
      studies: all of them.
      in_words: hand-written paragraphs of the answer; without them, the studies' numbers give the answer.
    """
    for text in in_words or filter(None, map(answer, studies)):
        yield f"> {text}"
    if rows := [row for row in map(answer_row, studies) if row]:
        yield table(rows)
    caption = (
        "AdaBound's upper bound at the end of a run, divided by the median step that Adam takes there. Each dot is a "
        "run of AdaBound, or a tuning trial, beside an Adam run at a similar learning rate; a line connects the runs "
        "of a study that varies final_lr or gamma. Far below 1, AdaBound is SGD with momentum at that rate, which may "
        "be too slow; far above 1, it is Adam, unless its lower bound ends above Adam's step as well (crosses): then "
        "the ratio alone says little."
    )
    yield from _picture("upper-bound", plot_upper_bounds(studies), caption)


def upper_bound_section(studies: list[StudyResults]) -> Iterator[Block]:
    """The numbers behind the picture of the overview."""
    if rows := upper_bound_rows(studies):
        yield (
            "Final top-1 of AdaBound's runs (their number in brackets), by AdaBound's final upper bound divided by "
            "Adam's median step. The final upper bound is final_lr · (1 + 1 / (gamma · T)) after T updates. Adam's "
            "median step is the median over layers of each layer's median learning_rate / sqrt(v) after the last "
            "epoch, in the Adam run beside it. That is a run of the same study, or of one that it is shown beside: the "
            "one with the nearest learning rate (at most a factor of 1.5 away), and of these the one with the most "
            "settings in common. Compare within a row: studies differ in data, network and length. Runs are left out "
            "where Adam stays below four times the top-1 of guessing, or below 50% if that is less."
        )
        yield table(rows)


def study_section(results: StudyResults) -> Iterator[Block]:
    """Everything that a study has shown."""
    if text := answer(results):
        yield text
    yield " ".join(results.about.split())
    ended = [trial for trial in results.trials if trial.state == "done"]
    data = " --data DIR" if any(trial.config["settings"]["data"] for trial in ended) else ""
    again = f"--out runs/again/{results.name}"  # without --out the command would continue the published study
    yield f"```\npython -m experiments.study experiments/protocols/{results.name}.toml{data} {again}\n```"
    yield from _counts(results)
    if ended:
        yield _where(ended)
    trained = [contestant for contestant in results.contestants if contestant.by_seed()]
    if not trained:
        yield from _tuning(results)
        return
    if results.absent:
        yield f"Not in the same folder: {', '.join(results.absent)}, with contestants that belong beside these."
    grids = find_grids(results.contestants)
    in_grids = [contestant.name for grid in grids for contestant in grid.cells.values()]
    if listed := [contestant for contestant in trained if contestant.name not in in_grids]:
        yield from _listed(results, listed)
    yield from _chosen_settings(results, trained)
    if results.compared and results.measure == "top1":
        yield from _differences(results)
        yield limits(results)
    yield from _pictures(results, trained, grids)


def _counts(results: StudyResults) -> Iterator[Block]:
    """What was run, what failed, and what was not run."""
    trials = results.trials
    count = {state: sum(trial.state == state for trial in trials) for state in ("done", "failed", "open", "begun")}
    missing = count["open"] + count["begun"]
    rest = f" {missing} have not been run to their end." if missing else " Nothing is left to run."
    yield (
        f"{len(trials)} runs: {count['done']} reached their end, {count['failed']} failed.{rest} Each is in trials.csv."
    )
    failures = [
        {"run": t.columns["folder"], "what was drawn": _drawn(results, t), "why": t.columns.get("error", "")[:160]}
        for t in trials
        if t.state == "failed"
    ]
    if failures:
        yield table(failures)
    for contestant in results.contestants:
        if contestant.tuning and all(trial.state == "failed" for trial in contestant.tuning):
            yield f"{contestant.name}: no tuning run reached its end, so there is no setting for final runs."


def _where(ended: list[Trial]) -> str:
    """The devices, versions and commits with which the runs were trained."""
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


def _listed(results: StudyResults, contestants: list[Contestant]) -> Iterator[Block]:
    """What each contestant reached, and how to read it."""
    yield table([_row(results, contestant) for contestant in contestants])
    said = ["The final epoch counts; the best one is chosen on the test pictures, so it is too optimistic."]
    if any(len(contestant.by_seed()) > 1 for contestant in contestants):
        said.insert(0, "Means with 95% intervals (Student's) over seeds.")
    if results.targets:
        said.append(
            "Epochs and seconds to a target are medians over seeds, with the number of runs that reached it if not all "
            "did. Seconds are those of one run while others ran beside it."
        )
    if any(contestant.failed for contestant in contestants):
        said.append("A training that failed counts as 0.")
    if beside := [contestant.name for contestant in contestants if contestant.beside]:
        said.append(f"From another study: {', '.join(beside)}.")
    yield " ".join(said)


def _row(results: StudyResults, contestant: Contestant) -> dict[str, str]:
    failed = f", {len(contestant.failed)} failed" if contestant.failed else ""
    row = {"": contestant.name, "runs": f"{len(contestant.by_seed())}{failed}"}
    row |= {title: percent(contestant.interval(column)) for column, title in MEASURES.items()}
    for target in results.targets:
        times = [reached(trial.epochs, target) for trial in contestant.finals]
        times += [(math.inf, math.inf)] * len(contestant.failed)
        epochs, seconds = np.median(times, axis=0)
        count = sum(not math.isinf(of_run) for of_run, _ in times)
        said = [] if math.isinf(epochs) else [f"{epochs:g} epochs, {seconds:.0f} s"]
        said += [f"{count} of {len(times)}"] if count < len(times) else []
        row[f"to {target:.0%}"] = ", ".join(said) if count else "never"
    return row


def _chosen_settings(results: StudyResults, trained: list[Contestant]) -> Iterator[Block]:
    """What tuning chose; a star where no larger or no smaller value was tried."""
    rows = []
    for contestant in trained:
        if not contestant.tuning:
            continue
        columns, row = contestant.final[0].columns, {"": contestant.name}
        for field in results.searched:
            tried = [trial.number(field) for trial in contestant.tuning if field in trial.columns]
            edge = field in columns and (value := float(columns[field])) and value in (min(tried), max(tried))
            row[field.replace("_", " ")] = f"{_short(columns.get(field, '-'))}{' *' if edge else ''}"
        again = results.chosen_again(contestant)
        rows.append(row | {"chosen again": "-" if again is None else f"{again:.0%}"})
    if rows:
        by = "loss" if results.chosen_by_loss else "top-1"
        yield f"The settings that tuning chose, by {by} on held-out pictures:"
        yield table(rows)
        yield (
            "A star: no larger or no smaller value was tried, so a better one may lie beyond it (0 gets no star). "
            "Chosen again: how often the same setting would have been chosen on other held-out pictures of the same "
            "kind (a bootstrap). If that is rare, the setting may be no better than others."
        )


def _differences(results: StudyResults) -> Iterator[Block]:
    """Differences from the second of the two compared contestants."""
    if not results.answers:
        return
    ours, baseline = map(results.find, results.compared)
    minus_it = {c.name: points(paired_difference(ours.by_seed(), c.by_seed())) for c in results.contestants}
    yield table(
        [
            {
                "": name,
                f"minus {baseline.name}": points(difference),
                "for other pictures too": points(wider) if wider else "-",
                "so it is": verdict(difference),
                f"{ours.name} minus it": "" if name == ours.name else minus_it[name],
            }
            for name, (difference, wider) in results.answers.items()
        ]
    )
    yield (
        "Paired by seed: same initial weights, same batches. Better or worse: the 95% interval over seeds excludes 0, "
        "and the mean is at least 1 point. Equal: the 90% interval is within 2 points of 0. Intervals are not "
        "corrected for multiple comparisons. The second interval treats the test pictures as a sample as well."
    )
    caption = f"Differences from {baseline.name}: each seed, the mean, and its 95% interval over seeds."
    yield from _picture(f"{results.name}-differences", curves.plot_differences(results, baseline), caption)


def _pictures(results: StudyResults, trained: list[Contestant], grids: list[Grid]) -> Iterator[Block]:
    few = len(trained) <= curves.MOST_CURVES
    if few:
        caption = (
            f"Means over seeds, with 95% intervals for {curves.LEAST_BAND} seeds or more. Losses are cut at "
            f"{curves.MOST_LOSS} times the lowest loss after one epoch. The share of weights at AdaBound's upper bound "
            "is, in effect, the share that SGD trains."
        )
        yield from _picture(f"{results.name}-curves", curves.plot_curves(trained), caption)
    yield from _tuning(results)
    yield from _grids(results, grids)
    if few:
        caption = (
            "Each layer's median step divided by AdaBound's upper bound, by epoch (first seed). Red: above the bound, "
            "where AdaBound would clip the step. Blue: below. White: at the bound, where AdaBound clips its own. "
            "For an optimizer without bounds, the bound follows from its run's final_lr and gamma."
        )
        yield from _picture(f"{results.name}-step-map", curves.plot_step_map(trained), caption)


def _grids(results: StudyResults, grids: list[Grid]) -> Iterator[Block]:
    for grid in grids:
        trained = [cell for cell in grid.cells.values() if cell.by_seed()]
        if not trained:
            continue
        yield from _listed(results, trained)
        if rows := grid_differences(grid):
            yield "Final top-1 of each optimizer minus the first, paired by seed, for each value of the other axes."
            yield table(rows)
        caption = "Final top-1: means over seeds, with 95% intervals where there are several."
        yield from _picture(f"{results.name}-{slug(grid.name)}-grid", plot_grid(grid), caption)


def _tuning(results: StudyResults) -> Iterator[Block]:
    caption = (
        "Tuning: every trial, by each setting that was drawn for it; crosses are failed trials. AdamW's weight decay "
        "is decoupled from the gradient; that of the others is L2."
    )
    yield from _picture(f"{results.name}-tuning", curves.plot_tuning(results), caption)
    caption = "What tuning is worth: the best of k trials, averaged over all choices of k trials."
    yield from _picture(f"{results.name}-tuning-effort", curves.plot_tuning_effort(results), caption)


def _picture(name: str, figure: Figure | None, caption: str) -> Iterator[Block]:
    if figure is not None:
        yield picture(name, caption, figure)
