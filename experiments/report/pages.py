"""Writes the tables in the README and in docs/ from the files in results/.

A table stands between `<!-- table WHAT NAMES -->` and `<!-- end of table -->`:

  speed NAME...    time relative to the fastest mode of PyTorch, from bench/NAME-1.json, bench/NAME-2.json, …
  beside-jax NAME  time relative to this project's JAX, from the same files
  parity NAME      the largest errors of a network's pass, from parity/NAME.json
  answer STUDY     what a study's contestants reach, and the difference of the compared two by seed
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.output.page import table
from experiments.report.answer import percent, points
from experiments.report.study_results import read_study

TABLE = re.compile(r"(<!-- table (\S+) ?([^\n]*?) ?-->\n).*?(<!-- end of table -->)", re.S)
NAMES = {"jax": "JAX", "flax": "Flax (linen)", "keras": "Keras on JAX", "numpy": "NumPy", "torch": "PyTorch, eager"}
NAMES |= {"torch.channels_last": "PyTorch, channels_last"}
FRAMEWORKS = {"numpy": "NumPy", "torch_ref": "PyTorch", "torchvision": "torchvision"}
FINAL = "final top-1 (95% over seeds)"
QUANTITIES = {
    "logits": "logits",
    "loss": "loss",
    "activations": "activations of every block",
    "running statistics": "running statistics",
    "parameter gradients": "every parameter's gradient",
    "image gradient": "gradient of the images",
}


def write_pages(pages: Iterable[Path], results: Path) -> list[Path]:
    """Updates the tables in Markdown files; returns the files that changed.

    Raises:
      ValueError: a table's source is unknown, is missing, or cannot be read.
    """
    changed = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text, results)) != text:
            page.write_text(filled, encoding="utf-8")
            changed.append(page)
    return changed


def fill(text: str, results: Path) -> str:
    """The text of a page, with its tables written from results/.

    Raises:
      ValueError: see write_pages.
    """

    def filled(match: re.Match[str]) -> str:
        what, names = match[2], match[3].split()
        try:
            return match[1] + table(TABLES[what](results, *names)) + "\n" + match[4]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the table `{' '.join([what, *names])}` cannot be written: {error!r}") from error

    return TABLE.sub(filled, text)


def speed_table(results: Path, *names: str) -> list[dict[str, str]]:
    """JAX and NumPy relative to the fastest PyTorch, a row for each measurement and contestant."""
    rows: dict[str, dict[str, str]] = {}
    for name in names:
        for title, of_title in _bench(results, name).items():
            measured, task = _measured(title)
            for contestant in ("jax", "numpy"):
                if ratios := [row["ratio"] for row in of_title.get(contestant, [])]:
                    row = rows.setdefault(f"{measured}: {NAMES[contestant]}", {})
                    row[task] = _range(ratios)
    return [{"": name} | row for name, row in rows.items()]


def beside_jax_table(results: Path, name: str) -> list[dict[str, str]]:
    """All contestants relative to JAX: the median over rounds of the ratio of the medians within a round."""
    rows: dict[str, dict[str, str]] = {}
    for title, of_title in _bench(results, name).items():
        for contestant, measured in of_title.items():
            pairs = zip(measured, of_title["jax"], strict=True)
            ratios = [np.median(_by_round(ours) / _by_round(jax)) for ours, jax in pairs]
            rows.setdefault(NAMES[contestant], {})[_measured(title)[1]] = _range(ratios)
    return [{"": name} | row for name, row in rows.items() if name != NAMES["jax"]]


def _bench(results: Path, name: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{title: {contestant: its row in each file}}; "seconds" has a row's times."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted((results / "bench").glob(f"{name}-[0-9].json")):
        try:
            for of_bench in json.loads(file.read_text(encoding="utf-8"))["tables"]:
                of_title = found.setdefault(of_bench["title"], {})
                for contestant, row in of_bench["rows"].items():
                    of_title.setdefault(contestant, []).append(row | {"seconds": of_bench["seconds"][contestant]})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not what experiments.bench --json writes: {error!r}") from error
    if not found:
        raise FileNotFoundError(f"no {name}-1.json in {results / 'bench'}")
    return found


def _by_round(row: dict[str, Any]) -> np.ndarray:
    return np.median(np.asarray(row["seconds"]), axis=-1)


def _measured(title: str) -> tuple[str, str]:
    """The network with its input, and the task.

    >>> _measured("resnet18, batch 32 of 64x64x3, float32, inference: logits")
    ('ResNet-18, 32 of 64×64×3', 'inference')
    """
    arch, batch, _, task = title.partition(":")[0].split(", ")
    return f"ResNet-{arch.removeprefix('resnet')}, {batch.removeprefix('batch ').replace('x', '×')}", task


def _range(values: Iterable[float]) -> str:
    """
    >>> _range([0.943, 0.934, 0.949]), _range([1.0, 1.001])
    ('0.93 to 0.95', '1.00')
    """
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def parity_table(results: Path, name: str) -> list[dict[str, str]]:
    """The largest error of each quantity in float64, in training and, after a slash, in evaluation."""
    report = json.loads((results / "parity" / f"{name}.json").read_text(encoding="utf-8"))
    errors = {
        (row["what"], row["framework"]): f"{row['error']:.1e}" for rows in report["tables"].values() for row in rows
    }
    return [
        {"": said}
        | {
            column: " / ".join(errors[f"{quantity}, {mode}, float64", framework] for mode in ("train", "eval"))
            for framework, column in FRAMEWORKS.items()
        }
        for quantity, said in QUANTITIES.items()
    ]


def answer_table(results: Path, study: str) -> list[dict[str, str]]:
    """What each contestant reaches, the range of its tuning trials, and the difference of the compared two by seed."""
    found = read_study(results / study)
    rows = []
    for contestant in found.contestants:
        if final := contestant.by_seed():
            tuned = [trial.accuracy() for trial in contestant.ended_tuning]  # 0 for a failed one
            trials = f"{len(tuned)}: {min(tuned):.1%} to {max(tuned):.1%}" if tuned else ""
            columns = {FINAL: percent(contestant.interval()), "seeds": str(len(final)), "trials, held out": trials}
            rows.append({"": contestant.name} | columns)
    ours, theirs = found.compared
    difference = found.answers[ours][0]
    return [*rows, {"": f"{ours} minus {theirs}, by seed", FINAL: points(difference), "seeds": str(difference.count)}]


TABLES: dict[str, Callable[..., list[dict[str, str]]]] = {
    "speed": speed_table,
    "beside-jax": beside_jax_table,
    "parity": parity_table,
    "answer": answer_table,
}
