"""Pictures that are decoded each time they are asked for: for a set that the disk cannot hold decoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from experiments.data.dataset import DataError
from experiments.data.pictures import Decoding, Failure, Picture, decode_or_explain


@dataclasses.dataclass(frozen=True, eq=False)
class LazyPictures:
    """Stands for an array (N, H, W, C) uint8: has its shape, dtype and length, and is indexed along N like it.

    Every access reads and decodes anew. May be read by several threads at once.

    pictures: of a split, in the order of the folder.
    places: (N,) whole numbers, which of them these are: all but those that could not be read when checked.
    sums: (N, 2, C), `pixel_sums` of each of the N.
    decoding: what becomes of a picture.
    directory: what messages call the folder.
    """

    pictures: Sequence[Picture]
    places: np.ndarray
    sums: np.ndarray
    decoding: Decoding
    directory: Path
    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.places), *self.decoding.shape)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        """Decodes one picture, (H, W, C), those of a slice, or those of an array of numbers or of booleans.

        Raises:
          DataError: one of them, named, can no longer be read.
        """
        places = self.places[index]
        if places.ndim == 0:
            return self._decode(places)
        images = np.empty((len(places), *self.decoding.shape), np.uint8)
        for image, place in zip(images, places, strict=True):
            image[:] = self._decode(place)
        return images

    def _decode(self, place: np.integer) -> np.ndarray:
        picture = self.pictures[int(place)]
        result = decode_or_explain(picture, self.decoding)
        if isinstance(result, Failure):
            raise DataError(
                f"{picture.name} in {self.directory} can no longer be read ({result.reason}): it could be when the "
                "pictures were checked. Put it back, or start again to have them checked again"
            )
        return result

    def take(self, indices: np.ndarray) -> LazyPictures:
        """These pictures of the N, still to be decoded."""
        return dataclasses.replace(self, places=self.places[indices], sums=self.sums[indices])

    def channel_sums(self) -> np.ndarray:
        """(2, C): of every channel the sum of all pixels and the sum of their squares; nothing is decoded."""
        return self.sums.sum(0, dtype=object)  # Python's whole numbers, which have no end
