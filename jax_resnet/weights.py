"""Weights between this tree and files that torchvision and timm load as they are.

A file holds torchvision's names and layout: kernels (out, in, kh, kw), dense weights (out, in). The tree holds the same
names as paths, kernels (kh, kw, in, out), dense weights (in, out). Moving is a transpose per array.

Files are read in the styles that people have: a state_dict alone, or in one entry of a training checkpoint, its names
with or without what a wrapped model puts before them. PyTorch is needed for its own files only: all but .safetensors
and .npz.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_resnet import resnet
from jax_resnet.weight_files import (
    SUFFIXES,
    check_suffix,
    first_sentence,
    has_names,
    import_torch,
    read_contents,
    refuse_bombs,
)

_STATISTICS = ("running_mean", "running_var")
_COUNT = "num_batches_tracked"  # torch counts batches in each BatchNorm; nothing here needs it
_ENTRIES = ("state_dict", "model", "model_state_dict")  # of a checkpoint: the trained model, not its average
_PREFIXES = ("module.", "model.", "_orig_mod.")  # (Distributed)DataParallel, a Lightning module's model, torch.compile
_AVERAGED = "n_averaged"  # torch's AveragedModel counts its updates beside the weights


class WeightFile(NamedTuple):
    """What `read_file` found.

    arrays: {torchvision's name: array}, batch counts (num_batches_tracked) included.
    entry: the entry of a checkpoint that they are from, None if the file is no checkpoint.
    prefix: what stood before every name, "" if nothing.
    left_out: the names of what else the file holds, such as the state of an optimizer.
    """

    arrays: dict[str, np.ndarray]
    entry: str | None
    prefix: str
    left_out: tuple[str, ...]


def from_torch(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """torchvision's keys and layout -> (params, batch_stats), nested dicts of NumPy arrays of the same dtypes.

    Args:
      state_dict: {key: array}, anything that NumPy takes, or tensors on any device.
    """
    params, batch_stats = {}, {}
    for name, value in state_dict.items():
        last = name.rpartition(".")[2]
        if last != _COUNT:
            (batch_stats if last in _STATISTICS else params)[name] = _transposed(_to_numpy(value), (2, 3, 1, 0))
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
    """Writes a weight file, aside first and then renamed, so that no half file is ever seen.

    Args:
      path: its suffix is the format: .safetensors, .npz, .pth or .pt.
      params, batch_stats: nested dicts.
      metadata: text by name, for .safetensors only.

    Raises:
      ValueError: for another suffix, what the format cannot hold (metadata, bfloat16 in .npz), or a suffix of PyTorch's
        where it is missing.
    """
    write_arrays(path, to_torch(params, batch_stats), metadata=metadata)


def write_arrays(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None
) -> None:
    """As `save`, for arrays {torchvision's key: array in torchvision's layout}.

    A .pth or .pt file gets a batch count of 0 for each BatchNorm that has none: a state_dict of torch has them.
    """
    path = Path(path)
    check_suffix(path, SUFFIXES)
    if metadata and path.suffix != ".safetensors":
        raise ValueError(f"only .safetensors files hold metadata, got {path}")
    if path.suffix == ".npz" and any(array.dtype == jnp.bfloat16 for array in arrays.values()):
        raise ValueError(f".npz files cannot hold bfloat16, got {path}: take .safetensors or .pth")
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}  # safetensors ignores strides
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        if path.suffix == ".npz":
            np.savez(aside, **arrays)
        elif path.suffix == ".safetensors":
            # Not save_file, whose files only their owner may read.
            aside.write_bytes(safetensors.numpy.save(arrays, metadata=dict(metadata or {})))
        else:
            torch = import_torch(path)
            torch.save({name: _to_tensor(torch, array) for name, array in _with_counts(arrays).items()}, aside)
        os.replace(aside, path)


def load(
    path: str | os.PathLike,
    config: resnet.ResNetConfig,
    *,
    head: Literal["strict", "new"] = "strict",
    stem: Literal["strict", "grey"] = "strict",
    key: jax.Array | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file into (params, batch_stats) for a network; every name and shape must fit, every value be finite.

    Args:
      path: a weight file as `read_file` takes it.
      config: the network; with num_classes=0 the file's dense layer is left out.
      head: "new" leaves the file's dense layer aside and draws one for config.num_classes with `key`.
      stem: "grey" sums a stem for three channels into one for one channel, if that is what config has.
      key: a JAX random key, for head="new".

    Returns:
      params and batch_stats, nested dicts of NumPy arrays of the file's dtypes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that cannot be read (see `read_file`), or one list of all that does not fit (see
        `check_arrays`).
    """
    if head not in ("strict", "new") or stem not in ("strict", "grey"):
        raise ValueError(f'head is "strict" or "new", stem "strict" or "grey", got {head!r} and {stem!r}')
    arrays = read_file(path).arrays
    if not config.num_classes:
        arrays = {name: array for name, array in arrays.items() if not name.startswith("fc.")}
    elif head == "new":
        if key is None:
            raise ValueError('head="new" draws a dense layer: pass key')
        dense = resnet.init_dense(config, key)
        arrays |= to_torch({"fc": dense}, {})
    kernel = arrays.get("conv1.weight")
    if stem == "grey" and config.in_channels == 1 and kernel is not None and kernel.shape[1:2] == (3,):
        wide = kernel.astype(np.promote_types(kernel.dtype, np.float32))  # halves are rounded once
        arrays["conv1.weight"] = wide.sum(1, keepdims=True).astype(kernel.dtype)
    check_arrays(arrays, config, path)
    return from_torch(arrays)


def check_arrays(arrays: Mapping[str, np.ndarray], config: resnet.ResNetConfig, path: str | os.PathLike) -> None:
    """Checks the arrays of a file against a network; batch counts may be there or not.

    Raises:
      ValueError: with one list of all names that are missing or unexpected and all arrays of another shape, that are
        not of a float type, or that hold values which are not finite or variances which are negative.
    """
    expected = {
        name: _torch_shape(spec.shape)
        for tree in jax.eval_shape(functools.partial(resnet.init, config), jax.random.key(0))
        for name, spec in flatten_dict(tree, sep=".").items()
    }
    arrays = {name: value for name, value in arrays.items() if name.rpartition(".")[2] != _COUNT}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in arrays]
    problems += [f"unexpected: {name} {value.shape}" for name, value in arrays.items() if name not in expected]
    problems += [
        f"{name}: expected {shape}, the file has {arrays[name].shape}{_hint(name, shape, arrays[name].shape)}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    for name, value in arrays.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            problems.append(f"{name}: expected floats, the file has {value.dtype}")
        elif count := value.size - np.count_nonzero(np.isfinite(value)):
            problems.append(f"{name}: {count:,} of {value.size:,} values are not finite")
        elif name.endswith("running_var") and (count := np.count_nonzero(value < 0)):
            problems.append(f"{name}: {count:,} of {value.size:,} variances are negative")
    if problems:
        raise ValueError(f"{path} does not fit {config}, {len(problems)} times:\n  " + "\n  ".join(problems))


def _hint(name: str, expected: tuple[int, ...], given: tuple[int, ...]) -> str:
    if name.startswith("fc.") and given[1:] == expected[1:]:
        return ' (another number of classes: head="new" draws a dense layer)'
    if name == "conv1.weight" and given == (expected[0], 3, *expected[2:]) and expected[1] == 1:
        return ' (a stem for colour: stem="grey" sums it)'
    return " (transposed?)" if sorted(given) == sorted(expected) else ""


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a weight file under torchvision's names, {name: array}; see `read_file`."""
    return read_file(path).arrays


def read_file(path: str | os.PathLike, entry: str | None = None) -> WeightFile:
    """Reads a weight file in any of the styles that people have, whatever network it is for.

    A checkpoint is a file with a dict of arrays in one entry or more, beside an optimizer's state and the like. Of
    several such entries the trained model is taken ("state_dict", "model" or "model_state_dict"), not its average. What
    a wrapped model puts before its names ("module.", "model.", "_orig_mod.") is stripped where every name has it.

    Args:
      path: a .safetensors, .npz, .pth, .pt, .ckpt or .pth.tar file.
      entry: which entry of a checkpoint to take instead, say "model_ema".

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for another suffix, what is no file (a pipe is not opened), a file that cannot be read or would unpack
        to more than 16 GiB, a pickle that is more than data (it is refused, since reading it would run code), no entry
        of that name, several of which none is the model, or a suffix of PyTorch's where it is missing.
    """
    path = Path(path)
    contents = read_contents(path)
    checkpoint = {
        name: value
        for name, value in contents.items()
        if isinstance(value, Mapping) and has_names(value) and any(map(_is_array, value.values()))
    }
    left_out = []
    if checkpoint and entry is None:
        known = [name for name in _ENTRIES if name in checkpoint]
        if not known and len(checkpoint) > 1:
            raise ValueError(
                f"{path} has arrays in several entries, {', '.join(checkpoint)}: name one, read_file(path, entry), or "
                "take it out with `python -m experiments.convert IN OUT --entry NAME`"
            )
        entry = (known or list(checkpoint))[0]
    if entry is not None:
        if entry not in checkpoint:
            there = ", ".join(checkpoint) or "no entry"
            raise ValueError(f"{path} has no entry {entry!r} with arrays: {there} has some")
        left_out = [name for name in contents if name != entry]
        contents = checkpoint[entry]
    sizes = (math.prod(value.shape) * value.dtype.itemsize for value in contents.values() if _is_array(value))
    refuse_bombs(path, sum(sizes))
    try:
        arrays = {name: _to_numpy(value) for name, value in contents.items() if _is_array(value) and name != _AVERAGED}
    except (TypeError, RuntimeError) as error:  # quantized, sparse
        raise ValueError(f"{path} has tensors that are no plain arrays: {first_sentence(error)}") from error
    left_out += [name for name in contents if name not in arrays]
    if not arrays:
        raise ValueError(f"{path} holds no arrays: expected {{name: array}}, alone or in an entry of a checkpoint")
    prefix = ""
    while step := next((step for step in _PREFIXES if all(name.startswith(step) for name in arrays)), ""):
        arrays = {name.removeprefix(step): array for name, array in arrays.items()}
        prefix += step
    return WeightFile(arrays, entry, prefix, tuple(left_out))


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a .safetensors file, {} if it has none."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _to_numpy(value: Any) -> np.ndarray:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # torch hands no bfloat16 to NumPy; by way of float32 it is exact
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def _to_tensor(torch: ModuleType, array: np.ndarray) -> Any:
    if array.dtype == jnp.bfloat16:
        return torch.tensor(array.astype(np.float32)).bfloat16()
    return torch.tensor(array)


def _with_counts(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    norms = [name.rpartition(".")[0] for name in arrays if name.endswith(f".{_STATISTICS[0]}")]
    return {f"{norm}.{_COUNT}": np.zeros((), np.int64) for norm in norms} | dict(arrays)


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1]
