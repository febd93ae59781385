"""Weights between this tree and files that torchvision and timm load as they are.

A file holds torchvision's names and layout: kernels (out, in, kh, kw), dense weights (out, in). The tree holds the same
names as paths, kernels (kh, kw, in, out), dense weights (in, out). Moving is a transpose per array.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_resnet import resnet

SUFFIXES = (".safetensors", ".npz")
_STATISTICS = ("running_mean", "running_var")
_COUNT = "num_batches_tracked"  # torch counts batches in each BatchNorm; nothing here needs it


def from_torch(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """torchvision's keys and layout -> (params, batch_stats), nested dicts of NumPy arrays of the same dtypes.

    Args:
      state_dict: {key: array}, anything that NumPy takes.
    """
    params, batch_stats = {}, {}
    for name, value in state_dict.items():
        last = name.rpartition(".")[2]
        if last != _COUNT:
            (batch_stats if last in _STATISTICS else params)[name] = _transposed(np.asarray(value), (2, 3, 1, 0))
    return unflatten_dict(params, sep="."), unflatten_dict(batch_stats, sep=".")


def to_torch(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """(params, batch_stats) -> {torchvision's key: array in torchvision's layout}, contiguous."""
    flat = flatten_dict(dict(params), sep=".") | flatten_dict(dict(batch_stats), sep=".")
    return {name: np.ascontiguousarray(_transposed(np.asarray(value), (3, 2, 0, 1))) for name, value in flat.items()}


def _transposed(value: np.ndarray, kernel_axes: tuple[int, ...]) -> np.ndarray:
    if value.ndim == 4:
        return value.transpose(kernel_axes)
    return value.T if value.ndim == 2 else value


def save(path: str | os.PathLike, params: Any, batch_stats: Any, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a .safetensors or .npz file, aside first and then renamed, so that no half file is ever seen.

    Args:
      path: its suffix is the format.
      params, batch_stats: nested dicts.
      metadata: text by name, for .safetensors only.

    Raises:
      ValueError: for another suffix, or metadata in a format that has none.
    """
    path = Path(path)
    _check_suffix(path)
    if metadata and path.suffix != ".safetensors":
        raise ValueError(f"only .safetensors files hold metadata, got {path}")
    arrays = to_torch(params, batch_stats)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        if path.suffix == ".npz":
            np.savez(aside, **arrays)
        else:
            # Not save_file, whose files only their owner may read.
            aside.write_bytes(safetensors.numpy.save(arrays, metadata=dict(metadata or {})))
        os.replace(aside, path)


def load(
    path: str | os.PathLike,
    config: resnet.ResNetConfig,
    *,
    head: Literal["strict", "new"] = "strict",
    stem: Literal["strict", "grey"] = "strict",
    key: jax.Array | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file into (params, batch_stats) for a network; every name and shape must fit.

    Args:
      path: a .safetensors or .npz file with torchvision's names and layout.
      config: the network.
      head: "new" leaves the file's dense layer aside and draws one for config.num_classes with `key`.
      stem: "grey" sums a stem for three channels into one for one channel, if that is what config has.
      key: a JAX random key, for head="new".

    Returns:
      params and batch_stats, nested dicts of NumPy arrays of the file's dtypes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that cannot be read, or one list of all missing, unexpected and misshapen names.
    """
    arrays = read_arrays(path)
    expected = {
        name: _torch_shape(spec.shape)
        for tree in jax.eval_shape(functools.partial(resnet.init, config), jax.random.key(0))
        for name, spec in flatten_dict(tree, sep=".").items()
    }
    arrays = {name: value for name, value in arrays.items() if name.rpartition(".")[2] != _COUNT}
    if head == "new":
        if key is None:
            raise ValueError('head="new" draws a dense layer: pass key')
        dense = resnet.init_dense(config, key)
        arrays |= to_torch({"fc": dense}, {})
    kernel = arrays.get("conv1.weight")
    if stem == "grey" and config.in_channels == 1 and kernel is not None and kernel.shape[1:2] == (3,):
        arrays["conv1.weight"] = kernel.sum(1, keepdims=True)
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in arrays]
    problems += [f"unexpected: {name} {value.shape}" for name, value in arrays.items() if name not in expected]
    problems += [
        f"{name}: expected {shape}, the file has {arrays[name].shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit {config}, {len(problems)} times:\n  " + "\n  ".join(problems))
    return from_torch(arrays)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All arrays of a file, as they are: {name: array}.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for another suffix or a file that cannot be read.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.numpy.load_file(path)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # the readers raise a dozen types for a damaged file
        raise ValueError(f"{path} is not a readable {path.suffix} file: {error}") from error


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a .safetensors file, {} if it has none."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1]


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weight files end in {' or '.join(SUFFIXES)}, got {path}")
