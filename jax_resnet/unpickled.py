"""What may come out of a pickle: arrays, dicts, and objects that do nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

__all__ = ["Dict", "Inert", "RefusedError", "Storage", "Tensor"]


class RefusedError(ValueError):
    """A pickle wants what is not data: the message goes on after the file's name."""


class Storage:
    """A block of numbers, which may be read after the tensors that lie in it are known."""

    def __init__(self, dtype: np.dtype, data: bytes = b""):
        self.dtype, self.data = dtype, data


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage; `array` makes a copy. A tensor of an unusual kind (sparse, quantized) has no array.

    negative, conjugate: bits of PyTorch's, as x.conj() and its .imag have them: the storage holds the other sign.
    """

    storage: Storage
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in numbers, as in PyTorch
    offset: int
    kind: str = ""
    negative: bool = False
    conjugate: bool = False

    def array(self) -> np.ndarray:
        """Raises a ValueError for a tensor that reaches out of its storage, or is no plain array."""
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
    """Stands for an object that is not needed. Pickles call it, fill it and index it to no effect."""

    tensor: Tensor | None = None  # of a NumPy array

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def _ignore(self, *args: Any) -> None:
        pass

    append = extend = add = update = __setitem__ = _ignore


class Dict(dict):
    """An OrderedDict and the like; the attributes that pickles give it are dropped."""

    def __new__(cls, *args: Any) -> Dict:
        return super().__new__(cls)

    def __init__(self, *args: Any):
        super().__init__()
        for arg in args:
            if isinstance(arg, Mapping | list):
                self.update(arg)

    def __setstate__(self, state: Any) -> None:
        pass
