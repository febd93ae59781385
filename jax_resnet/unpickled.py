"""The objects that reading a pickle may make: arrays, dicts, and objects that do nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

__all__ = ["Dict", "Inert", "RefusedError", "Storage", "Tensor"]


class RefusedError(ValueError):
    """A pickle asks for more than data. The message continues a sentence that begins with the file's name."""


class Storage:
    """A block of numbers in which tensors lie. A file may define the tensors before the numbers are read."""

    def __init__(self, dtype: np.dtype, data: bytes = b""):
        self.dtype, self.data = dtype, data


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage, of which `array` makes a copy. For an unusual kind (sparse, quantized) `array` raises.

    negative, conjugate: the bits by which PyTorch marks lazy results, such as x.conj() and x.conj().imag. The storage
      holds the values before the sign is changed.
    """

    storage: Storage
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers, not bytes, as in PyTorch
    offset: int
    kind: str = ""
    negative: bool = False
    conjugate: bool = False

    def array(self) -> np.ndarray:
        """Copies the tensor into an array. Raises a ValueError for an unusual kind or a tensor beyond its storage."""
        if self.kind:
            raise ValueError(f"a {self.kind} tensor")
        size = self.dtype.itemsize
        strides = [stride * size for stride in self.strides]
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        if min((*self.strides, self.offset), default=0) < 0:
            raise ValueError("a tensor with a negative stride or offset")
        end = self.offset + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        if (end + 1) * size > len(self.storage.data):
            raise ValueError("a tensor larger than its storage")
        view = np.ndarray(self.shape, self.dtype, self.storage.data, self.offset * size, strides)
        copy = np.array(view, order="C").astype(self.dtype.newbyteorder("="), copy=False)
        copy = np.negative(copy) if self.negative else copy
        return np.conjugate(copy) if self.conjugate else copy


class Inert:
    """Replaces an object that is not needed. A pickle may call, fill and index it, without effect."""

    tensor: Tensor | None = None  # set if the object is a NumPy array

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def _ignore(self, *args: Any) -> None:
        pass

    append = extend = add = update = __setitem__ = _ignore


class Dict(dict):
    """Replaces an OrderedDict or similar dict. Drops attributes that a pickle sets."""

    def __new__(cls, *args: Any) -> Dict:
        return super().__new__(cls)

    def __init__(self, *args: Any):
        super().__init__()
        for arg in args:
            if isinstance(arg, Mapping | list):
                self.update(arg)

    def __setstate__(self, state: Any) -> None:
        pass
