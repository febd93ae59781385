"""How pictures are prepared for weights of a hub, by the settings beside them: timm's, Hugging Face's, Keras'."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from experiments.classify import imagenet
from experiments.cli import MAX_SIZE

# Pillow's numbers, which Hugging Face writes, by the names that timm writes.
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


@dataclasses.dataclass(frozen=True)
class Told:
    """What settings say.

    shorter: what the shorter side becomes, (pixels,), or (height, width) for both; then the middle is cut out.
    crop: height and width of the network's input.
    resample: Pillow's number of the filter.
    mean, std: of pixels in [0, 1], in the order of the channels.
    bgr: whether blue is the first channel.
    """

    shorter: tuple[int, ...]
    crop: tuple[int, int]
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    @property
    def text(self) -> str:
        filters = {number: name for name, number in FILTERS.items()}
        size = "x".join(map(str, self.shorter))
        resized = f"shorter side resized to {size}" if len(self.shorter) == 1 else f"stretched to {size}"
        order = ", blue first" if self.bgr else ""
        return f"{resized} ({filters[self.resample]}), middle {self.crop[0]}x{self.crop[1]}{order}"


def preparation(settings: Mapping[str, Any], *, keras: bool = False) -> Told | None:
    """Reads the settings, which may hold anything.

    Args:
      settings: config.json and preprocessor_config.json together, {} if there are none.
      keras: whether the weights have Keras' names: keras.applications takes blue first, less ImageNet's mean.

    Returns:
      what they say, None if they do not tell of pictures.

    Raises:
      KeyError, TypeError, ValueError, OverflowError: they are not what timm and Hugging Face write.
    """
    if "input_size" in (of_timm := settings.get("pretrained_cfg", settings)):
        told = _of_timm(of_timm)
    elif "image_mean" in settings:
        told = _of_hugging_face(settings)
    elif keras:
        mean = tuple(value / 255 for value in (103.939, 116.779, 123.68))
        return Told((imagenet.V1_RESIZE,), (imagenet.CROP,) * 2, FILTERS["bilinear"], mean, (1 / 255,) * 3, bgr=True)
    else:
        return None
    numbers = (*told.mean, *told.std)
    if not all(1 <= side <= MAX_SIZE for side in (*told.shorter, *told.crop)):
        raise ValueError(f"sizes {told.shorter} and {told.crop}")
    if not all(map(math.isfinite, numbers)) or min(told.std) <= 0 or len(told.mean) != len(told.std):
        raise ValueError(f"mean {told.mean} and deviation {told.std}")
    return told


def _of_timm(told: Mapping[str, Any]) -> Told:
    """timm's create_transform for evaluation: the share crop_pct of the shorter side is kept."""
    height, width = told["input_size"][1:]
    share, mode = float(told["crop_pct"]), told.get("crop_mode", "center")
    if mode == "squash":
        resize: tuple[int, ...] = (math.floor(height / share), math.floor(width / share))
    elif mode == "center" and height == width:
        resize = (math.floor(height / share),)
    else:
        raise ValueError(f"crop_mode {mode!r} for {height}x{width} is not supported")
    return Told(resize, (height, width), FILTERS[told["interpolation"]], tuple(told["mean"]), tuple(told["std"]))


def _of_hugging_face(told: Mapping[str, Any]) -> Told:
    """ConvNextImageProcessor, which Hugging Face has for ResNets, and ViT's kind."""
    size, crop = told["size"], told.get("crop_size")
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        if told.get("do_center_crop") and crop:
            resize, cut = (edge,), (int(crop["height"]), int(crop["width"]))
        elif edge < 384:
            resize, cut = (int(edge / float(told.get("crop_pct", 224 / 256))),), (edge, edge)
        else:
            resize, cut = (edge, edge), (edge, edge)
    else:
        resize = (int(size["height"]), int(size["width"]))
        cut = (int(crop["height"]), int(crop["width"])) if told.get("do_center_crop") and crop else resize
    resample = told.get("resample", FILTERS["bilinear"])
    if resample not in FILTERS.values():
        raise ValueError(f"resample {resample!r} is not supported")
    if not told.get("do_normalize", True):
        return Told(resize, cut, resample, (0.0,) * 3, (1.0,) * 3)
    return Told(resize, cut, resample, tuple(told["image_mean"]), tuple(told["image_std"]))


def class_names(settings: Mapping[str, Any], num_classes: int) -> Sequence[str] | None:
    """The names of the classes by number, if the settings have one for each."""
    names = settings.get("id2label") or settings.get("label_names")
    if isinstance(names, Mapping):
        names = [names.get(str(number)) for number in range(num_classes)]
    if isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names):
        return names
    return None


def decode(data: bytes, told: Told) -> np.ndarray:
    """A picture as the settings want it, (*crop, 3) uint8; raises as `imagenet.decode` does."""
    pixels = imagenet.decode(data, told.shorter, told.crop, Image.Resampling(told.resample))
    return pixels[..., ::-1] if told.bgr else pixels
