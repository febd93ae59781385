"""Random changes of training pictures and their normalization, traced into the jitted step."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

AnyArray = TypeVar("AnyArray", np.ndarray, Array)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is changed at random in training pictures.

    Attributes:
      flip: mirror left and right half of the time.
      place: "shift" moves the picture by up to shift_share of its height and width, its edge repeated; "crop" takes a
        box of 35% to 100% of the area and of aspect ratio 3/4 to 4/3 of the picture's, resized to the full size;
        "none" leaves it.
      shift_share: the largest shift, as a share of height and width.
      brightness, contrast: b and c: each picture becomes mean + (picture - mean) · uniform(1 - c, 1 + c), then gains
        uniform(-b, b), in units of the full range.
    """

    flip: bool = True
    place: Literal["shift", "crop", "none"] = "shift"
    shift_share: float = 0.1
    brightness: float = 0.1
    contrast: float = 0.2

    def __post_init__(self):
        if self.place not in ("shift", "crop", "none"):
            raise ValueError(f"place must be shift, crop or none, got {self.place!r}")


def to_unit_range(images: AnyArray, dtype: DTypeLike = np.float32) -> AnyArray:
    """uint8 (N, H, W, C) -> floats in [0, 1]; NumPy's arrays or JAX's."""
    return images.astype(dtype) / 255


def normalize(images: AnyArray, mean: np.ndarray, std: np.ndarray) -> AnyArray:
    """(images - mean) / std by channel: images (N, H, W, C) in [0, 1], NumPy's or JAX's; mean and std (C,) likewise."""
    return (images - np.asarray(mean, images.dtype)) / np.asarray(std, images.dtype)


def augment(augmentation: Augmentation, key: Array, images: Array) -> Array:
    """Changes each picture of a batch at random.

    Args:
      augmentation: what to change.
      key: a JAX random key; each picture draws from a key of its own.
      images: (N, H, W, C) float in [0, 1].

    Returns:
      images of the same shape; brightness and contrast may leave [0, 1].
    """
    return jax.vmap(lambda key, image: _augment_one(augmentation, key, image))(
        jax.random.split(key, images.shape[0]), images
    )


def _augment_one(augmentation: Augmentation, key: Array, image: Array) -> Array:
    flip_key, place_key, contrast_key, brightness_key = jax.random.split(key, 4)
    if augmentation.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    if augmentation.place == "shift":
        image = _shift(place_key, image, augmentation.shift_share)
    elif augmentation.place == "crop":
        image = _resized_crop(place_key, image)
    if augmentation.contrast:
        factor = 1 + augmentation.contrast * jax.random.uniform(contrast_key, minval=-1.0)
        image = image.mean() + (image - image.mean()) * factor
    if augmentation.brightness:
        image = image + augmentation.brightness * jax.random.uniform(brightness_key, minval=-1.0)
    return image


def _shift(key: Array, image: Array, share: float) -> Array:
    height, width, channels = image.shape
    reach = jnp.array([round(height * share), round(width * share), 0])
    pad = [(round(height * share),) * 2, (round(width * share),) * 2, (0, 0)]
    start = jax.random.randint(key, (3,), 0, 2 * reach + 1)
    return jax.lax.dynamic_slice(jnp.pad(image, pad, mode="edge"), start, (height, width, channels))


def _resized_crop(key: Array, image: Array) -> Array:
    """A random box resized to the picture's size (Szegedy et al. 2014, arXiv:1409.4842, with boxes from 35%)."""
    height, width, _ = image.shape
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    side = jnp.sqrt(jax.random.uniform(area_key, minval=0.35, maxval=1.0))
    ratio = jnp.exp(jax.random.uniform(ratio_key, minval=-1.0) * jnp.log(4 / 3) / 2)
    share = jnp.minimum(jnp.stack([side / ratio, side * ratio]), 1.0)
    scale = 1 / share
    size = jnp.array([height, width])
    start = jax.random.uniform(place_key, (2,)) * (1 - share) * size
    return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, -start * scale, "linear", antialias=True)
