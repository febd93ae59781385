"""Writes weight files: aside first and then renamed, so that no half file is ever seen."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jax_resnet.architecture import ResNetConfig
from jax_resnet.naming import to_hugging_face, to_keras, with_counts

__all__ = ["SUFFIXES", "Names", "check_suffix", "write_arrays"]

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")  # of files with torchvision's or Hugging Face's names
_KERAS_SUFFIX = ".h5"
Names = Literal["torchvision", "huggingface", "keras"]


def check_suffix(path: Path, names: Names | None = None) -> Names:
    """Whose names a file has that is written; upper and lower case are the same.

    Raises:
      ValueError: for the name of a file that cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, _KERAS_SUFFIX):
        raise ValueError(
            f"weight files end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, those of Keras in {_KERAS_SUFFIX}, "
            f"got {path}"
        )
    if names not in (None, "torchvision", "huggingface", "keras"):
        raise ValueError(f'names are "torchvision", "huggingface" or "keras", got {names!r}')
    if (names == "keras") != (suffix == _KERAS_SUFFIX) and names is not None:
        raise ValueError(f"files with Keras' names end in {_KERAS_SUFFIX}, and no others do, got {path}")
    if path.name.lower().endswith(f".weights{_KERAS_SUFFIX}"):
        raise ValueError(f"Keras takes {path.name} for its newer format: leave .weights out of the name")
    return names or ("keras" if suffix == _KERAS_SUFFIX else "torchvision")


def write_arrays(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    *,
    names: Names | None = None,
    config: ResNetConfig | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """As `weights.save`, for arrays {torchvision's name: array in torchvision's layout}.

    A .pth or .pt file, and one with Hugging Face's names, gets a batch count of 0 for each BatchNorm that has none.
    Keras' networks have biases in their convolutions, which are written as 0, and an eps of 1.001e-5, whose difference
    from config.batch_norm_eps is added to the variances. Their blocks are bottlenecks with the stride in the first
    convolution: config must say so.
    """
    path = Path(path)
    names = check_suffix(path, names)
    suffix = path.suffix.lower()
    if metadata and suffix != ".safetensors":
        raise ValueError(f"only .safetensors files hold metadata, got {path}")
    if suffix in (".npz", _KERAS_SUFFIX) and any(array.dtype == jnp.bfloat16 for array in arrays.values()):
        raise ValueError(f"{suffix} files cannot hold bfloat16, got {path}: take .safetensors or .pth")
    if names != "torchvision" and "bn1.weight" not in arrays:
        raise ValueError(f"{path}: only torchvision's names have a network without BatchNorm")
    if names == "keras":
        arrays = to_keras(arrays, _check_keras(config, path).batch_norm_eps)
    elif names == "huggingface":
        arrays = to_hugging_face(arrays)
        if suffix == ".safetensors":
            metadata = {"format": "pt"} | dict(metadata or {})  # transformers refuses files that do not say it
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}  # safetensors ignores strides
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        if suffix == ".npz":
            with aside.open("wb") as file:  # given a name, NumPy would put .npz behind .NPZ
                np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy types other keywords as bool
        elif suffix == ".safetensors":
            # Not save_file, whose files only their owner may read.
            aside.write_bytes(safetensors.numpy.save(arrays, metadata=dict(metadata or {})))
        elif suffix == _KERAS_SUFFIX:
            _write_keras(aside, arrays, path)
        else:
            torch = _import_torch(path)
            torch.save({name: _to_tensor(torch, array) for name, array in with_counts(arrays).items()}, aside)
        os.replace(aside, path)


def _check_keras(config: ResNetConfig | None, path: Path) -> ResNetConfig:
    if config is None:
        raise ValueError(f"{path}: pass config, from which follows whether Keras has such a network")
    if config.block != "bottleneck":
        raise ValueError(f"{path}: Keras has ResNet50, ResNet101 and ResNet152, whose blocks are bottlenecks")
    if config.stride_in != "conv1":
        raise ValueError(
            f"{path}: Keras' ResNets have the stride of a block in its first convolution (stride_in='conv1'), this "
            f"network has it in {config.stride_in}: Keras would compute something else"
        )
    return config


def _write_keras(aside: Path, arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """The format of the files that keras.applications downloads: model.load_weights takes it, by order or by name."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f'{path}: to write it h5py is needed ({error}): pip install -e ".[keras]"') from error
    layers: dict[str, list[str]] = {}
    for name in arrays:
        layer, _, field = name.partition(".")
        layers.setdefault(layer, []).append(field)
    with h5py.File(aside, "w") as file:
        file.attrs["keras_version"], file.attrs["backend"] = b"2.0", b"tensorflow"  # or Keras 2 turns the kernels
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, fields in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{field}:0".encode() for field in fields]
            for field in fields:
                group[f"{layer}/{field}:0"] = arrays[f"{layer}.{field}"]


def _to_tensor(torch: ModuleType, array: np.ndarray) -> Any:
    if array.dtype == jnp.bfloat16:
        return torch.tensor(array.astype(np.float32)).bfloat16()
    return torch.tensor(array)


def _import_torch(path: Path) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path}: to write {path.suffix} files PyTorch is needed, which is missing ({error}): "
            'pip install -e ".[torch]", or take .safetensors or .npz'
        ) from error
    return torch
