"""Turns the bytes of a file into an 8-bit RGB picture: recognizes other files, scales pixels of more than 8 bits."""

from __future__ import annotations

import io
import math
import re
import warnings

import numpy as np
from PIL import ExifTags, Image

# Pillow refuses pictures above twice its limit, and would print a warning for each picture between once and twice it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

NUMBERS, FRACTIONS, COLOURS = "whole numbers", "floating-point numbers", "16-bit colours"  # kinds of deep pixels
OTHER_FILES = {  # the first bytes of files that are mistaken for pictures
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC, as iPhones save pictures, which Pillow does not read: convert it to JPEG",
    rb"....ftypavi": "AVIF, which this Pillow was built without: install a newer one, or convert it to PNG",
    rb"\xff\x0a|....JXL ": "JPEG XL, which Pillow does not read: convert it to PNG",
    rb"version https://git-lfs": "only a pointer of git-lfs: run git lfs pull",
    rb"\s*(<\?xml.{,999})?<svg": "SVG, a drawing without pixels: convert it to PNG",
    rb"\s*(<!doctype|<html)": "a web page, not a picture in any format that Pillow reads",
    rb"%PDF": "a PDF, not a picture",
    rb"PK\x03\x04": "a zip archive, not a picture",
}


def open_image(data: bytes) -> Image.Image:
    """Opens the picture in a file without decoding its pixels.

    Raises:
      ValueError: the file is empty, no picture, a decompression bomb, or PostScript (a program, which Pillow would have
        Ghostscript run without a time limit).
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        known = (what for pattern, what in OTHER_FILES.items() if re.match(pattern, data, re.I | re.S))
        raise ValueError(next(known, "not a picture in any format that Pillow reads")) from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which may be a decompression bomb"
        ) from None
    if image.format == "EPS":
        raise ValueError("PostScript is a program, not a picture")
    return image


def is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # damaged EXIF data; the pixels can still be used
        return False


def has_sixteen_bits(image: Image.Image) -> bool:
    """Whether the file of an opened picture (not loaded) has 16 bits a pixel or colour (of a colour Pillow keeps 8)."""
    return any(";16" in str(tile.args) for tile in image.tile)  # loading clears this list


def refuse_few_bits(kind: str | None, highest: float | None) -> None:
    """Raises a ValueError for colours of 16 bits that use fewer of them: their upper 8 bits are dark or black."""
    if kind == COLOURS and highest is not None and (white := white_of(kind, highest)) < 65535:
        used = white.bit_length()
        raise ValueError(f"colours of 16 bits of which only {used} are used: save them with 8 bits")


def depth_of(image: Image.Image, sixteen: bool = False) -> tuple[str | None, float | None]:
    """The kind of a loaded picture's pixels of more than 8 bits, and their highest value; otherwise (None, None).

    Args:
      image: the loaded picture.
      sixteen: see has_sixteen_bits.

    Raises:
      ValueError: a pixel is negative, infinite, too large or not a number.
    """
    if image.mode[0] in "IF":
        values = np.asarray(image)
        lowest, highest = values.min().item(), values.max().item()
        if not 0 <= lowest <= highest < (math.inf if image.mode[0] == "I" else 65536):
            raise ValueError(f"pixels from {lowest:g} to {highest:g}: expected 0 to 65535")
        return (FRACTIONS if image.mode == "F" else NUMBERS), highest
    if sixteen:  # Pillow keeps the upper 8 bits
        return COLOURS, max(high for _, high in image.convert("RGB").getextrema()) << 8 | 255
    return None, None


def white_of(kind: str, highest: float) -> int:
    """The white of pixels up to `highest`: the maximum of 1 (masks, fractions), 2, 4, 8, 10, 12, 14 or 16 bits.

    Fractions may exceed white by a tenth, or by half if white is 1, because filters overshoot at edges.
    """
    if kind == FRACTIONS:
        highest = highest / 1.1 if highest > 1.5 else 1
    whites = (2**bits - 1 for bits in (1, 2, 4, 8, 10, 12, 14, 16))
    return next((white for white in whites if highest <= white), 2 ** int(highest).bit_length() - 1)


def to_rgb(image: Image.Image, white: int | None = None) -> Image.Image:
    """Converts a loaded picture to 8-bit RGB; transparent parts become white, deep pixels keep the upper 8 bits in use.

    Args:
      image: the loaded picture.
      white: the value of white for pixels of more than 8 bits; None derives it from this picture.

    Raises:
      ValueError: see depth_of.
    """
    kind, highest = depth_of(image)
    if kind is not None:
        white = white or white_of(kind, highest)
        values = np.asarray(image)
        if kind == FRACTIONS:
            eight = np.rint(np.minimum(values, white) * (255 / white))
        else:
            eight = np.minimum(values, white)
            eight = eight * (255 // white) if white < 255 else eight >> (white.bit_length() - 8)
        if getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0:  # a TIFF whose 0 is white
            eight = 255 - eight
        return Image.fromarray(eight.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white_sheet = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white_sheet, opaque).convert("RGB")
    return image.convert("RGB")
