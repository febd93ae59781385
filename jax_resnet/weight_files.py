"""Opens weight files of people's: without running code, filling the memory or waiting for ever, and says what is wrong.

What the arrays in them mean is the subject of `weights`.
"""

from __future__ import annotations

import argparse
import codecs
import pickle
import re
import string
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.numpy

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")
READABLE_SUFFIXES = (*SUFFIXES, ".ckpt", ".tar")  # PyTorch's too: Lightning's, and .pth.tar of its examples and timm
_MAX_BYTES = 2**34  # of all arrays together; those of ResNet-152 and of Adam, in float64, are 1.5e9
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


def read_contents(path: Path) -> Mapping[str, Any]:
    """What a file holds under text names, by its suffix; errors as those of `weights.read_file`."""
    check_suffix(path, READABLE_SUFFIXES)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a weight file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or device: copy what it gives to a file")
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    refuse_bombs(path, _unpacked_size(path))
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    torch = None if path.suffix in (".safetensors", ".npz") else import_torch(path)
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
        reason = _known(start, path.suffix, error) or f"{first_sentence(error)}; copy or download it again"
        raise ValueError(f"{path} is not a readable {path.suffix} file: {reason}") from error
    if not isinstance(contents, Mapping) or not has_names(contents):
        keys = " whose keys are not all text" if isinstance(contents, Mapping) else ""
        raise ValueError(f"{path} must hold a state_dict, {{name: array}}, got a {type(contents).__name__}{keys}")
    return contents


def refuse_bombs(path: Path, size: int) -> None:
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


def first_sentence(error: Exception) -> str:
    """The first sentence of an error; of torch's, not its advice to allow any code."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return re.split(r"\.\s|\n", text)[0] or type(error).__name__


def import_torch(path: Path) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path}: {path.suffix} files need PyTorch, which is missing ({error}): "
            'pip install -e ".[torch]", or take .safetensors or .npz'
        ) from error
    return torch


def has_names(mapping: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) for name in mapping)


def check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    if path.suffix not in suffixes:
        raise ValueError(f"weight files end in {', '.join(suffixes[:-1])} or {suffixes[-1]}, got {path}")
