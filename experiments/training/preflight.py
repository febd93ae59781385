"""Before the first step: what is wrong with the data, whether the memory and the disk suffice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.data.check import Finding, check_dataset
from experiments.data.dataset import DataError, Dataset
from experiments.frameworks.common import Training


def check_data(dataset: Dataset, thoroughly: bool) -> list[Finding]:
    """What is to be known of a data set; its errors end the run.

    Args:
      dataset: every pixel of it is looked at.
      thoroughly: also where each picture would have to be decoded for that.

    Raises:
      DataError: it is not to be trained on.
    """
    if not thoroughly and not isinstance(dataset.train.images, np.ndarray):
        return []
    findings = check_dataset(dataset)
    errors = [finding.text for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError("\n".join(errors))
    return findings


def measure_memory(training: Training, images: np.ndarray, labels: np.ndarray) -> dict[str, int]:
    """Compiles the training step, which the run needs in any case, and asks XLA what it takes.

    Args:
      training: in JAX.
      images, labels: a batch of this process.

    Returns:
      bytes on one device: "parameters", "optimizer" (its state and averages), "activations" (and all else that lives
      within a step), "all".
    """
    state = training.state
    analysis = training.train_step.lower(state, *training.put(images, labels)).compile().memory_analysis()
    parameters = _bytes(state.params) + _bytes(state.batch_stats)
    rest = _bytes(state) - parameters
    inside = getattr(analysis, "temp_size_in_bytes", 0)
    return {
        "parameters": parameters,
        "optimizer": rest,
        "activations": inside,
        "all": parameters + rest + inside,
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe_memory(memory: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {memory[name] / 1e6:,.0f} MB" for name in ("parameters", "optimizer", "activations"))
    return f"memory of a device: {memory['all'] / 1e6:,.0f} MB ({parts})"


def memory_findings(memory: dict[str, int]) -> list[Finding]:
    """The memory that a step takes, and whether it is there."""
    found = [Finding("fact", describe_memory(memory))]
    there = _device_memory()
    if there is not None and memory["all"] > there:
        found.append(
            Finding(
                "warning",
                f"the device has {there / 1e6:,.0f} MB: this will likely fail; try a smaller --batch-size, "
                "--accumulate, --remat or --precision bfloat16",
            )
        )
    return found


def _device_memory() -> int | None:
    """Bytes of the device's memory, or of the machine's for a CPU; None where nobody says."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def disk_findings(folder: Path, training: Training, keep: int) -> list[Finding]:
    """The size of the checkpoints, and whether they fit; one is written before another is removed."""
    if not keep:
        return [Finding("fact", "no checkpoints: --keep 0")]
    one = _bytes(training.state)
    most = one * (keep + 2)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"checkpoints of {one / 1e6:,.0f} MB, up to {most / 1e6:,.0f} MB at once; {free / 1e6:,.0f} MB are free"
    return [Finding("warning" if free < most else "fact", text)]
