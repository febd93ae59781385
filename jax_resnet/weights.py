"""Weights between this tree and files that torchvision and timm load as they are.

A file holds torchvision's names and layout: kernels (out, in, kh, kw), dense weights (out, in). The tree holds the same
names as paths, kernels (kh, kw, in, out), dense weights (in, out). Moving is a transpose per array.

Files are read in the styles that people have: a state_dict alone, or in one entry of a training checkpoint, its names
with or without what a wrapped model puts before them. PyTorch is needed for its own files only: all but .safetensors
and .npz.
"""

from __future__ import annotations

import argparse
import codecs
import functools
import math
import os
import pickle
import re
import string
import tempfile
import warnings
import zipfile
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

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")
READABLE_SUFFIXES = (*SUFFIXES, ".ckpt", ".tar")  # PyTorch's too: Lightning's, and .pth.tar of its examples and timm
_MAX_BYTES = 2**34  # of all arrays together; those of ResNet-152 and of Adam, in float64, are 1.5e9
_STATISTICS = ("running_mean", "running_var")
_COUNT = "num_batches_tracked"  # torch counts batches in each BatchNorm; nothing here needs it
_ENTRIES = ("state_dict", "model", "model_state_dict")  # of a checkpoint: the trained model, not its average
_PREFIXES = ("module.", "model.", "_orig_mod.")  # (Distributed)DataParallel, a Lightning module's model, torch.compile
_AVERAGED = "n_averaged"  # torch's AveragedModel counts its updates beside the weights
_SIGNATURES = {  # of what people have under the name of a weight file
    b"": "it is empty: copy or download it again",
    b"version https://git-lfs": "it is a pointer of git-lfs: run `git lfs pull`",
    b"<!doctype": "it is a web page: download the file itself",
    b"<html": "it is a web page: download the file itself",
    b"\x93numpy": "it is a single array (.npy): expected {name: array}",
    b"\x89hdf": "it is an HDF5 file: expected torchvision's names and layout",
    b"\x1f\x8b": "it is compressed: gunzip it",
    bytes(16): "it begins with zeros alone: copy or download it again",
}


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
    _check_suffix(path, SUFFIXES)
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
            torch = _import_torch(path)
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
      config: the network.
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
    if head == "new":
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
    contents = _read(path)
    checkpoint = {
        name: value
        for name, value in contents.items()
        if isinstance(value, Mapping) and _has_names(value) and any(map(_is_array, value.values()))
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
    _refuse_bombs(path, sum(sizes))
    try:
        arrays = {name: _to_numpy(value) for name, value in contents.items() if _is_array(value) and name != _AVERAGED}
    except (TypeError, RuntimeError) as error:  # quantized, sparse
        raise ValueError(f"{path} has tensors that are no plain arrays: {_reason(error)}") from error
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


def _read(path: Path) -> Mapping[str, Any]:
    _check_suffix(path, READABLE_SUFFIXES)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a weight file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or device: copy what it gives to a file")
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    _refuse_bombs(path, _unpacked_size(path))
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    torch = None if path.suffix in (".safetensors", ".npz") else _import_torch(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.numpy.load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_data_in_checkpoints()):
            warnings.simplefilter("ignore")  # of what is refused further down: TorchScript, sparse tensors
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen types for a damaged file
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and wanted:
            raise ValueError(
                f"{path} is refused: it is a pickle that wants {wanted[1]}, and a pickle of more than data can run any "
                "code. Where you trust it, load it in PyTorch and save its state_dict alone: "
                "torch.save(model.state_dict(), PATH)"
            ) from error
        reason = _known(start, path.suffix, error) or f"{_reason(error)}; copy or download it again"
        raise ValueError(f"{path} is not a readable {path.suffix} file: {reason}") from error
    if not isinstance(contents, Mapping) or not _has_names(contents):
        keys = " whose keys are not all text" if isinstance(contents, Mapping) else ""
        raise ValueError(f"{path} must hold a state_dict, {{name: array}}, got a {type(contents).__name__}{keys}")
    return contents


def _refuse_bombs(path: Path, size: int) -> None:
    """Raises a ValueError for arrays that would fill the memory: a zip archive, or a torch tensor without strides, of a
    few bytes can stand for any number of them."""
    if size > _MAX_BYTES:
        raise ValueError(f"{path} is refused: it would unpack to {size / 1e9:,.0f} GB, which no ResNet needs")


def _unpacked_size(path: Path) -> int:
    """The bytes that a zip archive says it unpacks to, as .npz and .pth files are such; 0 for all else."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    except Exception:  # of many types for what is none, or is damaged; what is wrong shows when it is read
        return 0


def _known(start: bytes, suffix: str, error: Exception) -> str | None:
    """What a file that cannot be read is instead and what to do, if its first bytes or the reader's error tell it."""
    seen = start.strip().lower()
    for signature, what in _SIGNATURES.items():
        if seen.startswith(signature) if signature else not start:
            return what
    if all(byte in string.printable.encode() for byte in start):
        return "it is text: copy or download it again"
    if isinstance(error, MemoryError):
        return "it says that it holds more than the memory does: copy or download it again"
    if suffix == ".npz" and not start.startswith(b"PK"):
        return "it is no zip archive: copy or download it again"
    if "Object arrays" in str(error):
        return "it holds Python objects, which could run code: expected arrays of numbers"
    if re.search(r"enforce fail|Unsupported operand|magic number", str(error)):
        return "it is no file of PyTorch's, or not the whole of it: copy or download it again"
    if "TorchScript" in str(error):
        return "it is TorchScript: load it in PyTorch and save its state_dict, torch.save(model.state_dict(), PATH)"
    if missing := re.search(r"no attribute '(float\w+)'", str(error)):
        return f"it holds {missing[1]}, which NumPy has not: save it as float32, float16 or bfloat16"
    return None


def _data_in_checkpoints() -> list[Any]:
    """What training scripts put beside the weights and is data alone, though torch does not know it.

    That is their command line, a Namespace, and NumPy's scalars, by the new and the old name of their module.
    """
    scalar = np._core.multiarray.scalar
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    return [argparse.Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes, codecs.encode]


def _reason(error: Exception) -> str:
    """The first sentence of an error; of torch's, not its advice to allow any code."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return re.split(r"\.\s|\n", text)[0] or type(error).__name__


def _import_torch(path: Path) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path}: {path.suffix} files need PyTorch, which is missing ({error}): "
            'pip install -e ".[torch]", or take .safetensors or .npz'
        ) from error
    return torch


def _has_names(mapping: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) for name in mapping)


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


def _check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix not in suffixes:
        raise ValueError(f"weight files end in {', '.join(suffixes[:-1])} or {suffixes[-1]}, got {path}")
