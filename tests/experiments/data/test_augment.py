"""Augmentation: keyed, jitted, and each change what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.augment import Augmentation, augment, normalize, to_unit_range

NOTHING = dict(flip=False, place="none", brightness=0.0, contrast=0.0)


def pictures(n=64, size=(16, 20)):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(0.2, 0.8, (n, *size, 2)), jnp.float32)


def run(images, seed=0, **changes):
    augmentation = Augmentation(**(NOTHING | changes))
    return jax.jit(functools.partial(augment, augmentation))(jax.random.key(seed), images)


def test_nothing_asked_nothing_changed():
    np.testing.assert_array_equal(run(pictures()), pictures())


def test_the_key_decides():
    everything = dict(flip=True, place="shift", brightness=0.1, contrast=0.2)
    np.testing.assert_array_equal(run(pictures(), 1, **everything), run(pictures(), 1, **everything))
    assert not np.array_equal(run(pictures(), 1, **everything), run(pictures(), 2, **everything))


def test_flips_half_of_the_pictures():
    images, flipped = pictures(), run(pictures(), flip=True)
    mirrored = np.all(flipped == images[:, :, ::-1], axis=(1, 2, 3))
    same = np.all(flipped == images, axis=(1, 2, 3))
    assert np.all(mirrored ^ same)
    assert 16 < mirrored.sum() < 48  # 64 fair coins: outside of that once in 30,000


def test_shifts_by_whole_pixels_up_to_the_share():
    """16x20 with a tenth: up to 2 rows and 2 columns, with the edge repeated; all 25 places occur in 500 draws."""
    image = pictures(1)
    shifted = np.asarray(run(jnp.repeat(image, 500, 0), place="shift"))
    padded = np.pad(np.asarray(image[0]), ((2, 2), (2, 2), (0, 0)), mode="edge")
    places = {(i, j): padded[i : i + 16, j : j + 20] for i in range(5) for j in range(5)}
    found = [next((place for place, crop in places.items() if np.array_equal(crop, one)), None) for one in shifted]
    assert None not in found
    assert len(set(found)) == 25


def test_crops_show_a_part_of_the_picture():
    """A ramp stays a ramp: each crop's values run between two points at least sqrt(0.35 · 3/4) of the ramp apart."""
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 64)[None, None, :, None], (200, 64, 64, 1))
    cropped = np.asarray(run(ramp, place="crop"))[:, 32, :, 0]
    assert np.all(np.diff(cropped, axis=1) > -1e-5)
    spans = cropped[:, -1] - cropped[:, 0]
    assert spans.min() > np.sqrt(0.35 * 3 / 4) - 0.03
    assert spans.max() <= 1
    assert np.std(spans) > 0.05
    assert np.std(cropped[:, 0]) > 0.05


def test_full_crop_is_the_picture():
    """If the box happens to be everything (a constant picture shows it), values survive."""
    np.testing.assert_allclose(run(jnp.full((8, 16, 16, 1), 0.3), place="crop"), 0.3, rtol=1e-5)


def test_brightness_adds_and_contrast_scales_about_the_mean():
    images = pictures()
    added = np.asarray(run(images, brightness=0.1) - images)
    assert np.ptp(added, axis=(1, 2, 3)).max() < 1e-6
    assert 0.08 < np.abs(added).max() <= 0.1 + 1e-6
    scaled = np.asarray(run(images, contrast=0.2))
    np.testing.assert_allclose(scaled.mean((1, 2, 3)), images.mean((1, 2, 3)), rtol=1e-5)
    factors = scaled.std((1, 2, 3)) / np.asarray(images).std((1, 2, 3))
    assert 0.8 - 1e-5 <= factors.min() < 0.85
    assert 1.15 < factors.max() <= 1.2 + 1e-5


def test_normalized_by_channel():
    images = jnp.asarray([[[[0, 255]]]], jnp.uint8)
    mean, std = np.array([0.5, 0.25]), np.array([0.5, 0.25])
    np.testing.assert_allclose(normalize(to_unit_range(images), mean, std), [[[[-1, 3]]]])
    assert to_unit_range(images).dtype == jnp.float32


def test_a_misspelt_place_is_refused():
    with pytest.raises(ValueError, match="place must be"):
        Augmentation(place="shfit")
