"""Weights between this tree and files that torchvision and timm load as they are.

A file holds torchvision's names and layout: kernels (out, in, kh, kw), dense weights (out, in). The tree holds the same
names as paths, kernels (kh, kw, in, out), dense weights (in, out). Moving is a transpose per array.

Any file that people have is read: by its content, whatever it is called; the network in it is found, whatever surrounds
it; names of Hugging Face and Keras become torchvision's, and are written on request. Only writing .pth and .pt files
needs PyTorch.
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
from jax_resnet.weight_writing import SUFFIXES, Names, check_suffix, write_arrays

__all__ = [
    "SUFFIXES",
    "Names",
    "WeightFile",
    "check_suffix",
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

    path: of the file, or of the checkpoint of a run, on this machine.
    arrays: {torchvision's name: array in torchvision's layout}, batch counts (num_batches_tracked) included.
    prefix: what stood before every name, "state_dict.module.", "" if nothing.
    naming: whose names they were: "torchvision", "Hugging Face", "Keras", "nn.Sequential".
    head: what the dense layer was called, None if there is none or it is not a single layer.
    left_out: the names of what else the file holds, such as the state of an optimizer.
    metadata: text by name, of a .safetensors file.
    settings: what config.json and preprocessor_config.json beside the file say, of a folder of Hugging Face's or a run.
    stride_in: where a bottleneck has its stride, if the file tells it; else None.
    notes: sentences for the user: a damaged checkpoint that was passed over, a normalization that was left out.
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


def from_torch(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """torchvision's keys and layout -> (params, batch_stats), nested dicts of NumPy arrays of the same dtypes.

    Args:
      state_dict: {key: array}, anything that NumPy takes, or tensors on any device.
    """
    params: dict[str, Any] = {}
    batch_stats: dict[str, Any] = {}
    for name, value in state_dict.items():
        last = name.rpartition(".")[2]
        if last != COUNT:
            (batch_stats if last in STATISTICS else params)[name] = to_tree_layout(_to_numpy(value))
    return unflatten_dict(params, sep="."), unflatten_dict(batch_stats, sep=".")


def to_torch(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """(params, batch_stats) -> {torchvision's key: array in torchvision's layout}, contiguous."""
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
    """Writes a weight file, aside first and then renamed, so that no half file is ever seen.

    Args:
      path: its suffix is the format: .safetensors, .npz, .pth or .pt; .h5 for Keras.
      params, batch_stats: nested dicts.
      names: "torchvision" (timm's too), "huggingface" (ResNetForImageClassification of transformers) or "keras"
        (ResNet50, ResNet101 and ResNet152 of keras.applications); None for what the suffix says.
      config: the network, which Keras' names need: see `weight_writing.write_arrays`.
      metadata: text by name, for .safetensors only.

    Raises:
      ValueError: for another suffix, what the format or the other library cannot hold (metadata, bfloat16 in .npz, a
        stride in "conv2" in Keras), or a suffix of PyTorch's or Keras' where torch or h5py is missing.
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
    """Reads a file into (params, batch_stats) for a network; every name and shape must fit, every value be finite.

    Args:
      path: a file, a folder or a name of Hugging Face's hub, as `read_file` takes it.
      config: the network; with num_classes=0 the file's dense layer is left aside.
      head: "new" leaves the file's dense layer aside and draws one for config.num_classes with `key`.
      stem: "grey" sums a stem for three channels into one for one channel, if that is what config has.
      key: a JAX random key, for head="new".
      entry: which network to take, see `read_file`.

    Returns:
      params and batch_stats, nested dicts of NumPy arrays of the file's dtypes; float16 and bfloat16 become float32.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a file that cannot be read (see `read_file`) or does not fit (see `check_arrays`).
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
    """`load` for a file that has been read."""
    if file.stride_in not in (None, config.stride_in) and config.block == "bottleneck":
        raise ValueError(
            f"{file.path} is of a ResNet whose blocks have their stride in {file.stride_in}, which changes what it "
            f"computes: pass a configuration with stride_in={file.stride_in!r} in Python; --init has none"
        )
    if file.naming == "Keras" and config.batch_norm_eps != resnet.ResNetConfig.batch_norm_eps:
        raise ValueError(f"{file.path}: Keras' eps is in its variances already: leave batch_norm_eps at its default")
    arrays = {
        name: array.astype(np.promote_types(array.dtype, np.float32), copy=False)
        if jnp.issubdtype(array.dtype, jnp.floating)
        else array
        for name, array in file.arrays.items()
    }
    if other := diagnosis(arrays, config):  # of the file as it is, before its ends are changed
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
    """The name and the configuration of the network in a file, see `weight_checks.recognize`; with the stride, if the
    file tells it."""
    try:
        arch, config = recognize(file.arrays, arch)
    except ValueError as error:
        raise ValueError(f"{file.path} {error}") from error
    return arch, dataclasses.replace(config, stride_in=file.stride_in or config.stride_in)


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a weight file under torchvision's names, {name: array}; see `read_file`."""
    return read_file(path).arrays


def read_file(path: str | os.PathLike, entry: str | None = None) -> WeightFile:
    """Reads the ResNet in a weight file, whatever wrote it and whatever else is in it.

    Formats are known by the content: .safetensors, .npz, PyTorch's three, pickles of NumPy arrays, and HDF5 (Keras).
    The names may be torchvision's, Hugging Face's or Keras', with any prefix.

    Args:
      path: a file; a folder of Hugging Face's or of a training run; a checkpoint of a run, run/checkpoints/5; or
        "hf:owner/name" on Hugging Face's hub, see `hub.fetch`.
      entry: which network to take where there are several, by a part of its prefix: "model_ema", "teacher". Without it
        the trained one is taken ("state_dict", "model" or "model_state_dict"), not its average.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for what is no file (a pipe is not opened), a file that cannot be read or would unpack to more than 16
        GiB, a pickle that is more than data (it is refused, since reading it would run code), no ResNet, or several; or
        if the config.json beside it is of a network that computes something else with such weights.
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
    if str(tensor.dtype) == "torch.bfloat16":  # torch hands no bfloat16 to NumPy; by way of float32 it is exact
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()
