"""Reads and writes weight files, in the format that torchvision and timm load without conversion.

A file has torchvision's names and layout: kernels (out, in, kh, kw), dense weights (out, in). The trees params and
batch_stats have the same names as paths, kernels (kh, kw, in, out) and dense weights (in, out). So a conversion
transposes each array.

Reading recognizes the format of a file by its content, finds the ResNet under any prefix, and turns the names of
Hugging Face and Keras into torchvision's (`read_file` lists the formats). Writing can use all three. Only writing .pth
and .pt files needs PyTorch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_resnet import hub, resnet, weight_names
from jax_resnet.naming import COUNT, KERAS, STATISTICS
from jax_resnet.weight_checks import check_arrays, diagnosis, recognize
from jax_resnet.weight_files import read_contents, to_torch_layout, to_tree_layout
from jax_resnet.weight_settings import check_settings, of_backbone, settings_beside
from jax_resnet.weight_writing import SUFFIXES, Names, check_suffix, check_writable, write_arrays

__all__ = [
    "SUFFIXES",
    "Names",
    "WeightFile",
    "check_suffix",
    "check_writable",
    "fit",
    "from_torch",
    "load",
    "read_arrays",
    "read_file",
    "recognize_file",
    "save",
    "to_torch",
    "write_arrays",
]


class WeightFile(NamedTuple):
    """What `read_file` found.

    path: the path, on this machine, of the file or of a run's checkpoint.
    arrays: {torchvision's name: array in torchvision's layout}, with batch counts (num_batches_tracked).
    prefix: the prefix of all names in the file, such as "state_dict.module."; "" if they have none.
    naming: the library that the names in the file come from: "torchvision", "Hugging Face", "Keras", "nn.Sequential".
    head: the file's name of the dense layer; None if the file has none, or a head of several layers.
    left_out: the names of the file's other entries, such as the state of an optimizer.
    metadata: {name: text} of a .safetensors file.
    settings: config.json and preprocessor_config.json, merged, from a folder of Hugging Face or a training run.
    stride_in: the convolution of a bottleneck that applies the stride; None if the file does not say.
    notes: sentences for the user, for example about a damaged checkpoint or a normalization that was left out.
    """

    path: Path
    arrays: dict[str, np.ndarray]
    prefix: str
    naming: str
    head: str | None
    left_out: tuple[str, ...]
    metadata: Mapping[str, str]
    settings: Mapping[str, Any]
    stride_in: Literal["conv2", "conv1"] | None
    notes: tuple[str, ...] = ()

    @property
    def batch_norm_eps(self) -> float | None:
        """The eps of BatchNorm that the file's metadata say, as `save` writes it."""
        try:
            return float(self.metadata["batch_norm_eps"])
        except (KeyError, ValueError):
            return None


def from_torch(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Converts torchvision's keys and layout into (params, batch_stats), nested dicts of NumPy arrays. Keeps dtypes.

    Args:
      state_dict: {key: array}. An array is anything that NumPy converts, or a PyTorch tensor on any device.
    """
    params: dict[str, Any] = {}
    batch_stats: dict[str, Any] = {}
    for name, value in state_dict.items():
        last = name.rpartition(".")[2]
        if last != COUNT:
            (batch_stats if last in STATISTICS else params)[name] = to_tree_layout(_to_numpy(value))
    return unflatten_dict(params, sep="."), unflatten_dict(batch_stats, sep=".")


def to_torch(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts (params, batch_stats) into {torchvision's key: contiguous array in torchvision's layout}."""
    flat = flatten_dict(dict(params), sep=".") | flatten_dict(dict(batch_stats), sep=".")
    return {name: np.ascontiguousarray(to_torch_layout(np.asarray(value))) for name, value in flat.items()}


def save(
    path: str | os.PathLike,
    params: Any,
    batch_stats: Any,
    *,
    names: Names | None = None,
    config: resnet.ResNetConfig | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a weight file under a temporary name and then renames it, so that no reader sees half a file.

    Args:
      path: the suffix selects the format: .safetensors, .npz, .pth or .pt; .h5 for Keras.
      params, batch_stats: nested dicts.
      names: "torchvision" (also timm's names), "huggingface" (ResNetForImageClassification of transformers) or "keras"
        (ResNet50, ResNet101 and ResNet152 of keras.applications). None means "keras" for .h5, else "torchvision".
      config: the network. Keras' names need it, see `weight_writing.write_arrays`. Pass it for stride_in="conv1" or
        another batch_norm_eps: arrays do not show them, the metadata of a .safetensors file do, and `load` compares.
      metadata: {name: text}, for .safetensors only.

    Raises:
      ValueError: the suffix is unknown; the format or the library cannot hold what is given (metadata, config's
        stride_in or batch_norm_eps, bfloat16 in .npz); or torch or h5py, which the suffix needs, is missing.
    """
    write_arrays(path, to_torch(params, batch_stats), names=names, config=config, metadata=metadata)


def load(
    path: str | os.PathLike,
    config: resnet.ResNetConfig,
    *,
    head: Literal["strict", "new"] = "strict",
    stem: Literal["strict", "grey"] = "strict",
    key: jax.Array | None = None,
    entry: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file into (params, batch_stats) of a network. Names and shapes must fit, and all values must be finite.

    Args:
      path: a file, a folder or a name on Hugging Face's hub, as for `read_file`.
      config: the network; num_classes=0 ignores the file's dense layer.
      head: "new" ignores the file's dense layer and draws one for config.num_classes with `key`.
      stem: "grey" sums the three input channels of the file's stem into one, if config has one channel.
      key: a JAX random key, for head="new".
      entry: the network to take, see `read_file`.

    Returns:
      params and batch_stats, nested dicts of NumPy arrays in the file's dtypes; float16 and bfloat16 become float32.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read (see `read_file`) or does not fit the network (see `check_arrays`).
    """
    if head not in ("strict", "new") or stem not in ("strict", "grey"):
        raise ValueError(f'head is "strict" or "new", stem "strict" or "grey", got {head!r} and {stem!r}')
    return fit(read_file(path, entry), config, head=head, stem=stem, key=key)


def fit(
    file: WeightFile,
    config: resnet.ResNetConfig,
    *,
    head: Literal["strict", "new"] = "strict",
    stem: Literal["strict", "grey"] = "strict",
    key: jax.Array | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Does what `load` does, for a file that `read_file` has read."""
    if file.stride_in not in (None, config.stride_in) and config.block == "bottleneck":
        raise ValueError(
            f"{file.path} holds a ResNet whose blocks apply their stride in {file.stride_in}, and config.stride_in is "
            f"{config.stride_in}: pass a configuration with stride_in={file.stride_in!r} in Python (--init cannot)"
        )
    if file.batch_norm_eps not in (None, config.batch_norm_eps):
        raise ValueError(
            f"{file.path} was saved with batch_norm_eps={file.batch_norm_eps}, and config.batch_norm_eps is "
            f"{config.batch_norm_eps}: pass a configuration with that value in Python (--init cannot)"
        )
    if file.naming == "Keras" and config.batch_norm_eps != resnet.ResNetConfig.batch_norm_eps:
        raise ValueError(f"{file.path}: its variances already include Keras' eps: leave batch_norm_eps at its default")
    arrays = {
        name: array.astype(np.promote_types(array.dtype, np.float32), copy=False)
        if jnp.issubdtype(array.dtype, jnp.floating)
        else array
        for name, array in file.arrays.items()
    }
    if other := diagnosis(arrays, config):  # before the dense layer and the stem are changed
        raise ValueError(f"{file.path} {other}")
    if head == "new" or config.num_classes == 0:
        arrays = {name: array for name, array in arrays.items() if not name.startswith("fc.")}
    if head == "new" and config.num_classes:
        if key is None:
            raise ValueError('head="new" draws a dense layer: pass key')
        arrays |= to_torch({"fc": resnet.init_dense(config, key)}, {})
    kernel = arrays.get("conv1.weight")
    if stem == "grey" and config.in_channels == 1 and kernel is not None and kernel.shape[1:2] == (3,):
        arrays["conv1.weight"] = kernel.sum(1, keepdims=True)
    check_arrays(arrays, config, file.path)
    return from_torch(arrays)


def recognize_file(file: WeightFile, arch: str | None = None) -> tuple[str, resnet.ResNetConfig]:
    """Returns the name and the configuration of the network in a file, as `weight_checks.recognize` does.

    The configuration has the file's stride_in and batch_norm_eps if the file says them.
    """
    try:
        arch, config = recognize(file.arrays, arch)
    except ValueError as error:
        raise ValueError(f"{file.path} {error}") from error
    eps = config.batch_norm_eps if file.batch_norm_eps is None else file.batch_norm_eps
    return arch, dataclasses.replace(config, stride_in=file.stride_in or config.stride_in, batch_norm_eps=eps)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the arrays of a weight file, {torchvision's name: array in torchvision's layout}; see `read_file`."""
    return read_file(path).arrays


def read_file(path: str | os.PathLike, entry: str | None = None) -> WeightFile:
    """Reads the ResNet in a weight file and leaves out other entries.

    The content selects the format: .safetensors, .npz, PyTorch's three formats, pickles of NumPy arrays, or HDF5
    (Keras). The names may be torchvision's, Hugging Face's or Keras', with any prefix.

    Args:
      path: a file; a folder of Hugging Face or of a training run; a run's checkpoint, such as run/checkpoints/5; or
        "hf:owner/name" on Hugging Face's hub, see `hub.fetch`.
      entry: a part of the prefix of the network to take, such as "model_ema" or "teacher". None takes the trained
        network ("state_dict", "model" or "model_state_dict"), not the moving average of its weights.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: path is a pipe or device (neither is opened); the file cannot be read, would unpack to more than 16
        GiB, or is a pickle with more than data, which would run code; it holds no ResNet or several; or the config.json
        beside the file describes a network that computes something else with these weights.
    """
    path = hub.fetch(path) if hub.is_name(path) else Path(path)
    contents = read_contents(path)
    try:
        found = weight_names.find(contents.arrays, contents.others, entry)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    path = contents.path or path
    settings = settings_beside(path)
    check_settings(settings, path)
    in_first = found.naming is KERAS or of_backbone(settings).get("downsample_in_bottleneck")
    stride_in: Any = "conv1" if in_first else None
    stride_in = contents.metadata.get("stride_in", stride_in)
    naming, metadata = found.naming.title, contents.metadata
    notes = contents.notes + found.notes
    return WeightFile(
        path, found.arrays, found.prefix, naming, found.head, found.left_out, metadata, settings, stride_in, notes
    )


def _to_numpy(value: Any) -> np.ndarray:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # torch cannot convert it to NumPy directly; float32 is exact
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()
