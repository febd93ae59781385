"""From files of pictures to uint8 arrays of one size: what a picture is, how one is decoded, and many at once."""

from __future__ import annotations

import collections
import dataclasses
import io
import stat
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from experiments.data.dataset import DataError
from experiments.machine import cores

SPLITS = ("train", "test")
MAX_FILE_BYTES = 2**30
# Pillow refuses pictures of more than twice its limit, and of those in between it says this at each.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Box(NamedTuple):
    """Corners of a box as the devkit writes them: pixels counted from 1, both corners inside the box.

    With relative=True x is divided by the width of the picture and y by its height, which is how TFDS keeps the same
    numbers.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    relative: bool = False


class Picture(NamedTuple):
    """A picture yet to be decoded.

    name: what messages call it: its path below the folder, or its place in a file of many.
    data: the file's path, or its bytes.
    """

    name: str
    label: int
    box: Box | None
    data: Path | bytes


@dataclasses.dataclass(frozen=True)
class PictureFolder:
    """A folder whose layout was recognized and whose pictures can be read.

    layout: the layout's name.
    counts: number of pictures of each split.
    boxes: whether every picture has a box.
    identity: JSON values that differ whenever the pictures, labels or boxes do.
    notes: what a person should know about the folder.
    pictures: "train" or "test" -> its pictures, in a fixed order; a Sequence, which can be pickled, where each can be
      read without those before it.
    """

    layout: str
    directory: Path
    class_names: tuple[str, ...]
    counts: dict[str, int]
    boxes: bool
    identity: dict[str, Any]
    notes: tuple[str, ...]
    pictures: Callable[[str], Iterable[Picture]]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What becomes of a picture.

    image_size: (height, width) in pixels; the aspect ratio is not kept.
    grey: one channel in place of three.
    margin: pixels by which a box is widened on every side, as far as the picture reaches; None takes whole pictures.
    """

    image_size: tuple[int, int]
    grey: bool
    margin: int | None

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.image_size, 1 if self.grey else 3)


class Failure(NamedTuple):
    """Why a picture gave no array. kind: "file" (cannot be read), "picture" (cannot be decoded) or "box"."""

    name: str
    kind: str
    reason: str


class BoxOutside(Exception):
    """A box that does not lie inside its picture."""


def printable(name: str) -> str:
    """A file's name for messages and files: in one line, and in letters that can be encoded.

    A name may hold line breaks, commands for the terminal, and bytes that are no UTF-8; they become escapes, "\\n".
    """
    return "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else ascii(letter)[1:-1]
        for letter in name
    )


def decode_many(pictures: Iterable[Picture], decoding: Decoding) -> Iterator[tuple[Picture, np.ndarray | Failure]]:
    """Decodes pictures in as many threads as there are processors (Pillow releases the interpreter's lock).

    Yields each picture with its (H, W, C) uint8 array, or with the reason why there is none, in the order given. At
    most a few pictures per thread are in memory at a time.
    """
    threads = cores()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    waiting: collections.deque = collections.deque()
    try:
        for picture in pictures:
            waiting.append((picture, pool.submit(decode_or_explain, picture, decoding)))
            if len(waiting) >= 8 * threads:
                done, result = waiting.popleft()
                yield done, result.result()
        while waiting:
            done, result = waiting.popleft()
            yield done, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def decode_or_explain(picture: Picture, decoding: Decoding) -> np.ndarray | Failure:
    """The decoded picture, or what is wrong with it; never raises."""
    try:
        data = picture.data if isinstance(picture.data, bytes) else read_file(picture.data)
    except OSError as error:
        return Failure(picture.name, "file", error.strerror or str(error))
    except ValueError as error:
        return Failure(picture.name, "picture", str(error))
    try:
        return decode(data, picture.box, decoding)
    except BoxOutside as error:
        return Failure(picture.name, "box", str(error))
    except Exception as error:  # Pillow meets a broken file with almost any type: OSError, SyntaxError, IndexError, …
        return Failure(picture.name, "picture", str(error).rstrip(".") or type(error).__name__)


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is a pipe, which would be waited for, a device, which may have no end, or too large.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("a pipe or device, not a file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"{status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
    return path.read_bytes()


def decode(data: bytes, box: Box | None, decoding: Decoding) -> np.ndarray:
    """Decodes one picture: to RGB or grey, cut to its box, resized by Lanczos's filter.

    An orientation that a camera noted (EXIF) is left alone: the boxes refer to the pixels as they are stored.

    Args:
      data: the file, in any format that Pillow reads; of several frames the first.
      box: ignored where decoding.margin is None.

    Returns:
      (H, W, C) uint8.

    Raises:
      BoxOutside: the box does not lie inside the picture.
      Exception: the picture cannot be decoded.
    """
    with open_image(data) as image:
        image.load()
        colours = to_rgb(image)
    if box is not None and decoding.margin is not None:
        colours = colours.crop(crop_edges(box, decoding.margin, *colours.size))
    height, width = decoding.image_size
    resized = colours.convert("L" if decoding.grey else "RGB").resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized).reshape(decoding.shape)


def open_image(data: bytes) -> Image.Image:
    """The picture in a file, its pixels not decoded yet.

    Raises:
      ValueError: it is empty, no picture, a decompression bomb, or PostScript: a program, which Pillow would have
        Ghostscript run, for as long as it likes.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        raise ValueError("not a picture in any format that Pillow reads") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which may be a decompression bomb"
        ) from None
    if image.format == "EPS":
        raise ValueError("PostScript is a program, not a picture")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB. Transparent parts show white; of 16 bits the upper 8 are kept.

    Raises:
      ValueError: the pixels have no range that 8 bits could stand for (32-bit and floating-point pictures).
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels from {values.min()} to {values.max()}: expected 8 or 16 bits per channel")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels: expected 8 or 16 bits per channel")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def crop_edges(box: Box, margin: int, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels from 0, right and bottom exclusive, of a box widened by a margin.

    Raises:
      BoxOutside: the box reaches out of the width x height picture, or is empty.
    """
    x1, y1, x2, y2 = box[:4]
    if box.relative:
        x1, x2 = max(1, round(x1 * width)), round(x2 * width)
        y1, y2 = max(1, round(y1 * height)), round(y2 * height)
    if not (1 <= x1 <= x2 <= width and 1 <= y1 <= y2 <= height):
        raise BoxOutside(f"box x {x1} to {x2}, y {y1} to {y2} in a picture of {width}x{height}")
    return (
        max(0, int(x1) - 1 - margin),
        max(0, int(y1) - 1 - margin),
        min(width, int(x2) + margin),
        min(height, int(y2) + margin),
    )


class LazyPictures:
    """Stands for an array (N, H, W, C) uint8: has its shape, dtype and length, and is indexed along N like it.

    Every access reads and decodes anew. May be read by several threads at once, and pickled for another process.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self, pictures: Sequence[Picture], places: np.ndarray, sums: np.ndarray, decoding: Decoding, directory: Path
    ) -> None:
        """
        Args:
          pictures: of a split, in the order of the folder.
          places: (N,) whole numbers, which of them these are: all but those that could not be read when checked.
          sums: (N, 2, C), `picture_sums` of each of the N.
          decoding: what becomes of a picture.
          directory: what messages call the folder.
        """
        self.pictures, self.places, self.sums = pictures, places, sums
        self.decoding, self.directory = decoding, directory

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
        return LazyPictures(self.pictures, self.places[indices], self.sums[indices], self.decoding, self.directory)

    def channel_sums(self) -> tuple[list[int], list[int]]:
        """Of every channel the sum of all N·H·W pixels and the sum of their squares; nothing is decoded."""
        first, second = self.sums.sum(0, dtype=object).tolist()  # Python's whole numbers, which have no end
        return first, second


def picture_sums(picture: np.ndarray) -> np.ndarray:
    """Of every channel of a picture (H, W, C) uint8 the sum and the sum of squares: (2, C) int64."""
    pixels = picture.reshape(-1, picture.shape[-1]).astype(np.int64)
    return np.stack([pixels.sum(0), (pixels * pixels).sum(0)])
