"""Augmentation is keyed and jitted; each change does what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import augment as module
from experiments.data.augment import augment, normalize, to_unit_range


def pictures(n=64, size=(16, 20)):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(0.2, 0.8, (n, *size, 2)), jnp.float32)


def run(place, images, seed=0):
    return np.asarray(jax.jit(functools.partial(augment, place))(jax.random.key(seed), images))


@pytest.fixture
def plain(monkeypatch):
    """Keeps brightness and contrast as they are."""
    monkeypatch.setattr(module, "BRIGHTNESS", 0.0)
    monkeypatch.setattr(module, "CONTRAST", 0.0)


@pytest.mark.parametrize("place", ["shift", "crop"])
def test_the_key_decides(place):
    first, again, other = (run(place, pictures(), seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_flips_half_of_the_pictures_and_shifts_all_by_whole_pixels(plain):
    """A tenth of 16x20 is up to 2 rows and 2 columns, and edges are repeated; 1,000 draws have all 50 results.

    1,000 fair coins fall outside of 430 to 570 once in 100,000."""
    image = pictures(1)
    shifted = run("shift", jnp.repeat(image, 1000, 0))
    one = np.asarray(image[0])
    padded = [np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="edge") for picture in (one, one[:, ::-1])]
    places = [both[i : i + 16, j : j + 20] for both in padded for i in range(5) for j in range(5)]
    distances = np.stack([np.abs(shifted - place).max((1, 2, 3)) for place in places])
    assert distances.min(0).max() < 1e-6
    found = distances.argmin(0)
    assert len(set(found.tolist())) == 50
    assert 430 < (found < 25).sum() < 570


def test_crops_show_a_part_of_the_picture(plain):
    """A ramp stays a ramp: each crop's values run between two points at least sqrt(0.35 · 3/4) of the ramp apart."""
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 64)[None, None, :, None], (200, 64, 64, 1))
    cropped = run("crop", ramp)[:, 32, :, 0]
    cropped = np.where(cropped[:, :1] > cropped[:, -1:], cropped[:, ::-1], cropped)  # those that were mirrored
    assert np.all(np.diff(cropped, axis=1) > -1e-5)
    spans = cropped[:, -1] - cropped[:, 0]
    assert spans.min() > np.sqrt(0.35 * 3 / 4) - 0.03
    assert spans.max() <= 1
    assert np.std(spans) > 0.05
    assert np.std(cropped[:, 0]) > 0.05
    np.testing.assert_allclose(run("crop", jnp.full((8, 16, 16, 1), 0.3)), 0.3, rtol=1e-5)


@pytest.mark.parametrize(("brightness", "contrast"), [(0.1, 0.0), (0.0, 0.2)])
def test_brightness_adds_and_contrast_scales_about_the_mean(brightness, contrast, monkeypatch):
    monkeypatch.setattr(module, "BRIGHTNESS", brightness)
    monkeypatch.setattr(module, "CONTRAST", contrast)
    monkeypatch.setattr(module, "SHIFT_SHARE", 0.0)
    images = np.asarray(pictures(200))
    changed = run("shift", jnp.asarray(images))
    gains, factors = changed.mean((1, 2, 3)) - images.mean((1, 2, 3)), changed.std((1, 2, 3)) / images.std((1, 2, 3))
    assert np.abs(gains).max() == pytest.approx(brightness, abs=1e-2 * (brightness > 0) + 1e-6)
    assert [factors.min(), factors.max()] == pytest.approx(
        [1 - contrast, 1 + contrast], abs=1e-2 * (contrast > 0) + 1e-5
    )


def test_normalized_by_channel():
    images = jnp.asarray([[[[0, 255]]]], jnp.uint8)
    mean, std = np.array([0.5, 0.25]), np.array([0.5, 0.25])
    np.testing.assert_allclose(normalize(to_unit_range(images), mean, std), [[[[-1, 3]]]])
    assert to_unit_range(images).dtype == jnp.float32
