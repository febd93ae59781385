"""Writes weight files under a temporary name and then renames them, so that no reader sees half a file."""

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

__all__ = ["SUFFIXES", "Names", "check_suffix", "check_writable", "write_arrays"]

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt")  # of files with torchvision's or Hugging Face's names
_KERAS_SUFFIX = ".h5"
Names = Literal["torchvision", "huggingface", "keras"]


def check_suffix(path: Path, names: Names | None = None) -> Names:
    """Returns the library whose names a file with this suffix gets. Ignores the case of the suffix.

    Raises:
      ValueError: the suffix is unknown or does not fit `names`.
    """
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, _KERAS_SUFFIX):
        raise ValueError(
            f"weight files end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, Keras' files in {_KERAS_SUFFIX}, "
            f"got {path}"
        )
    if names not in (None, "torchvision", "huggingface", "keras"):
        raise ValueError(f'names are "torchvision", "huggingface" or "keras", got {names!r}')
    if (names == "keras") != (suffix == _KERAS_SUFFIX) and names is not None:
        raise ValueError(f"files with Keras' names, and only these, end in {_KERAS_SUFFIX}, got {path}")
    if path.name.lower().endswith(f".weights{_KERAS_SUFFIX}"):
        raise ValueError(f"Keras would read {path.name} as its newer format: leave .weights out of the name")
    return names or ("keras" if suffix == _KERAS_SUFFIX else "torchvision")


def check_writable(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    names: Names,
    config: ResNetConfig | None,
    metadata: Mapping[str, str] | None,
) -> None:
    """Raises a ValueError that names `path` if the file cannot hold the arrays; arguments as in `write_arrays`."""
    suffix = path.suffix.lower()
    if metadata and suffix != ".safetensors":
        raise ValueError(f"only .safetensors files hold metadata, got {path}")
    if suffix in (".npz", _KERAS_SUFFIX) and any(array.dtype == jnp.bfloat16 for array in arrays.values()):
        raise ValueError(f"{suffix} files cannot hold bfloat16, got {path}: use .safetensors or .pth")
    if names != "torchvision" and "bn1.weight" not in arrays:
        raise ValueError(f'{path}: a network without BatchNorm can only be written with names="torchvision"')
    if names != "keras":
        if suffix != ".safetensors" and (facts := _unseen_facts(config)):
            told = ", ".join(f"{name}={value}" for name, value in facts.items())
            raise ValueError(f"{path}: only .safetensors files can say that the network has {told}")
        return
    if config is None:
        raise ValueError(f"{path}: pass config, which shows whether Keras has this network")
    if config.block != "bottleneck":
        raise ValueError(f"{path}: Keras has ResNet50, ResNet101 and ResNet152, whose blocks are bottlenecks")
    if config.stride_in != "conv1":
        raise ValueError(
            f"{path}: blocks of Keras' ResNets apply the stride in their first convolution (stride_in='conv1'), this "
            f"network in {config.stride_in}: Keras would compute something else"
        )


def _unseen_facts(config: ResNetConfig | None) -> dict[str, str]:
    """The metadata that say what arrays do not show; {} if config is None or the network is as in torchvision."""
    facts: dict[str, str] = {}
    if config and config.block == "bottleneck" and config.stride_in != ResNetConfig.stride_in:
        facts["stride_in"] = config.stride_in
    if config and config.batch_norm and config.batch_norm_eps != ResNetConfig.batch_norm_eps:
        facts["batch_norm_eps"] = repr(float(config.batch_norm_eps))
    return facts


def write_arrays(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    *,
    names: Names | None = None,
    config: ResNetConfig | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Does what `weights.save` does, for arrays {torchvision's name: array in torchvision's layout}.

    Files with the suffix .pth or .pt or with Hugging Face's names get a batch count of 0 for each BatchNorm without
    one. Files for Keras get biases of 0 for the convolutions. Keras' eps is 1.001e-5; its difference from
    config.batch_norm_eps is added to the variances. Keras' blocks are bottlenecks with the stride in the first
    convolution, and config must have the same (block="bottleneck", stride_in="conv1").
    """
    path = Path(path)
    names = check_suffix(path, names)
    check_writable(path, arrays, names, config, metadata)
    suffix = path.suffix.lower()
    if names == "keras":
        assert config is not None  # or check_writable would have raised
        arrays = to_keras(arrays, config.batch_norm_eps)
    elif names == "huggingface":
        arrays = to_hugging_face(arrays)
        if suffix == ".safetensors":
            metadata = {"format": "pt"} | dict(metadata or {})  # transformers refuses files without this entry
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}  # safetensors ignores strides
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        if suffix == ".npz":
            with aside.open("wb") as file:  # given the name a.NPZ, NumPy would write a.NPZ.npz
                np.savez(file, **arrays)  # type: ignore[arg-type]  # NumPy types other keywords as bool
        elif suffix == ".safetensors":
            # save_file would write a file that only its owner may read.
            facts = _unseen_facts(config) | dict(metadata or {})
            aside.write_bytes(safetensors.numpy.save(arrays, metadata=facts))
        elif suffix == _KERAS_SUFFIX:
            _write_keras(aside, arrays, path)
        else:
            torch = _import_torch(path)
            torch.save({name: _to_tensor(torch, array) for name, array in with_counts(arrays).items()}, aside)
        os.replace(aside, path)


def _write_keras(aside: Path, arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes the format that keras.applications downloads. model.load_weights reads it, by order or by name."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f'{path}: writing this file needs h5py ({error}): pip install -e ".[keras]"') from error
    layers: dict[str, list[str]] = {}
    for name in arrays:
        layer, _, field = name.partition(".")
        layers.setdefault(layer, []).append(field)
    with h5py.File(aside, "w") as file:
        file.attrs["keras_version"], file.attrs["backend"] = b"2.0", b"tensorflow"  # else Keras 2 rearranges kernels
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
            f"{path}: writing {path.suffix} files needs PyTorch, which is missing ({error}): "
            'pip install -e ".[torch]", or use .safetensors or .npz'
        ) from error
    return torch
