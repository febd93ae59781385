"""Reads the pickles in weight files without executing them, and without PyTorch.

A pickle is a program: it names functions and classes of any module and calls them. This reader replaces each name by a
function of this module that makes an array, by a dict, or by `Inert`, which takes any arguments and does nothing. It
refuses names that it does not list (RefusedError). So a path, a date or a training's settings in a pickle are accepted
but never created.

PyTorch has had three formats: since 1.6 a zip archive, before that a stream of pickles followed by the numbers, and in
its first year a tar archive. A plain pickle may also hold NumPy arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from typing import IO, Any, ClassVar, Self

import ml_dtypes
import numpy as np

from jax_resnet.unpickled import Dict, Inert, RefusedError, Storage, Tensor

__all__ = ["Dict", "Inert", "RefusedError", "Storage", "Tensor", "read_stream", "read_tar", "read_zip"]

_MAGIC = 0x1950A86A20F9469CFC6C  # the value of the first pickle in PyTorch's stream
_STORAGES = {
    "Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": ml_dtypes.bfloat16, "Long": "i8", "Int": "i4",
    "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?", "ComplexFloat": "c8", "ComplexDouble": "c16",
    "Untyped": "u1", "QInt8": "i1", "QUInt8": "u1", "QInt32": "i4",
}  # fmt: skip
_TORCH_DTYPES = {
    "float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": ml_dtypes.bfloat16, "int64": "i8", "int32": "i4",
    "int16": "i2", "int8": "i1", "uint8": "u1", "uint16": "u2", "uint32": "u4", "uint64": "u8", "bool": "?",
    "complex64": "c8", "complex128": "c16",
}  # fmt: skip
# Modules and names of classes and functions that only make data. In place of such an object the reader puts an Inert.
_DATA_MODULES = {"datetime", "decimal", "fractions", "pathlib", "pathlib._local", "uuid", "zoneinfo"}
_DATA = {
    "argparse.Namespace", "types.SimpleNamespace", "collections.deque", "torch.Size", "torch.device", "torch.Tensor",
    "torch.serialization._get_layout", "torch.torch_version.TorchVersion", "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer", "torch.per_tensor_affine", "torch.per_channel_affine", "torch.strided",
    "torch.sparse_coo", "copy_reg._reconstructor", "copyreg._reconstructor",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__")
      for name in ("bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "long",
                   "object", "range", "set", "slice", "str", "tuple", "unicode", "xrange")),
}  # fmt: skip
_SCALAR = re.compile(r"numpy\.((u?int|float|complex)\d+|bool_?|str_|bytes_)")  # types, such as a setting's
_MAX_ENTRIES = 10**6  # of a tuple
_DICTS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}


class _Maker:
    """A function of this module that a pickle may call. Unlike a function it has no attributes for a pickle to set."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]):
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise RefusedError("is refused: its pickle changes a function")


class _NumPyArray(Inert):
    """A NumPy array, which a pickle creates empty and then fills."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2 pickled bytes as str
        if isinstance(dtype, _DType) and isinstance(data, bytes):
            self.tensor = _from_buffer(data, dtype, shape, "F" if by_columns else "C")


class _Tuple(tuple):
    """A tuple that counts its entries, nested ones included: a small pickle can repeat one within another for ever."""

    entries: int

    def __new__(cls, items: Iterable[Any]) -> Self:
        self = super().__new__(cls, items)
        self.entries = 1 + sum(item.entries if isinstance(item, _Tuple) else 1 for item in self)
        if self.entries > _MAX_ENTRIES:
            raise RefusedError(f"is refused: a tuple in its pickle has more than {_MAX_ENTRIES:,} entries")
        return self


class _DType(Inert):
    """A dtype of NumPy, made from its code or, for ml_dtypes, from the _DType of the scalar class."""

    dtype: np.dtype[Any]

    def __new__(cls, code: Any, *_: Any) -> Self:
        self = super().__new__(cls)
        self.dtype = code.dtype if isinstance(code, _DType) else np.dtype(_text(code))
        return self

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Bounded:
    """A file that refuses to read more bytes than it has: reading would allocate them first."""

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._size, self.readline = file, size, file.readline

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise EOFError(f"the pickle asks for {count:,} bytes, more than the file has")
        return self._file.read(count)


class _Unpickler(pickle._Unpickler):  # the C version would allocate as much as a hostile memo index asks for
    def __init__(self, file: IO[bytes], size: int, persistent: Callable[[Any], Any] | None = None):
        super().__init__(_Bounded(file, size), encoding="latin1")
        self._budget = 4 * size + 2**20  # in bytes, generous: an honest pickle unpacks each of its bytes at most twice
        self._persistent = persistent

    def _load_bytearray(self) -> None:
        self.append(self.read(*struct.unpack("<Q", self.read(8))))  # type: ignore[attr-defined]

    def _load_tuple(self, opcode: int) -> None:
        pickle._Unpickler.dispatch[opcode](self)  # type: ignore[arg-type]
        self.stack[-1] = _Tuple(self.stack[-1])  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: _load_bytearray}
    for _opcode in b"".join((pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)):
        dispatch[_opcode] = functools.partial(_load_tuple, opcode=_opcode)

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        today = path.replace("numpy.core.", "numpy._core.")  # numpy.core is the name before NumPy 2
        if path in _DICTS:
            return Dict
        if path in _DATA or module in _DATA_MODULES or module.startswith("numpy.random.") or _SCALAR.fullmatch(path):
            return Inert
        if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
            return _Kind(name.removesuffix("Storage"))
        if module in ("torch", "torch.cuda") and name.endswith("Tensor"):
            return Inert
        if module == "torch" and re.match("float|bfloat|complex|bool|bits|q?u?int", name):
            return _dtype(_TORCH_DTYPES[name]) if name in _TORCH_DTYPES else Inert
        if path == "ml_dtypes.bfloat16":
            return _dtype(ml_dtypes.bfloat16)
        if path == "_codecs.encode":
            return _Maker(self._encode)
        if path == "torch.storage._load_from_bytes":
            return _Maker(self._load)
        if today in _MAKERS:
            return _MAKERS[today]
        if path.startswith("torch._utils._rebuild_"):
            kind = re.sub("_rebuild_|_?tensor|_no_storage", "", name)
            return _Maker(lambda *_: _unusual("quantized" if kind == "q" else kind))
        raise RefusedError(
            f"is refused: its pickle asks for {path}, which is more than data and could run code. If you trust the "
            "file, load it in PyTorch and save only its state_dict: torch.save(model.state_dict(), PATH)"
        )

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("the pickle refers to numbers outside the file")
        return self._persistent(pid)

    def _encode(self, text: str, encoding: str = "latin1") -> bytes:
        """Makes bytes from the text that pickle's protocol 2 writes for them."""
        self._spend(len(text))
        return text.encode("latin1")

    def _load(self, data: bytes) -> Any:
        """Reads a storage that pickle wrote without torch.save: the storage's stream lies inside the pickle."""
        self._spend(len(data))
        return read_stream(io.BytesIO(data))

    def _spend(self, size: int) -> None:
        """Counts unpacked bytes. A hostile pickle can refer to the same bytes many times and unpack them each time."""
        self._budget -= size
        if self._budget < 0:
            raise RefusedError("is refused: its pickle unpacks to much more data than it holds")


class _Kind(Inert):
    """A class of storages in PyTorch, which determines the dtype."""

    dtype: np.dtype[Any]

    def __new__(cls, name: str) -> Self:
        self = super().__new__(cls)
        self.dtype = np.dtype(_STORAGES[name])
        return self


def _text(value: Any) -> str:
    """The text of a number or text; raises a TypeError for other values, whose text may be endless."""
    if not isinstance(value, int | str):
        raise TypeError("neither a number nor a text")
    return str(value)


def _dtype(code: Any) -> _DType:
    dtype = _DType("f4")
    dtype.dtype = np.dtype(code)
    return dtype


def _unusual(kind: str) -> Tensor:
    return Tensor(Storage(np.dtype("u1")), np.dtype("u1"), (), (), 0, kind)


def _tensor(
    storage: Storage, offset: int, size: Any, strides: Any, _: Any = None, __: Any = None, metadata: Any = None
) -> Tensor:
    bits = dict(metadata or {})
    negative, conjugate = (bool(bits.pop(name, False)) for name in ("neg", "conj"))
    if bits or (conjugate and storage.dtype.kind != "c") or (negative and storage.dtype.kind not in "fc"):
        return _unusual(f"marked ({', '.join(map(_text, metadata))})")
    return Tensor(storage, storage.dtype, tuple(size), tuple(strides), offset, "", negative, conjugate)


def _typed_tensor(
    storage: Any, offset: int, size: Any, strides: Any, _: Any, __: Any, dtype: Any, metadata: Any = None
) -> Tensor:
    """Makes a tensor whose type has no class of storages: the storage holds bytes, and the offset counts numbers."""
    if not isinstance(dtype, _DType):
        return _unusual("eight-bit or smaller")
    if metadata:
        return _unusual(f"marked ({', '.join(map(_text, metadata))})")
    return dataclasses.replace(_tensor(storage, offset, size, strides), dtype=dtype.dtype)


def _from_buffer(data: Any, dtype: _DType, shape: tuple[int, ...], order: str = "C") -> Any:
    if dtype.dtype.hasobject or dtype.dtype.kind not in "fiubcV":
        return Inert()
    sizes = [shape[i + 1 :] if order == "C" else shape[:i] for i in range(len(shape))]
    return Tensor(Storage(dtype.dtype, data), dtype.dtype, tuple(shape), tuple(map(math.prod, sizes)), 0)


_MAKERS = {
    "torch._utils._rebuild_tensor": _Maker(_tensor),
    "torch._utils._rebuild_tensor_v2": _Maker(_tensor),
    "torch._utils._rebuild_tensor_v3": _Maker(_typed_tensor),
    "torch._utils._rebuild_parameter": _Maker(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": _Maker(lambda data, *_: data),
    "torch._utils._rebuild_device_tensor_from_numpy": _Maker(lambda data, *_: data),
    "torch._utils._rebuild_xla_tensor": _Maker(lambda data, *_: data),
    "torch._tensor._rebuild_from_type_v2": _Maker(lambda make, kind, args, state: make(*args)),
    "numpy._core.multiarray._reconstruct": _Maker(lambda *_: _NumPyArray()),
    "numpy._core.numeric._frombuffer": _Maker(_from_buffer),
    "numpy._core.multiarray.scalar": _Maker(lambda *_: Inert()),
    "numpy.ndarray": Inert,
    "builtins.bytes": _Maker(lambda *_: b""),  # protocol 2 writes empty bytes as a call of bytes
    "__builtin__.bytes": _Maker(lambda *_: b""),
    "numpy.dtype": _DType,
}


def read_zip(archive: zipfile.ZipFile, prefix: str) -> Any:
    """Reads PyTorch's zip archive: the pickle is {prefix}data.pkl, the numbers of storage 0 are {prefix}data/0."""
    order = ">" if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") == b"big" else "<"
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        _, kind, key, *_ = pid
        if key not in storages:
            storages[key] = Storage(kind.dtype.newbyteorder(order), archive.read(f"{prefix}data/{key}"))
        return storages[key]

    member = archive.getinfo(f"{prefix}data.pkl")
    with archive.open(member) as file:
        return _Unpickler(file, member.file_size, storage).load()


def read_stream(file: IO[bytes]) -> Any:
    """Reads a pickle. If its value is PyTorch's magic number, reads the four pickles after it and the storages."""
    size = file.seek(0, 2)
    file.seek(0)
    first = _Unpickler(file, size).load()
    if first != _MAGIC:
        return first
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        _, kind, key, *_ = pid
        return storages.setdefault(key, Storage(kind.dtype.newbyteorder("<")))

    _, _, contents, keys = (_Unpickler(file, size, storage).load() for _ in range(4))
    for key in keys:
        _fill(storages[key], file)
    return contents


def _fill(storage: Storage, file: IO[bytes]) -> None:
    (count,) = struct.unpack("<Q", file.read(8))
    here = file.tell()
    size = min(count * storage.dtype.itemsize, file.seek(0, 2) - here)  # asking for more would allocate memory for it
    file.seek(here)
    storage.data = file.read(size)


def read_tar(archive: tarfile.TarFile) -> Any:
    """Reads the tar archive of PyTorch's first year: storages, tensors in them, and a pickle that refers to tensors."""
    members = {member.name.removeprefix("./"): member for member in archive.getmembers()}

    def opened(name: str) -> tuple[IO[bytes], int]:
        file = archive.extractfile(members[name])
        if file is None:
            raise pickle.UnpicklingError(f"{name} in the archive is not a file")
        return file, members[name].size

    file, size = opened("storages")
    storages: dict[Any, Storage] = {}
    for _ in range(_Unpickler(file, size).load()):
        key, _, kind = _Unpickler(file, size).load()
        storages[key] = Storage(kind.dtype)
        _fill(storages[key], file)
    for target, root, offset, count in _Unpickler(file, size).load():
        itemsize = storages[root].dtype.itemsize
        storages[target] = Storage(storages[root].dtype, storages[root].data[offset * itemsize :][: count * itemsize])
    file, size = opened("tensors")
    tensors = {}
    for _ in range(_Unpickler(file, size).load()):
        key, storage, _ = _Unpickler(file, size).load()
        (ndim,) = struct.unpack("<i4x", file.read(8))
        if ndim > 64:
            raise pickle.UnpicklingError(f"a tensor has {ndim} axes, more than 64")
        numbers = struct.unpack(f"<{2 * ndim + 1}q", file.read(8 * (2 * ndim + 1)))
        tensors[_text(key)] = _tensor(storages[storage], numbers[-1], numbers[:ndim], numbers[ndim:-1])
    file, size = opened("pickle")
    return _Unpickler(file, size, lambda pid: pid[0] if isinstance(pid, tuple) else tensors[_text(pid)]).load()
