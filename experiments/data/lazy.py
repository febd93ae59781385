"""Pictures that are decoded at each access, for data sets that the disk cannot hold decoded."""

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
    """`dataset.Pictures` that are read from files: like an array (N, H, W, C) uint8, indexed along N.

    Every access reads and decodes again. Several threads may read at once.

    pictures: all pictures of a split, in the order of the folder.
    places: (N,) integers, the indices in `pictures` of those that could be read when they were checked.
    sums: (N, 2, C), `pixel_sums` of each of the N pictures.
    decoding: how each picture is decoded.
    directory: the folder, for messages.
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
        """Decodes one picture, (H, W, C), or those that a slice, an array of numbers or a boolean array selects.

        Raises:
          DataError: a picture can no longer be read; the message names it.
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
                f"{picture.name} in {self.directory} can no longer be read ({result.reason}), although the check at "
                "the start could read it. Restore it, or start again to repeat the check"
            )
        return result

    def take(self, indices: np.ndarray) -> LazyPictures:
        """Selects some of the N pictures without decoding them."""
        return dataclasses.replace(self, places=self.places[indices], sums=self.sums[indices])

    def channel_sums(self) -> np.ndarray:
        """(2, C): for each channel, the sum of all pixels and the sum of their squares; nothing is decoded."""
        return self.sums.sum(0, dtype=object)  # Python's integers do not overflow
