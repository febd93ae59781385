"""How a picture is prepared for a network: as torchvision does, as a hub's settings say, or as in a run's training."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.classify import hub_pictures, imagenet
from experiments.cli import MAX_SIZE
from experiments.data.pictures import Decoding
from experiments.data.pictures import decode as decode_as_trained
from experiments.training.run_folder import RUN_FACTS
from jax_resnet import resnet, weights


@dataclasses.dataclass(frozen=True)
class Preparation:
    """From a picture's file to a network's input.

    text: what is done, for people.
    decode: the bytes of a file -> (H, W, C) uint8; raises an exception of any type for what it cannot decode.
    shape: (H, W, C).
    mean, std: (C,), of pixels in [0, 1]; empty where the network normalizes.
    facts: what `decode` was made of, for JSON.
    """

    text: str
    decode: Callable[[bytes], np.ndarray]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: Mapping[str, Any]


def as_imagenet(resize: int) -> Preparation:
    text = f"shorter side resized to {resize}, middle {imagenet.CROP}x{imagenet.CROP}"
    decode = functools.partial(imagenet.decode, resize=(resize,))
    shape = (imagenet.CROP, imagenet.CROP, 3)
    return Preparation(text, decode, shape, imagenet.MEAN, imagenet.STD, {"resize": resize})


def as_the_hub_says(file: weights.WeightFile, resize: int | None) -> Preparation | None:
    """By the settings beside a file, or those of keras.applications; None where nothing tells them."""
    try:
        told = hub_pictures.preparation(file.settings, keras=file.naming == "Keras")
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the settings beside {file.path} do not say how pictures are prepared: {error!r}") from error
    if told is None:
        return None
    return as_told(**dataclasses.asdict(told) | ({} if resize is None else {"shorter": (resize,)}))


def as_told(**told: Any) -> Preparation:
    """By the fields of a `hub_pictures.Told`."""
    how = hub_pictures.Told(**told)
    decode = functools.partial(hub_pictures.decode, told=how)
    return Preparation(how.text, decode, (*how.crop, 3), how.mean, how.std, told)


def stretched(
    image_size: tuple[int, int],
    grey: bool,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    *,
    pad: int = 0,
    cut: bool = False,
    white: Mapping[str, int] | None = None,
) -> Preparation:
    """Pictures as a run of experiments.cars or mnist takes them.

    Args:
      image_size: (height, width) of the network's input.
      pad: so many of its pixels on each side are background.
      cut: the run cut its pictures to their boxes before.
      white: of pictures with more than 8 bits what was white in all pictures of the run, by kind.
    """
    height, width = image_size
    inner = height - 2 * pad, width - 2 * pad
    decoding = Decoding(inner, grey, margin=None, white=tuple((white or {}).items()))

    def decode(content: bytes) -> np.ndarray:
        return np.pad(decode_as_trained(content, box=None, decoding=decoding), ((pad, pad), (pad, pad), (0, 0)))

    text = f"stretched to {inner[0]}x{inner[1]}{', grey' if grey else ''}"
    if pad:
        text += f", with {pad} pixels of background around it"
    if cut:
        text += " (the run cut its pictures to boxes before: cut yours to the car)"
    facts = {"image_size": [height, width], "grey": grey, "pad": pad, "cut": cut, "white": white}
    return Preparation(text, decode, (height, width, 1 if grey else 3), tuple(mean), tuple(std), facts)


def as_trained(facts: Mapping[str, str], arch: str, config: resnet.ResNetConfig) -> tuple[tuple[str, ...], Preparation]:
    """The names of the classes and what is done to pictures, from the metadata of a run.

    Raises:
      TypeError, ValueError, RecursionError: if something is missing, no JSON, or not of this network.
    """
    if missing := [name for name in RUN_FACTS if name not in facts]:
        raise ValueError(f"{missing[0]!r} is missing")
    values = {name: json.loads(facts[name]) for name in RUN_FACTS}
    class_names, (height, width), grey = tuple(values["class_names"]), values["image_size"], values["grey"]
    if not all(isinstance(name, str) for name in class_names):
        raise ValueError("'class_names' are not all text")
    if not all(isinstance(side, int) and resnet.MIN_SIZE <= side <= MAX_SIZE for side in (height, width)):
        raise ValueError(f"'image_size' is {height} x {width}, expected {resnet.MIN_SIZE} to {MAX_SIZE} pixels each")
    pad = json.loads(facts.get("pad", "0"))
    if type(pad) is not int or not 0 <= 2 * pad < min(height, width):
        raise ValueError(f"'pad' is {pad}, expected a number of pixels, less than half of {height} x {width}")
    if not all(math.isfinite(number) for number in (*values["mean"], *values["std"])) or not min(values["std"]) > 0:
        raise ValueError(f"'mean' and 'std' are {values['mean']} and {values['std']}")
    of_metadata = (values["arch"], len(class_names), len(values["mean"]), len(values["std"]), 1 if grey else 3)
    of_weights = (arch, config.num_classes, config.in_channels, config.in_channels, config.in_channels)
    if of_metadata != of_weights:
        raise ValueError(
            f"network, number of classes, of means, of deviations and of channels are {of_metadata} there and "
            f"{of_weights} in the weights"
        )
    white = json.loads(facts.get("white", "{}"))
    if not isinstance(white, dict) or not all(type(value) is int and value > 0 for value in white.values()):
        raise ValueError(f"'white' is {white}, expected the value that is white by kind of pixel")
    cut = json.loads(facts.get("margin", "null")) is not None
    return class_names, stretched((height, width), grey, values["mean"], values["std"], pad=pad, cut=cut, white=white)
