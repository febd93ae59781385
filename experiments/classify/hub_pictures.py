"""What settings beside weights of timm or Hugging Face say about pictures and classes; Keras' preparation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.classify.preparation import FILTERS, Middle
from experiments.cli import MAX_SIZE

# keras.applications takes blue as the first channel, and subtracts ImageNet's mean.
KERAS = Middle((256,), mean=tuple(value / 255 for value in (103.939, 116.779, 123.68)), std=(1 / 255,) * 3, bgr=True)


def preparation(settings: Mapping[str, Any]) -> Middle | None:
    """The preparation of pictures that a hub's settings define.

    Args:
      settings: config.json and preprocessor_config.json merged, with any content; {} if there are none.

    Returns:
      the preparation, or None if the settings do not mention pictures.

    Raises:
      ArithmeticError, AttributeError, KeyError, TypeError, ValueError: timm and Hugging Face write no such settings.
    """
    of_timm = settings.get("pretrained_cfg", settings)
    # Another program's config.json may have an input_size, too, as a number.
    if "input_size" in of_timm and (of_timm is not settings or isinstance(of_timm["input_size"], list)):
        told = _of_timm(of_timm)
    elif "image_mean" in settings:
        told = _of_hugging_face(settings)
    else:
        return None
    if not all(1 <= side <= MAX_SIZE for side in (*told.shorter, *told.crop)):
        raise ValueError(f"sizes {told.shorter} and {told.crop}")
    numbers = (*told.mean, *told.std)
    if not all(map(math.isfinite, numbers)) or min(told.std) <= 0 or len(told.mean) != len(told.std):
        raise ValueError(f"mean {told.mean} and deviation {told.std}")
    return told


def _of_timm(told: Mapping[str, Any]) -> Middle:
    """Does what timm's create_transform does for evaluation; the crop keeps the share crop_pct of the shorter side."""
    height, width = told["input_size"][1:]
    share, mode = float(told["crop_pct"]), told.get("crop_mode", "center")
    if mode == "squash":
        resize: tuple[int, ...] = (math.floor(height / share), math.floor(width / share))
    elif mode == "center" and height == width:
        resize = (math.floor(height / share),)
    else:
        raise ValueError(f"crop_mode {mode!r} for {height}x{width} is not supported")
    if (interpolation := told["interpolation"]) not in FILTERS:
        raise ValueError(f"interpolation {interpolation!r} is not supported")
    return Middle(resize, (height, width), FILTERS[interpolation], tuple(told["mean"]), tuple(told["std"]))


def _of_hugging_face(told: Mapping[str, Any]) -> Middle:
    """Does what Hugging Face's ConvNextImageProcessor (for ResNets) and ViTImageProcessor do."""
    size, crop = told["size"], told.get("crop_size")
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    cut = (int(crop["height"]), int(crop["width"])) if told.get("do_center_crop") and crop else None
    if "shortest_edge" not in size:
        resize: tuple[int, ...] = (int(size["height"]), int(size["width"]))
        cut = cut or resize
    elif cut:
        resize = (int(size["shortest_edge"]),)
    else:
        edge = int(size["shortest_edge"])
        cut = (edge, edge)
        resize = (int(edge / float(told.get("crop_pct", 224 / 256))),) if edge < 384 else cut
    resample = told.get("resample", FILTERS["bilinear"])
    if resample not in FILTERS.values():
        raise ValueError(f"resample {resample!r} is not supported")
    if not told.get("do_normalize", True):
        return Middle(resize, cut, resample, (0.0,) * 3, (1.0,) * 3)
    return Middle(resize, cut, resample, tuple(told["image_mean"]), tuple(told["image_std"]))


def class_names(settings: Mapping[str, Any], num_classes: int) -> Sequence[str] | None:
    """The names of the classes by number, or None if the settings do not name every class."""
    names = settings.get("id2label") or settings.get("label_names")
    if isinstance(names, Mapping):
        names = [names.get(str(number)) for number in range(num_classes)]
    if isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names):
        return names
    return None
