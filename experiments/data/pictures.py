"""Decodes picture files to uint8 arrays of one size, singly or many in parallel."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.data.rgb import depth_of, has_sixteen_bits, is_turned, open_image, refuse_few_bits, to_rgb
from experiments.machine import cores

MAX_FILE_BYTES = 2**30


class Box(NamedTuple):
    """Corners of a box as the devkit writes them: pixels counted from 1, both corners inside the box.

    With relative=True, x is divided by the width of the picture and y by its height, as in TFDS.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    relative: bool = False


class Picture(NamedTuple):
    """A picture that is not decoded yet.

    name: for messages; the path below the folder, or the position in a file of many pictures.
    data: the file's path, or its bytes.
    """

    name: str
    label: int
    box: Box | None
    data: Path | bytes


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How pictures are decoded.

    image_size: (height, width) in pixels; the aspect ratio is not kept.
    grey: one channel instead of three.
    margin: pixels by which a box is widened on every side, within the picture; None takes whole pictures.
    white: (kind, value of white) for kinds of pixels with more than 8 bits, from the whole data set (`white_of`); for
      other kinds, each picture determines its own.
    """

    image_size: tuple[int, int]
    grey: bool
    margin: int | None
    white: tuple[tuple[str, int], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.image_size, 1 if self.grey else 3)


class Decoded(NamedTuple):
    """A picture's (H, W, C) uint8 array, and facts for the user.

    clipped: the box reached a pixel beyond the picture.
    turned: EXIF says that the picture must be turned. It is not turned, since boxes refer to the pixels as stored.
    kind, highest: the kind of pixels with more than 8 bits, and their highest value; otherwise None.
    """

    pixels: np.ndarray
    clipped: bool
    turned: bool
    kind: str | None
    highest: float | None


class Failure(NamedTuple):
    """Why a picture cannot be used. kind: "file" (the file exists but cannot be read now), "picture" or "box"."""

    name: str
    kind: str
    reason: str


class BoxOutside(Exception):
    """A box is empty, or reaches more than a pixel beyond its picture."""


def printable(name: str) -> str:
    """A file's name for messages and files, on one line and encodable as UTF-8.

    Line breaks, terminal commands and bytes that are not UTF-8 become escapes such as "\\n".
    """
    return "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else ascii(letter)[1:-1]
        for letter in name
    )


def decode_many(pictures: Iterable[Picture], decoding: Decoding) -> Iterator[tuple[Picture, Decoded | Failure]]:
    """Yields each picture with its result, in the given order; only a few are in memory at a time.

    Uses one thread per core, since Pillow releases the GIL.
    """
    waiting: collections.deque[tuple[Picture, Future]] = collections.deque()
    pool = ThreadPoolExecutor(cores(), thread_name_prefix="decode")
    pictures = iter(pictures)
    try:
        while True:
            for picture in itertools.islice(pictures, 8 * cores() - len(waiting)):
                waiting.append((picture, pool.submit(try_to_decode, picture, decoding)))
            if not waiting:
                return
            picture, decoded = waiting.popleft()
            yield picture, decoded.result()
    finally:
        pool.shutdown(cancel_futures=True)


def decode_or_explain(picture: Picture, decoding: Decoding) -> np.ndarray | Failure:
    """The picture's pixels (H, W, C), or why it cannot be decoded; never raises."""
    result = try_to_decode(picture, decoding)
    return result if isinstance(result, Failure) else result.pixels


def try_to_decode(picture: Picture, decoding: Decoding) -> Decoded | Failure:
    """The decoded picture, or why it cannot be decoded; never raises."""
    try:
        data = picture.data if isinstance(picture.data, bytes) else read_file(picture.data)
    except (OSError, ValueError) as error:
        may_pass = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        return Failure(picture.name, "file" if may_pass else "picture", reason_of(error))
    try:
        return decode(data, picture.box, decoding)
    except Exception as error:  # Pillow raises almost any type for a broken file: OSError, SyntaxError, IndexError, …
        return Failure(picture.name, "box" if isinstance(error, BoxOutside) else "picture", reason_of(error))


def reason_of(error: Exception) -> str:
    """The text of an error for a message, without error number, file name and full stop."""
    return getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__


def read_file(path: Path) -> bytes:
    """The bytes of a file; raises a ValueError for pipes and devices, which may never end, and above MAX_FILE_BYTES."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("a pipe or device, not a file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"{status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
    return path.read_bytes()


def decode(data: bytes, box: Box | None, decoding: Decoding) -> Decoded:
    """Decodes a file in any format that Pillow reads, converts it to RGB or grey, cuts out its box, and resizes it.

    Uses the first of several frames and a Lanczos filter. The box is ignored if decoding.margin is None.

    Raises:
      BoxOutside: the box does not lie inside the picture.
      Exception: the picture cannot be decoded.
    """
    with open_image(data) as image:
        sixteen = has_sixteen_bits(image)
        image.load()
        turned = is_turned(image)
        kind, highest = depth_of(image, sixteen)
        white = dict(decoding.white).get(kind)
        refuse_few_bits(kind, white)
        colours = to_rgb(image, white)
    clipped = False
    if box is not None and decoding.margin is not None:
        edges, clipped = edges_of(box, decoding.margin, *colours.size)
        colours = colours.crop(edges)
    height, width = decoding.image_size
    resized = colours.convert("L" if decoding.grey else "RGB").resize((width, height), Image.Resampling.LANCZOS)
    return Decoded(np.asarray(resized).reshape(decoding.shape), clipped, turned, kind, highest)


def edges_of(box: Box, margin: int, width: int, height: int) -> tuple[tuple[int, int, int, int], bool]:
    """The part to cut out of a picture of width x height: its box, widened by `margin` within the picture.

    Returns:
      (left, top, right, bottom) in pixels from 0, right and bottom exclusive; whether the box reached a pixel beyond
      the picture.

    Raises:
      BoxOutside: the box is empty, or reaches more than a pixel beyond the picture.
    """
    x1, y1, x2, y2 = box[:4]
    if box.relative:
        x1, y1 = max(1, round(x1 * width)), max(1, round(y1 * height))
        x2, y2 = round(x2 * width), round(y2 * height)
    inside = max(1, x1), max(1, y1), min(width, x2), min(height, y2)
    off = max(abs(corner - edge) for corner, edge in zip((x1, y1, x2, y2), inside, strict=True))
    left, top, right, bottom = map(int, inside)
    if off > 1 or left > right or top > bottom:
        raise BoxOutside(f"box x {x1} to {x2}, y {y1} to {y2} in a picture of {width}x{height}")
    left, top, right, bottom = left - 1 - margin, top - 1 - margin, right + margin, bottom + margin
    return (max(0, left), max(0, top), min(width, right), min(height, bottom)), off > 0
