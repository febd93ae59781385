"""Checks before the first step: errors in the data, and whether memory and disk space suffice."""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.data.check import Finding, check_dataset, format_findings
from experiments.data.dataset import DataError, Dataset
from experiments.frameworks.common import Training
from experiments.training.run_folder import nearest
from experiments.training.settings import RunSettings


def report_findings(settings: RunSettings, dataset: Dataset, training: Training, out: Path) -> None:
    """Prints what checks of data, memory and disk found; facts about the data only with --dry-run.

    Raises:
      DataError: the data has errors.
    """
    dry_run, said = settings.system.dry_run, dataset.source.get("notes", [])  # already printed when the data was read
    of_data = check_dataset(dataset)
    if errors := [finding.text for finding in of_data if finding.severity == "error"]:
        raise DataError("\n".join(errors))
    of_system = system_findings(settings, dataset, training, out) if training.in_jax else []
    warnings = [f for f in of_data + of_system if f.severity != "fact" and f.text not in said]
    facts = [f for f in (of_data if dry_run else []) + of_system if f.severity == "fact"]
    for findings, file in ((warnings, sys.stderr), (facts, sys.stdout)):
        if findings:
            print(format_findings(findings), file=file)
    if dry_run:
        print("nothing was trained: --dry-run")


def system_findings(settings: RunSettings, dataset: Dataset, training: Training, out: Path) -> list[Finding]:
    """Finds the memory that a step takes on one device and the size of checkpoints, and whether there is room for both.

    Compiles the training step, which the run needs anyway, and asks XLA for its memory.
    """
    state, rows, keep = training.state, settings.experiment.batch_size // jax.process_count(), settings.system.keep
    batch = (np.zeros((rows, *dataset.train.images.shape[1:]), np.uint8), np.zeros(rows, np.int32))
    analysis = training.train_step.lower(state, *training.put(*batch)).compile().memory_analysis()
    parameters = _bytes(state.params) + _bytes(state.batch_stats)
    # Averages count as the optimizer's. On a CPU, the peak of a step with few images is its updates, not activations.
    parts = {"parameters": parameters, "optimizer": _bytes(state) - parameters}
    parts["within a step"] = getattr(analysis, "temp_size_in_bytes", 0)
    needed, there = sum(parts.values()), _device_memory()
    told = ", ".join(f"{name} {_megabytes(size)}" for name, size in parts.items())
    found = [Finding("fact", f"memory of a device: {_megabytes(needed)} ({told})")]
    if there is not None and needed > there:
        advice = "try a smaller --batch-size, --accumulate, --remat or --precision bfloat16"
        found.append(Finding("warning", f"the device has {_megabytes(there)}: this will likely fail; {advice}"))
    if not keep:
        return [*found, Finding("fact", "no checkpoints: --keep 0")]
    one = _bytes(state)
    most, free = one * (keep + 2), shutil.disk_usage(nearest(out)).free  # one is written before another is removed
    text = f"checkpoints of {_megabytes(one)}, up to {_megabytes(most)} at once; {_megabytes(free)} are free"
    return [*found, Finding("warning" if free < most else "fact", text)]


def _device_memory() -> int | None:
    """The device's memory in bytes, for a CPU the machine's available memory; None if unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
