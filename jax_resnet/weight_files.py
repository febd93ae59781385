"""Reads untrusted weight files of several libraries into {name: array}. Executes nothing and bounds the memory.

The first bytes select the format; the suffix does not matter. Nested entries become dotted names, which `weight_names`
interprets.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from jax_resnet import unpickling
from jax_resnet.checkpoint import RECORD, STATE, Checkpoints, DamagedError
from jax_resnet.other_files import AGAIN, first_sentence, known

__all__ = [
    "FOLDER_FILES",
    "INDEX",
    "Contents",
    "Unreadable",
    "read_contents",
    "refuse_bombs",
    "to_torch_layout",
    "to_tree_layout",
]

_MAX_BYTES = 2**34  # of all arrays together; ResNet-152 with Adam's state has 1.5e9 in float64
_MAX_INDEX = 2**24  # bytes of an index file
_MAX_ENTRIES, _MAX_DEPTH = 10**6, 16  # of nested entries, which may contain one another
# Files to look for in a folder, in this order: Hugging Face's names, then the name in a training run.
INDEX = ".index.json"  # such a file says which of several weight files holds which array
FOLDER_FILES = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}",
                "weights.safetensors")  # fmt: skip
_OLD_PICKLE = rb"\([dli]|[]}]q\0|c(collections|numpy|torch)[\w.]*\n"  # protocols 0 and 1
_SUFFIXES = {".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".npz", ".h5", ".keras"}  # in messages only
# {number of variables in a Keras layer: their names}
_KERAS_VARIABLES = {2: ("kernel", "bias"), 4: ("gamma", "beta", "moving_mean", "moving_variance")}


class Contents(NamedTuple):
    """What a file holds.

    arrays: {dotted name: array}. Pickles give an `unpickling.Tensor`, whose method `array()` makes the array.
    others: the dotted names of all other entries, such as "epoch".
    metadata: {name: text} of a .safetensors file.
    path: the file or the checkpoint that was read, if a folder was given.
    notes: a sentence for the user on which checkpoint was read, if later ones are damaged.
    """

    arrays: dict[str, Any]
    others: tuple[str, ...] = ()
    metadata: Mapping[str, str] = {}
    path: Path | None = None
    notes: tuple[str, ...] = ()


def read_contents(path: Path) -> Contents:
    """Reads the arrays of a file or of a folder of files, under their names in the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: path is a pipe or device (neither is opened), or the file cannot be read, would unpack to more than 16
        GiB, or is a pickle with more than data.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.name == STATE and path.parent.name.isdecimal() and (path.parent / RECORD).is_file():  # of a checkpoint
        return _read_folder(path.parent)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or device: copy what it gives to a file")
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    start = b""
    try:
        with path.open("rb") as file:
            start = file.read(512)
            file.seek(0)
            contents = _read(path, start, file)
            return contents._replace(notes=tuple(_newer(path, contents)))
    except (Unreadable, unpickling.RefusedError) as error:
        raise ValueError(f"{path} {error}") from error
    except Exception as error:  # for a damaged file the readers raise a dozen types
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        reason = known(start) or f"{first_sentence(error)}; {AGAIN}"
        raise ValueError(f"{path} is not a readable weight file: {reason}") from error


class Unreadable(ValueError):
    """A file is no weight file, or is one that is not supported. The message continues after the file's name."""


def _read(path: Path, start: bytes, file: BinaryIO) -> Contents:
    # A .safetensors file begins with the length of its header, whose bytes may look like the start of a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") + 8 <= path.stat().st_size:
        return _read_safetensors(path)
    if start.startswith(b"PK\3\4"):
        return _read_zip(file)
    if start.startswith(b"\x89HDF"):
        return _flat(_read_hdf5(file))
    if start[257:262] == b"ustar":
        return _read_tar(file)
    if (start[:1] == b"\x80" and start[1:2] <= b"\5") or re.match(_OLD_PICKLE, start):  # pickles
        return _flat(unpickling.read_stream(file))
    if start.lstrip().startswith(b"{") and b'"weight_map"' in (index := file.read(_MAX_INDEX)):
        return _read_shards(path, index)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    raise Unreadable(f"is not a readable weight file: {known(start) or f'its format is not known: {AGAIN}'}")


def _read_safetensors(path: Path) -> Contents:
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        types = {file.get_slice(name).get_dtype() for name in file.keys()}
    if eight := sorted(name for name in types if re.match(r"F[468](_|$)", name)):
        raise Unreadable(f"is refused: it holds {', '.join(eight)}: save it as float32, float16 or bfloat16")
    return Contents(dict(safetensors.numpy.load_file(path)), metadata=metadata)


def _read_zip(file: BinaryIO) -> Contents:
    """Reads a zip archive: NumPy's .npz, Keras' .keras, or PyTorch's format since 1.6."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        refuse_bombs(sum(member.file_size for member in archive.infolist()))
        if "model.weights.h5" in names:
            return _flat(_read_hdf5(io.BytesIO(archive.read("model.weights.h5"))))
        if any(name.endswith("constants.pkl") for name in names):
            raise Unreadable(
                "is not a readable weight file: it is TorchScript: load it in PyTorch and save its state_dict, "
                "torch.save(model.state_dict(), PATH)"
            )
        if pickles := [name for name in names if re.fullmatch(r"([^/]*/)?data\.pkl", name)]:
            return _flat(unpickling.read_zip(archive, pickles[0].removesuffix("data.pkl")))
    if not all(name.endswith(".npy") for name in names):
        raise Unreadable(f"is an archive of {_some(names)}: unpack it and name a weight file from it")
    file.seek(0)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            contents = dict(arrays)
    except ValueError as error:
        if "Object arrays" in str(error):
            raise Unreadable(
                "is refused: it holds Python objects, which could run code: expected arrays of numbers"
            ) from error
        raise
    if raw := [name for name, array in contents.items() if array.dtype.kind == "V"]:
        size = contents[raw[0]].dtype.itemsize
        what = {1: "float8", 2: "bfloat16"}.get(size, "a type that NumPy does not have")
        raise Unreadable(
            f"is refused: {len(raw)} arrays, such as {raw[0]}, are raw bytes, {size} per value: NumPy saved {what} "
            "without its type. Save it as .safetensors, or as float32"
        )
    return _flat(contents)


def _read_tar(file: BinaryIO) -> Contents:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        names = archive.getnames()
        if {"pickle", "storages", "tensors"} <= {name.removeprefix("./") for name in names}:
            return _flat(unpickling.read_tar(archive))
    raise Unreadable(f"is an archive of {_some(names)}: unpack it and name a weight file from it")


def _read_hdf5(file: BinaryIO) -> dict[str, np.ndarray]:
    """Names arrays {layer}.{variable} in a file of Keras, whatever their group; in other files "/" becomes "."."""
    try:
        import h5py
    except ImportError as error:
        raise Unreadable(
            f'is an HDF5 file, which needs h5py ({error}): pip install -e ".[keras]", or save it as .npz'
        ) from error
    with h5py.File(file, "r") as root:
        found = {name: item for name, item in _hdf5_arrays(root, h5py) if not name.startswith("optimizer")}
        refuse_bombs(sum(math.prod(item.shape) * item.dtype.itemsize for item in found.values()))
        names: dict[str, Any] = {name: _keras_name(name, item) for name, item in found.items()}
        if None in names.values() or len(set(names.values())) < len(names):
            names = {name: name.replace("/", ".") for name in found}
        return {names[name]: np.asarray(item[()]) for name, item in found.items()}


def _keras_name(name: str, item: Any) -> str | None:
    """Returns {layer}.{variable} for a variable of a Keras layer, None for another array."""
    path = name.split("/")
    variable = path[-1].split(":")[0]
    if len(path) > 1 and path[-2] == "vars" and variable.isdecimal():  # Keras 3
        layer, number = str(item.parent.attrs.get("name", path[-3])), int(variable)
        kinds = _KERAS_VARIABLES.get(max(2, len(item.parent)), ())
        return f"{layer}.{kinds[number] if number < len(kinds) else variable}"
    known = [kind for kinds in _KERAS_VARIABLES.values() for kind in kinds]
    return f"{path[-2]}.{variable}" if len(path) > 1 and variable in known else None


def _hdf5_arrays(group: Any, h5py: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields (path, data set) of the numbers in the file itself. Skips links and refuses data in other files."""
    for name in group:
        if depth < _MAX_DEPTH and isinstance(group.get(name, getlink=True), h5py.HardLink):
            item = group[name]
            if isinstance(item, h5py.Group):
                yield from _hdf5_arrays(item, h5py, f"{prefix}{name}/", depth + 1)
            elif item.external or item.is_virtual:
                raise Unreadable(f"is refused: its array {prefix}{name} is in another file")
            elif item.shape is not None and item.dtype.kind in "fiub":
                yield prefix + name, item


def _read_shards(path: Path, index: bytes) -> Contents:
    """Reads the files that Hugging Face's index names. The index says which file holds which array."""
    parts = json.loads(index)["weight_map"]
    arrays: dict[str, Any] = {}
    for name in sorted({str(name) for name in parts.values()}):
        if Path(name).name != name:
            raise Unreadable(f"is refused: it names a file in another folder, {name}")
        try:
            arrays |= read_contents(path.with_name(name)).arrays
        except (OSError, ValueError) as error:
            raise Unreadable(f"names parts, of which one cannot be read: {error}") from error
    if missing := [name for name in parts if name not in arrays]:
        raise Unreadable(f"names {len(missing)} arrays that its parts do not hold, such as {missing[0]}")
    return Contents(arrays)


def _read_folder(path: Path) -> Contents:
    """Reads a folder of Hugging Face or of a training run, or a checkpoint of a run."""
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return read_contents(path / name)._replace(path=path / name)
    if path.name.isdecimal() and any(path.glob("record*")):
        folder, steps = path.parent, [int(path.name)]
    else:
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        steps = Checkpoints(folder).steps()[::-1] if folder.is_dir() else []
    damaged: list[str] = []
    for step in steps:
        try:
            contents = _of_run(Checkpoints(folder).read(step)[0])
        except DamagedError as error:
            damaged.append(str(error))
            continue
        notes = (f"checkpoint {step} was read, because {'; '.join(damaged)}",) if damaged else ()
        return contents._replace(path=folder / str(step), notes=notes)
    if damaged:
        raise ValueError(damaged[-1])
    if (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path} is a run without weights: none were written yet, or they were deleted")
    some = itertools.islice(path.rglob("*"), 1000)  # a home folder has millions
    inside = (file for file in sorted(some) if file.suffix.lower() in _SUFFIXES)
    hint = next((f", such as {file}" for file in inside), "")
    raise ValueError(
        f"{path} is a folder without {FOLDER_FILES[0]}, {FOLDER_FILES[-1]} or checkpoints of a run: name a weight "
        f"file{hint}"
    )


def _newer(file: Path, contents: Contents) -> Iterator[str]:
    """A note if the last checkpoint of a run is newer than its weight file: it was resumed, then perhaps killed."""
    if file.name != FOLDER_FILES[-1]:
        return
    folder = file.parent / "checkpoints"
    for step in Checkpoints(folder).steps()[-1:]:
        if (folder / str(step)).stat().st_mtime > file.stat().st_mtime:
            with contextlib.suppress(DamagedError):
                newest = _of_run(Checkpoints(folder).read(step)[0]).arrays
                theirs = contents.arrays
                if any(name in theirs and not np.array_equal(theirs[name], newest[name]) for name in newest):
                    here = folder / str(step)
                    yield f"{file.name} is older than checkpoint {step}: for the newer weights, name {here}"


def _of_run(arrays: Mapping[str, np.ndarray]) -> Contents:
    """The parameters, statistics and moving averages in a checkpoint of `jax_resnet.train`, in torchvision's layout."""
    ours = {}
    for name, array in arrays.items():
        if match := re.fullmatch(r"(ema\.)?(?:params|batch_stats)\.(.+)", name):
            ours[(match[1] or "") + match[2]] = to_torch_layout(array)
    return Contents(ours, tuple(name for name in arrays if name.startswith(("opt_state", "step"))))


def to_torch_layout(array: np.ndarray) -> np.ndarray:
    """Kernels (kh, kw, in, out) -> (out, in, kh, kw), dense weights (in, out) -> (out, in)."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T if array.ndim == 2 else array


def to_tree_layout(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T if array.ndim == 2 else array


def _flat(tree: Any) -> Contents:
    arrays: dict[str, Any] = {}
    others = []
    for name, value in _leaves(tree):
        value = value.tensor if isinstance(value, unpickling.Inert) else value
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            arrays[name] = value
        else:
            others.append(name)
    return Contents(arrays, tuple(others))


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of all entries that are no lists or dicts.

    Raises:
      Unreadable: there are more than _MAX_ENTRIES, or their names are long: a small file can repeat a list for ever.
    """
    entries, letters, waiting = 0, 0, [("", tree, 0)]
    while waiting:
        prefix, tree, depth = waiting.pop()
        many = isinstance(tree, list | tuple)
        if depth == _MAX_DEPTH or not (many or isinstance(tree, Mapping)):
            yield prefix.removesuffix("."), tree
            continue
        entries += 1 + len(tree)
        letters += len(prefix) * len(tree)
        if entries > _MAX_ENTRIES or letters > 100 * _MAX_ENTRIES:
            raise Unreadable(f"is refused: it has more than {_MAX_ENTRIES:,} entries")
        items = list(enumerate(tree) if many else tree.items())
        waiting += [(f"{prefix}{name}.", value, depth + 1) for name, value in reversed(items)]


def refuse_bombs(size: int) -> None:
    """Raises Unreadable if arrays of `size` bytes would fill the memory.

    A small file can stand for any number of bytes: a zip archive, or a torch tensor whose strides are 0.
    """
    if size > _MAX_BYTES:
        raise Unreadable(f"is refused: it would unpack to {size / 2**30:,.0f} GiB, and no ResNet needs that much")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
