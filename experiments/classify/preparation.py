"""How a picture is prepared for a network: its middle is cut out, or it is stretched as in a run's training."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

import numpy as np
from PIL import Image

from experiments.cli import MAX_SIZE
from experiments.data import pictures
from experiments.data.rgb import depth_of, has_sixteen_bits, open_image, refuse_few_bits, to_rgb
from experiments.from_table import from_table
from jax_resnet import resnet

# {timm's name of a filter: its number in Pillow and Hugging Face}.
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
CROP = 224  # torchvision's, for ImageNet
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Middle:
    """Resizes a picture, then cuts out its middle, as torchvision does for ImageNet or as a hub's settings say.

    shorter: the new length of the shorter side, (pixels,), or of both sides, (height, width).
    crop: height and width of the network's input.
    resample: Pillow's number of the filter, which is antialiased.
    mean, std: of pixels in [0, 1], in the order of the channels.
    bgr: whether blue is the first channel.
    """

    shorter: tuple[int, ...]
    crop: tuple[int, int] = (CROP, CROP)
    resample: int = FILTERS["bilinear"]
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    bgr: bool = False

    @property
    def text(self) -> str:
        name = next(name for name, number in FILTERS.items() if number == self.resample)
        size = "x".join(map(str, self.shorter))
        resized = f"shorter side resized to {size}" if len(self.shorter) == 1 else f"stretched to {size}"
        used = "" if name == "bilinear" else f" ({name})"
        return f"{resized}{used}, middle {self.crop[0]}x{self.crop[1]}{', blue first' if self.bgr else ''}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.crop, 3)

    def decode(self, data: bytes) -> np.ndarray:
        """Decodes a picture like torchvision's pil_loader and ImageClassification(crop_size, resize_size).

        As in torchvision, transparency is dropped and EXIF orientation is ignored. Unlike in torchvision, pictures of
        16 bits keep their upper 8 bits: torchvision clips them at 255, so that they become white.

        Args:
          data: the bytes of a file in any format that Pillow reads; the first of several frames is used.

        Returns:
          (*crop, 3) uint8.

        Raises:
          Exception: the picture cannot be decoded, or is too elongated to be resized.
        """
        with open_image(data) as image:
            sixteen = has_sixteen_bits(image)
            image.load()
            refuse_few_bits(*depth_of(image, sixteen))
            colours = to_rgb(image) if image.mode.startswith(("I", "F")) else image.convert("RGB")
        if len(self.shorter) == 2:
            height, width = self.shorter
        else:
            short, long = sorted(colours.size)
            sides = self.shorter[0], int(self.shorter[0] * long / short)
            width, height = sides if colours.width <= colours.height else sides[::-1]
        if width * height > Image.MAX_IMAGE_PIXELS:
            size = "{}x{}".format(*colours.size)
            raise ValueError(f"{size} pixels are too elongated: resizing would give {width * height:,} pixels")
        (high, wide), resized = self.crop, colours.resize((width, height), Image.Resampling(self.resample))
        left, top = round((width - wide) / 2), round((height - high) / 2)  # rounds half to even, as torchvision does
        pixels = np.asarray(resized.crop((left, top, left + wide, top + high)))
        return pixels[..., ::-1] if self.bgr else pixels


@dataclasses.dataclass(frozen=True)
class Stretched:
    """Stretches a picture to one size, as a run of experiments.cars or mnist does.

    image_size: (height, width) of the network's input.
    mean, std: of pixels in [0, 1], by channel.
    pad: width in pixels of the background on each side, inside image_size.
    cut: whether the run cut its pictures to their boxes first.
    white: {kind of pixels with more than 8 bits: the value of white in the run's pictures}.
    """

    image_size: tuple[int, int]
    grey: bool
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    pad: int = 0
    cut: bool = False
    white: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def inner(self) -> tuple[int, int]:
        return self.image_size[0] - 2 * self.pad, self.image_size[1] - 2 * self.pad

    @property
    def text(self) -> str:
        text = f"stretched to {self.inner[0]}x{self.inner[1]}{', grey' if self.grey else ''}"
        if self.pad:
            text += f", with {self.pad} pixels of background around it"
        if self.cut:
            text += " (the run cut its pictures to boxes before: cut yours to the car)"
        return text

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.image_size, 1 if self.grey else 3)

    def decode(self, data: bytes) -> np.ndarray:
        """(H, W, C) uint8; raises an exception of any type if the picture cannot be decoded."""
        decoding = pictures.Decoding(self.inner, self.grey, margin=None, white=tuple((self.white or {}).items()))
        around = (self.pad, self.pad)
        decoded = pictures.decode(data, None, decoding)
        if decoded.kind not in (self.white or {}):
            refuse_few_bits(decoded.kind, decoded.highest)
        return np.pad(decoded.pixels, (around, around, (0, 0)))


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What the metadata of a run say about its network and pictures."""

    arch: str
    class_names: list[str]
    image_size: list[int]
    grey: bool
    mean: list[float]
    std: list[float]
    pad: int = 0
    margin: int | None = None
    white: dict[str, int] = dataclasses.field(default_factory=dict)


def as_trained(facts: Mapping[str, str], arch: str, config: resnet.ResNetConfig) -> tuple[tuple[str, ...], Stretched]:
    """The names of the classes and the preparation of pictures, from the metadata of a run.

    Raises:
      TypeError, ValueError, RecursionError: a value is missing, not JSON, or does not fit this network.
    """
    names = [field.name for field in dataclasses.fields(RunFacts) if field.name in facts]
    run = from_table(RunFacts, {name: json.loads(facts[name]) for name in names}, "it")
    height, width = run.image_size
    if not all(resnet.MIN_SIZE <= side <= MAX_SIZE for side in run.image_size):
        raise ValueError(f"'image_size' is {height} x {width}, expected {resnet.MIN_SIZE} to {MAX_SIZE} pixels each")
    if not 0 <= 2 * run.pad < min(height, width):
        raise ValueError(f"'pad' is {run.pad}, expected a number of pixels, less than half of {height} x {width}")
    if not all(map(math.isfinite, (*run.mean, *run.std))) or not min(run.std) > 0:
        raise ValueError(f"'mean' and 'std' are {run.mean} and {run.std}, expected finite numbers, 'std' above 0")
    of_metadata = (run.arch, len(run.class_names), len(run.mean), len(run.std), 1 if run.grey else 3)
    of_weights = (arch, config.num_classes, config.in_channels, config.in_channels, config.in_channels)
    if of_metadata != of_weights:
        raise ValueError(
            f"network and numbers of classes, means, deviations and channels are {of_metadata} in the metadata and "
            f"{of_weights} in the weights"
        )
    if not all(value > 0 for value in run.white.values()):
        raise ValueError(f"'white' is {run.white}, expected values above 0")
    cut = run.margin is not None
    mean, std = tuple(run.mean), tuple(run.std)
    return tuple(run.class_names), Stretched((height, width), run.grey, mean, std, run.pad, cut, run.white)
