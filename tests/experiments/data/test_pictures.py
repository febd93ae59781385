"""One picture at a time: what Pillow may return, boxes, and files that are no pictures."""

import dataclasses

import numpy as np
import pytest
from picture_folders import encoded, png_file
from PIL import Image

from experiments.data.pictures import (
    Box,
    BoxOutside,
    Decoding,
    Failure,
    Picture,
    decode,
    decode_many,
    decode_or_explain,
    edges_of,
)
from experiments.data.rgb import COLOURS

WHOLE, GREY = (Decoding((4, 6), grey=grey, margin=None) for grey in (False, True))
RED = (200, 40, 30)


def sixteen_bits(value):
    return Image.fromarray(np.full((8, 12), value, np.uint16))


def palette(transparent):
    image = Image.new("P", (12, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    return encoded(image, transparency=1) if transparent else encoded(image)


KINDS = {
    "RGB PNG": (encoded(Image.new("RGB", (12, 8), RED)), RED),
    "RGB JPEG": (encoded(Image.new("RGB", (12, 8), RED), "JPEG", quality=95), RED),
    "grey PNG": (encoded(Image.new("L", (12, 8), 77)), (77, 77, 77)),
    "black and white PNG": (encoded(Image.new("1", (12, 8), 1)), (255, 255, 255)),
    # Cyan 0, magenta 200, yellow 200, black 0 is a red; read inverted it would be a cyan.
    "CMYK JPEG": (encoded(Image.new("CMYK", (12, 8), (0, 200, 200, 0)), "JPEG", quality=95), (255, 55, 55)),
    "palette PNG": (palette(transparent=False), RED),
    "palette PNG, transparent": (palette(transparent=True), (255, 255, 255)),
    "RGBA PNG, transparent": (encoded(Image.new("RGBA", (12, 8), (*RED, 0))), (255, 255, 255)),
    "RGBA PNG, opaque": (encoded(Image.new("RGBA", (12, 8), (*RED, 255))), RED),
    "grey PNG with half alpha": (encoded(Image.new("LA", (12, 8), (0, 128))), (127, 127, 127)),
    "16-bit PNG": (encoded(sixteen_bits(77 * 256 + 200)), (77, 77, 77)),
    "12 bits in a 16-bit PNG": (encoded(sixteen_bits(77 * 16 + 15)), (77, 77, 77)),
    "8 bits in 32": (encoded(Image.new("I", (12, 8), 77), "TIFF"), (77, 77, 77)),
    "20 bits in 32": (encoded(Image.new("I", (12, 8), 1_000_000), "TIFF"), (244, 244, 244)),
    "floating point up to 1": (encoded(Image.new("F", (12, 8), 0.5), "TIFF"), (128, 128, 128)),
    "floating point up to 255": (encoded(Image.new("F", (12, 8), 77.2), "TIFF"), (77, 77, 77)),
    "floating point a trace above 255": (encoded(Image.fromarray(np.float32([[256.5, 254]])), "TIFF"), (255, 255, 255)),
    "a mask in 16 bits": (encoded(sixteen_bits(1)), (255, 255, 255)),
    "4 bits in 32": (encoded(Image.new("I", (12, 8), 10), "TIFF"), (170, 170, 170)),
    "16 bits of which 0 is white": (encoded(sixteen_bits(77 * 256), "TIFF", tiffinfo={262: 0}), (178, 178, 178)),
    "GIF": (encoded(Image.new("RGB", (12, 8), (255, 0, 0)), "GIF"), (255, 0, 0)),
}


@pytest.mark.parametrize(("data", "expected"), KINDS.values(), ids=KINDS)
def test_every_kind_of_picture_gives_its_colours_and_their_luminance(data, expected):
    """Two levels of 255 leave room for JPEG and for CMYK's rounding. Grey has ITU-R 601's weights."""
    for decoding, colour in ((WHOLE, expected), (GREY, [np.dot(expected, (0.299, 0.587, 0.114))])):
        pixels = decode(data, None, decoding).pixels
        assert pixels.shape == decoding.shape
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(colour, decoding.shape), atol=2)


def test_a_note_of_the_cameras_orientation_is_left_alone():
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, :6] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    data = encoded(Image.fromarray(pixels), exif=exif)
    decoded = decode(data, None, Decoding((8, 12), grey=False, margin=None)).pixels
    np.testing.assert_array_equal(decoded, pixels)


def test_the_aspect_ratio_is_not_kept():
    """A picture that is half black, half white stays so at another size: nothing is cut or padded."""
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    decoded = decode(encoded(Image.fromarray(pixels)), None, Decoding((20, 8), grey=True, margin=None)).pixels
    assert decoded.shape == (20, 8, 1)
    np.testing.assert_array_equal(decoded[:, 0], 0)
    np.testing.assert_array_equal(decoded[:, 7], 255)
    assert decoded[:, :4].max() < 40  # Lanczos's filter overshoots a little near the edge
    assert decoded[:, 4:].min() > 215


def test_fine_patterns_become_their_mean():
    """A resize that picks pixels instead of averaging them would give black or white."""
    checkerboard = np.indices((60, 60)).sum(0) % 2 * np.uint8(255)
    data = encoded(Image.fromarray(checkerboard.astype(np.uint8)))
    decoded = decode(data, None, Decoding((6, 6), grey=True, margin=None)).pixels
    np.testing.assert_allclose(decoded.astype(int), 127.5, atol=3)


EDGES = {
    "the whole picture": (Box(1, 1, 40, 30), 0, (0, 0, 40, 30)),
    "a single pixel": (Box(7, 5, 7, 5), 0, (6, 4, 7, 5)),
    "inside": (Box(5, 3, 24, 22), 0, (4, 2, 24, 22)),
    "widened": (Box(5, 3, 24, 22), 2, (2, 0, 26, 24)),
    "widened past all borders": (Box(5, 3, 24, 22), 16, (0, 0, 40, 30)),
    "a pixel outside on every side": (Box(0, 0, 41, 31), 0, (0, 0, 40, 30)),
    "relative, as TFDS divides it": (Box(*np.float32([5 / 40, 3 / 30, 24 / 40, 22 / 30]), True), 2, (2, 0, 26, 24)),
}


@pytest.mark.parametrize("case", EDGES)
def test_crop_edges(case):
    box, margin, expected = EDGES[case]
    assert edges_of(box, margin, 40, 30) == (expected, "outside" in case)


@pytest.mark.parametrize(
    "box",
    [
        Box(5, 3, 42, 22),
        Box(5, 3, 24, 32),
        Box(-1, 3, 24, 22),
        Box(5, -1, 24, 22),
        Box(41, 3, 41, 22),
        Box(24, 3, 5, 22),
        Box(5, 22, 24, 3),
        Box(0.1, 0.1, 1.1, 0.9, True),
    ],
)
def test_a_box_outside_its_picture_is_refused(box):
    with pytest.raises(BoxOutside, match="in a picture of 40x30"):
        edges_of(box, 0, 40, 30)


def test_a_picture_is_cut_before_it_is_resized():
    """Nothing of the surroundings may bleed in at the edges."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[2:22, 4:24] = 255
    decoded = decode(encoded(Image.fromarray(pixels)), Box(5, 3, 24, 22), Decoding((7, 9), grey=False, margin=0)).pixels
    np.testing.assert_array_equal(decoded, 255)


def colours_of(bits):
    """A PNG of 16 bits for each colour; all pixels have the highest value of `bits` bits."""
    return png_file(8, b"\x10\2\0\0\0", (b"\0" + (2**bits - 1).to_bytes(2, "big") * 3 * 8) * 8)


def test_16_bit_colours_of_fewer_bits_are_refused_where_the_set_has_no_others():
    """Pillow keeps the upper 8 bits: pictures would be nearly black without a warning."""
    first = decode(colours_of(12), None, WHOLE)
    assert (first.kind, first.highest) == (COLOURS, 4095)
    failure = decode_or_explain(
        Picture("1.png", 0, None, colours_of(12)), dataclasses.replace(WHOLE, white=((COLOURS, 4095),))
    )
    assert failure.reason.startswith("colours of 16 bits of which only 12 are used")
    bright = decode(colours_of(16), None, dataclasses.replace(WHOLE, white=((COLOURS, 65535),))).pixels
    np.testing.assert_array_equal(bright, 255)


def floats(*values):
    return encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")


# docs/bad-input.md has more files that are no pictures.
BAD = {
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
    "a drawing": (b'<?xml version="1.0"?>\n<svg xmlns="http', "SVG, a drawing"),
    "a page": (b"\n<!DOCTYPE html>", "a web page, not a picture in any format that Pillow reads"),
    "not a number": (floats(0.5, np.nan), "pixels from nan to nan"),
    "below 0": (floats(-0.5, 1), "pixels from -0.5 to 1: expected 0 to 65535"),
    "numbers without a range": (floats(0.5, 1e9), "pixels from 0.5 to 1e+09"),
    "negative whole numbers": (encoded(Image.new("I", (8, 8), -3), "TIFF"), "pixels from -3 to -3"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_picture_is_explained(case):
    data, reason = BAD[case]
    failure = decode_or_explain(Picture("train/a/1.jpg", 0, None, data), WHOLE)
    assert isinstance(failure, Failure)
    assert (failure.name, failure.kind) == ("train/a/1.jpg", "picture")
    assert reason in failure.reason


def test_many_pictures_come_in_order_with_the_bad_ones_among_them():
    """Large and small pictures mix, so that the threads finish out of order."""
    sources = []
    for number in range(100):
        edge = 400 if number % 7 == 0 else 2
        data = b"" if number % 10 == 3 else encoded(Image.new("L", (edge, edge), number))
        sources.append(Picture(str(number), number, None, data))
    results = list(decode_many(iter(sources), Decoding((2, 2), grey=True, margin=None)))
    assert [picture.label for picture, _ in results] == list(range(100))
    for picture, result in results:
        if picture.label % 10 == 3:
            assert isinstance(result, Failure)
        else:
            np.testing.assert_array_equal(result.pixels, picture.label)


def test_only_a_few_pictures_are_read_ahead():
    """Bytes of a whole parquet file must not pile up in memory."""
    read = []

    def pictures():
        for number in range(10_000):
            read.append(number)
            yield Picture(str(number), 0, None, b"")

    results = decode_many(pictures(), WHOLE)
    next(results)
    assert len(read) < 5_000
    results.close()
