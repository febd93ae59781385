"""Weight files in .npz and .safetensors with torchvision's names and layout, as in jax_resnet.weights but without JAX.

A file maps names to arrays. A name is the path in the nested dicts, joined by ".". The layouts differ:

    nested dicts             file
    kernel (kh, kw, C, K)    (K, C, kh, kw)
    dense (in, out)          (out, in)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from numpy_ref.config import ResNetConfig, Tree, shapes

SUFFIXES = (".safetensors", ".npz")
FILE_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}  # by rank: the transposition from the nested dicts to a file
TREE_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}  # and from a file to the nested dicts


def from_torch(state_dict: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """torchvision's names and layout -> (params, batch_stats), nested dicts of contiguous arrays with the same dtypes.

    Args:
      state_dict: {name: array or anything that np.asarray converts}. Batch counts (num_batches_tracked) are dropped.
    """
    params: Tree = {}
    batch_stats: Tree = {}
    for name, value in state_dict.items():
        if _is_batch_count(name):
            continue
        *path, last = name.split(".")
        node = batch_stats if last in ("running_mean", "running_var") else params
        for part in path:
            node = node.setdefault(part, {})
        node[last] = _transposed(np.asarray(value), TREE_AXES)
    return params, batch_stats


def to_torch(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """(params, batch_stats) -> {torchvision's name: contiguous array in torchvision's layout}."""
    return {
        name: _transposed(np.asarray(value), FILE_AXES)
        for tree in (params, batch_stats)
        for name, value in _leaves(tree)
    }


def save(
    path: str | os.PathLike,
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a .safetensors or .npz file. A temporary file is renamed at the end, so path never holds a partial file.

    Args:
      path: its suffix sets the format.
      params, batch_stats: nested dicts.
      metadata: {name: text}, only for .safetensors.

    Raises:
      ValueError: if the suffix is unknown, or if an .npz file is given metadata.
    """
    path = _checked(path)
    if metadata and path.suffix.lower() == ".npz":
        raise ValueError(f"only .safetensors files hold metadata, got {path}")
    arrays = to_torch(params, batch_stats)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            if path.suffix.lower() == ".npz":
                np.savez(file, **arrays)
            else:
                file.write(safetensors.numpy.save(arrays, metadata=dict(metadata or {})))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def load(path: str | os.PathLike, config: ResNetConfig) -> tuple[Tree, Tree]:
    """Reads a file into (params, batch_stats). Names and shapes must fit the network, and all values must be finite.

    Args:
      path: a .safetensors or .npz file with torchvision's names and layout.
      config: the network.

    Returns:
      params and batch_stats, nested dicts of arrays with the file's dtypes.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the suffix is unknown, the file cannot be read, an array is missing, unexpected, not finite or of a
        wrong shape, or a running variance is negative. The message lists all such arrays.
    """
    arrays = {name: value for name, value in _read(_checked(path)).items() if not _is_batch_count(name)}
    expected = {name: _file_shape(shape) for tree in shapes(config) for name, shape in _leaves(tree)}
    problems = []
    for name in expected | arrays:
        if name not in arrays:
            problems.append(f"missing: {name} {expected[name]}")
        elif name not in expected:
            problems.append(f"unexpected: {name} {arrays[name].shape}")
        elif arrays[name].shape != expected[name]:
            problems.append(f"{name}: expected {expected[name]}, the file has {arrays[name].shape}")
    for name, value in arrays.items():
        if value.dtype.kind == "f" and (count := value.size - np.count_nonzero(np.isfinite(value))):
            problems.append(f"{name}: {count:,} of {value.size:,} values are not finite")
        elif name.endswith("running_var") and (count := np.count_nonzero(value < 0)):
            problems.append(f"{name}: {count:,} of {value.size:,} variances are negative")
    if problems:
        raise ValueError(f"{path} does not fit {config}, {len(problems)} problems:\n  " + "\n  ".join(problems))
    return from_torch(arrays)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file {path}")
    try:
        if path.suffix.lower() == ".safetensors":
            return safetensors.numpy.load_file(path)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # damaged files raise many types of errors
        raise ValueError(f"{path} is not a readable {path.suffix} file: {error}") from error


def _checked(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"weight files end in {' or '.join(SUFFIXES)}, got {path}")
    return path


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_batch_count(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"  # PyTorch's counts, which nothing here reads


def _transposed(value: np.ndarray, axes_by_rank: Mapping[int, tuple[int, ...]]) -> np.ndarray:
    return np.array(value.transpose(axes_by_rank.get(value.ndim, range(value.ndim))), order="C")


def _file_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in FILE_AXES.get(len(shape), range(len(shape))))
