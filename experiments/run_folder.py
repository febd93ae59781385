"""What a run leaves behind: config.json, metrics.jsonl and TensorBoard's files."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

CONFIG, METRICS, WEIGHTS = "config.json", "metrics.jsonl", "weights.safetensors"
CURVES, PREDICTIONS, STEP_SIZES = "curves.png", "predictions.png", "step_sizes.png"
FILES = (CONFIG, METRICS, WEIGHTS, CURVES, PREDICTIONS, STEP_SIZES, "step_sizes.json", "events.out.tfevents.*")
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "pillow", "torch", "torchvision")  # as far as installed


def refuse_earlier_run(out: Path | None, overwrite: bool) -> None:
    """Raises a ValueError if a run's folder cannot be made, or holds an earlier run that may not be replaced."""
    if out and earlier_run(out) and not overwrite:
        raise ValueError(f"{out} holds an earlier run: choose another --out, or pass --overwrite")


def earlier_run(path: Path) -> list[Path]:
    """The files of a run that are in a folder, [] if there are none.

    Raises:
      ValueError: if the path is no folder, or one that cannot be made or written.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {path} cannot be written: {there} is {'read-only' if there.is_dir() else 'a file'}")
    return [file for pattern in FILES for file in path.glob(pattern)]


class RunFolder:
    """Writes a run's files as the run goes; every line is on disk when `log` returns.

    Args:
      path: the folder; made if it is not there. The files of an earlier run in it are removed.
    """

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        for file in earlier_run(path):
            file.unlink()
        self._metrics = open(path / METRICS, "w", encoding="utf-8")
        self._board = SummaryWriter(str(path))

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes config.json: `config` and what this machine adds (versions, git commit)."""
        text = json.dumps(config | environment(), indent=2, ensure_ascii=False)
        (self.path / CONFIG).write_text(text + "\n", encoding="utf-8")

    def log(self, row: dict[str, Any]) -> None:
        """Appends one flat object, with "step" and numbers, to metrics.jsonl and to TensorBoard."""
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])
        self._board.flush()

    def close(self) -> None:
        self._metrics.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in (path / METRICS).read_text(encoding="utf-8").splitlines()]


def environment() -> dict[str, Any]:
    """Versions, git commit and machine, as plain JSON values."""
    return {
        "versions": {"python": platform.python_version()} | _versions(),
        "git_commit": _git_commit(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def jax_device() -> dict[str, Any]:
    """Where JAX computes, as plain JSON values."""
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}


def numpy_device() -> dict[str, Any]:
    """Where NumPy computes, and with which library for matrix products, as plain JSON values."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {"platform": "cpu", "kind": f"{blas.get('name')} {blas.get('version')}", "count": os.cpu_count()}


def torch_device() -> dict[str, Any]:
    """Where PyTorch computes, as plain JSON values."""
    import torch

    if torch.cuda.is_available():
        return {"platform": "cuda", "kind": torch.cuda.get_device_name(), "count": 1}
    return {"platform": "cpu", "kind": f"torch {torch.__version__}", "count": torch.get_num_threads()}


def _git_commit() -> str | None:
    """The commit of this checkout, "-dirty" behind it where files differ; None outside of a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
