"""Random augmentation and normalization of training pictures, traced into the jitted step."""

from __future__ import annotations

from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

AnyArray = TypeVar("AnyArray", np.ndarray, Array)


Place = Literal["shift", "crop"]
SHIFT_SHARE = 0.1  # the largest shift, as a share of height and width
BRIGHTNESS, CONTRAST = 0.1, 0.2


def to_unit_range(images: AnyArray, dtype: DTypeLike = np.float32) -> AnyArray:
    """uint8 (N, H, W, C) -> floats in [0, 1], for NumPy or JAX arrays."""
    return images.astype(dtype) / 255


def normalize(images: AnyArray, mean: np.ndarray, std: np.ndarray) -> AnyArray:
    """(images - mean) / std for NumPy or JAX images (N, H, W, C); mean and std (C,) are in the units of the pixels."""
    return (images - np.asarray(mean, images.dtype)) / np.asarray(std, images.dtype)


def augment(place: Place, key: Array, images: Array) -> Array:
    """Changes each picture of a batch at random.

    A picture is mirrored with probability 1/2. It then becomes
    mean + (picture - mean) · uniform(0.8, 1.2) + uniform(-0.1, 0.1).

    Args:
      place: "shift" moves each picture by up to a tenth of its height and width and repeats its edge pixels; "crop"
        resizes a box to the full size: 35% to 100% of the picture's area, 3/4 to 4/3 of its aspect ratio.
      key: a JAX random key, split into one key for each picture.
      images: (N, H, W, C) float in [0, 1].

    Returns:
      images of the same shape; brightness and contrast may leave [0, 1].
    """
    move = {"shift": _shift, "crop": _resized_crop}[place]

    def augment_one(key: Array, image: Array) -> Array:
        flip_key, place_key, contrast_key, brightness_key = jax.random.split(key, 4)
        image = move(place_key, jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image))
        factor = 1 + CONTRAST * jax.random.uniform(contrast_key, minval=-1.0)
        image = image.mean() + (image - image.mean()) * factor
        return image + BRIGHTNESS * jax.random.uniform(brightness_key, minval=-1.0)

    return jax.vmap(augment_one)(jax.random.split(key, images.shape[0]), images)


def _shift(key: Array, image: Array) -> Array:
    height, width, channels = image.shape
    reach = jnp.array([round(height * SHIFT_SHARE), round(width * SHIFT_SHARE), 0])
    pad = [(round(height * SHIFT_SHARE),) * 2, (round(width * SHIFT_SHARE),) * 2, (0, 0)]
    start = jax.random.randint(key, (3,), 0, 2 * reach + 1)
    return jax.lax.dynamic_slice(jnp.pad(image, pad, mode="edge"), start, (height, width, channels))


def _resized_crop(key: Array, image: Array) -> Array:
    """A random box resized to the picture's size (Szegedy et al. 2014, arXiv:1409.4842; here >= 35% of the area)."""
    height, width, _ = image.shape
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    side = jnp.sqrt(jax.random.uniform(area_key, minval=0.35, maxval=1.0))
    ratio = jnp.exp(jax.random.uniform(ratio_key, minval=-1.0) * jnp.log(4 / 3) / 2)
    share = jnp.minimum(jnp.stack([side / ratio, side * ratio]), 1.0)
    scale = 1 / share
    size = jnp.array([height, width])
    start = jax.random.uniform(place_key, (2,)) * (1 - share) * size
    return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, -start * scale, "linear", antialias=True)
