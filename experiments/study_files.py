"""The files of a study that its report reads: the names, and the rows of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.run_folder import METRICS, read_metrics

PROTOCOL, TRIALS = "protocol.toml", "trials.csv"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics that end an epoch; [] if there are none yet."""
    if not (folder / METRICS).exists():
        return []
    return [row for row in read_metrics(folder) if "test_top1" in row]
