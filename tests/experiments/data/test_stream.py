"""Streamed batches equal those of a training in memory."""

import contextlib
import itertools
import threading
import time

import numpy as np
import pytest
from picture_folders import noise

from experiments.data.dataset import Split
from experiments.data.stream import evaluation_batches, put_ahead, training_batches

BATCH_SIZE, SEED, EPOCHS = 4, 3, 3  # five steps an epoch, two pictures left out
STEPS = 15
IMAGES, LABELS = noise(22, 12, 10, 3), np.arange(22, dtype=np.int32) % 3
PARTS = [(index, count) for count in (1, 2, 4) for index in range(count)]


@pytest.fixture(params=["memory", "memory map"])
def split(request, tmp_path):
    if request.param == "memory":
        return Split(IMAGES, LABELS)
    np.save(tmp_path / "images.npy", IMAGES)
    return Split(np.load(tmp_path / "images.npy", mmap_mode="r"), LABELS)


def expected_batches():
    """A training's batches, epoch after epoch."""
    batches = []
    for epoch in range(EPOCHS):
        order = np.random.default_rng([SEED, epoch]).permutation(len(LABELS))
        for start in range(0, len(LABELS) - BATCH_SIZE + 1, BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batches.append((IMAGES[chosen], LABELS[chosen]))
    return batches


def collect(split, **options):
    with contextlib.closing(training_batches(split, BATCH_SIZE, SEED, epochs=EPOCHS, **options)) as batches:
        return list(batches)


def assert_same(found, expected, part=(0, 1)):
    """Asserts equal rows of a part, bit for bit."""
    index, count = part
    rows = slice(index * BATCH_SIZE // count, (index + 1) * BATCH_SIZE // count)
    assert len(found) == len(expected)
    for (images, labels), (expected_images, expected_labels) in zip(found, expected, strict=True):
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        assert type(images) is np.ndarray
        np.testing.assert_array_equal(images, expected_images[rows])
        np.testing.assert_array_equal(labels, expected_labels[rows])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_threads_stream_the_batches_of_a_training_in_memory(split, prefetch):
    expected = expected_batches()
    assert len(expected) == STEPS
    for part in PARTS:
        assert_same(collect(split, part=part, prefetch=prefetch), expected, part)


def test_a_run_resumed_at_any_step_repeats_and_skips_nothing(split):
    expected = expected_batches()
    for step in range(STEPS + 1):
        with contextlib.closing(training_batches(split, BATCH_SIZE, SEED, epochs=EPOCHS)) as batches:
            before = list(itertools.islice(batches, step))
        assert_same(before + collect(split, start_step=step), expected)


def test_an_epoch_takes_no_picture_twice():
    numbers = np.arange(22, dtype=np.uint8).reshape(22, 1, 1, 1)
    batches = collect(Split(numbers, np.zeros(22, np.int32)))
    epochs = [np.concatenate([images.ravel() for images, _ in batches[start : start + 5]]) for start in (0, 5, 10)]
    assert [len(set(epoch.tolist())) for epoch in epochs] == [20, 20, 20]
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("batch_size", [4, 7, 8])
def test_evaluation_takes_all_pictures_in_order(split, batch_size):
    """The first picture fills up the last batch of the 22 pictures."""
    filling = [0] * (-len(split) % batch_size)
    assert filling
    for count in (count for count in (1, 2, 4) if batch_size % count == 0):
        parts = []
        for index in range(count):
            with contextlib.closing(evaluation_batches(split, batch_size, part=(index, count))) as batches:
                parts.append(list(batches))
        found = [batch for of_all_parts in zip(*parts, strict=True) for batch in of_all_parts]
        for place, expected in enumerate((IMAGES, LABELS)):
            streamed = np.concatenate([batch[place] for batch in found])
            np.testing.assert_array_equal(streamed, np.concatenate([expected, expected[filling]]))


def test_batches_are_put_on_the_device_ahead_of_their_use():
    put = []
    stream = put_ahead(((i, -i) for i in range(5)), lambda images, labels: put.append(images) or (images, labels), 2)
    seen = []
    for images, labels in stream:
        assert labels == -images
        seen.append((images, put[-1]))
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4), (4, 4)]


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_threads_end_when_closed(split):
    def reading():
        return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]

    wait_for(lambda: not reading())
    batches = training_batches(split, BATCH_SIZE, SEED, epochs=10_000)
    next(batches)
    assert reading()
    batches.close()
    wait_for(lambda: not reading())
