"""Streamed batches equal those of a training in memory, and lazily decoded pictures equal the cache's."""

import itertools
import threading
import time

import numpy as np
import pytest
from picture_folders import (
    FEATURES,
    encoded,
    make_by_class,
    make_original,
    make_parquet,
    make_tfds,
    make_with_devkit,
    noise,
)
from PIL import Image
from tfds_folder import write_tfds

from experiments.data.dataset import DataError, Split, balanced_subset, channel_statistics
from experiments.data.lazy import LazyPictures
from experiments.data.stanford_cars import load_stanford_cars
from experiments.data.stream import Batches, EvaluationBatches, put_ahead

CLASSES = ("a", "b", "c")
COUNTS = {"train": 22, "test": 7}
BATCH_SIZE, SEED, EPOCHS = 4, 3, 3  # five steps an epoch, two pictures left out
STEPS = 15
SIZE = (12, 10)


def jpeg(split, number):
    """A JPEG with content of its own."""
    return encoded(Image.fromarray(noise(20, 30, 3, seed=[len(split), number])).resize((64, 48)), "JPEG")


def make_jpegs(root):
    for split, count in COUNTS.items():
        for number in range(count):
            directory = root / split / CLASSES[number % 3]
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{number:05d}.jpg").write_bytes(jpeg(split, number))
    return root


def make_array_record(root):
    """Writes the same pictures in the order of the folders."""
    examples = {
        split: [
            {"image": jpeg(split, number), "label": number % 3, "id": b"%05d" % number, "bbox": [0.1, 0.2, 0.9, 0.7]}
            for number in sorted(range(count), key=lambda number: number % 3)
        ]
        for split, count in COUNTS.items()
    }
    return write_tfds(root, "cars196", "2.1.0", FEATURES, CLASSES, examples, "array_record")


MAKERS = {"JPEG": make_jpegs, "array_record": make_array_record}
FORMS = ("memory", "memory map", "JPEG", "array_record")


def load(root, decode, **options):
    options = {"image_size": SIZE, "grey": False, "margin": 1, "cache_dir": root.parent / "cache"} | options
    return load_stanford_cars(root, decode=decode, **options)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """{form: (its split, the same split from the cache in memory)}; array_record's boxes are cut out in both."""
    root = tmp_path_factory.mktemp("stream")
    found = {}
    for name, make in MAKERS.items():
        make(root / name)
        found[name] = load(root / name, "lazy").train, in_memory(load(root / name, "cache").train)
        assert isinstance(found[name][0].images, LazyPictures)
    mapped = load(root / "JPEG", "cache").train
    assert isinstance(mapped.images, np.memmap)
    return found | {"memory map": (mapped, in_memory(mapped)), "memory": (in_memory(mapped), in_memory(mapped))}


def in_memory(split):
    return Split(np.array(split.images), split.labels)


def assert_equal(split, expected):
    """Asserts equal pictures, labels and statistics, bit for bit."""
    np.testing.assert_array_equal(split.images[:], expected.images[:])
    np.testing.assert_array_equal(split.labels, expected.labels)
    np.testing.assert_array_equal(channel_statistics(split.images), channel_statistics(expected.images))


def expected_batches(split):
    """A training's batches, epoch after epoch."""
    batches = []
    for epoch in range(EPOCHS):
        order = np.random.default_rng([SEED, epoch]).permutation(len(split))
        for start in range(0, len(split) - BATCH_SIZE + 1, BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batches.append((split.images[chosen], split.labels[chosen]))
    return batches


def collect(split, **options):
    with Batches(split, BATCH_SIZE, SEED, epochs=EPOCHS, **options) as batches:
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


# The batches


PARTS = [(index, count) for count in (1, 2, 4) for index in range(count)]


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("form", FORMS)
def test_threads_stream_the_batches_of_a_training_in_memory(loaded, form, prefetch):
    split, cached = loaded[form]
    expected = expected_batches(cached)
    assert len(expected) == STEPS
    for part in PARTS:
        assert_same(collect(split, part=part, prefetch=prefetch), expected, part)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_resumed_at_any_step_repeats_and_skips_nothing(loaded, form):
    split, cached = loaded[form]
    expected = expected_batches(cached)
    for step in range(STEPS + 1):
        with Batches(split, BATCH_SIZE, SEED, epochs=EPOCHS) as batches:
            before = list(itertools.islice(batches, step))
        assert_same(before + collect(split, start_step=step), expected)


def test_an_epoch_takes_no_picture_twice():
    numbers = np.arange(22, dtype=np.uint8).reshape(22, 1, 1, 1)
    batches = collect(Split(numbers, np.zeros(22, np.int32)))
    epochs = [np.concatenate([images.ravel() for images, _ in batches[start : start + 5]]) for start in (0, 5, 10)]
    assert [len(set(epoch.tolist())) for epoch in epochs] == [20, 20, 20]
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("batch_size", [4, 7, 8])
@pytest.mark.parametrize("form", FORMS)
def test_evaluation_takes_all_pictures_in_order(loaded, form, batch_size):
    """The first picture fills up the last batch of the 22 pictures."""
    split, cached = loaded[form]
    filling = [0] * (-len(split) % batch_size)
    assert filling
    for count in (count for count in (1, 2, 4) if batch_size % count == 0):
        parts = []
        for index in range(count):
            with EvaluationBatches(split, batch_size, part=(index, count)) as batches:
                parts.append(list(batches))
        found = [batch for of_all_parts in zip(*parts, strict=True) for batch in of_all_parts]
        for place, expected in enumerate((cached.images, cached.labels)):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 23}, "batch_size 23 exceeds the 22 pictures"),
        ({"batch_size": 0}, "multiple of the number of processes"),
        ({"part": (0, 3)}, "batch_size 4 must be a multiple of the number of processes, 3"),
        ({"part": (2, 2)}, r"part must be \(process_index, process_count\), got \(2, 2\)"),
    ],
)
def test_numbers_out_of_range_are_refused(loaded, options, message):
    options = {"batch_size": BATCH_SIZE, "epochs": EPOCHS} | options
    with pytest.raises(ValueError, match=message):
        Batches(loaded["memory"][0], seed=SEED, **options)


# Pictures that change under a training


def truncated(path):
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("make", "name", "change", "message"),
    [
        (make_jpegs, "train/b/00010.jpg", lambda path: path.unlink(), r"00010\.jpg in .* read \(No such file or dir"),
        (make_jpegs, "train/b/00010.jpg", truncated, r"00010\.jpg in .*found can no longer be read \(.*truncated"),
        (
            make_array_record,
            "cars196-train.array_record-00000-of-00001",
            truncated,
            r"found is damaged after \d+ train",
        ),
    ],
)
def test_a_picture_that_can_no_longer_be_read_is_named(tmp_path, make, name, change, message):
    dataset = load(make(tmp_path / "found"), "lazy")
    change(tmp_path / "found" / name)
    with pytest.raises(DataError, match=message):
        collect(dataset.train)


# Threads


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_threads_end_when_closed(loaded):
    def reading():
        return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]

    wait_for(lambda: not reading())
    batches = Batches(loaded["JPEG"][0], BATCH_SIZE, SEED, epochs=10_000)
    next(batches)
    assert reading()
    batches.close()
    wait_for(lambda: not reading())


# Lazily decoded pictures


LAYOUTS = {
    "by class": make_by_class,
    "by class with a devkit": make_with_devkit,
    "original": make_original,
    "original, nested": lambda root: make_original(root, nested=True),
    "TFDS, array_record": lambda root: make_tfds(root, "array_record"),
}


@pytest.mark.parametrize("options", [{}, {"grey": True, "image_size": (9, 31), "margin": None}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lazily_decoded_pictures_are_those_of_the_cache(tmp_path, layout, options):
    LAYOUTS[layout](tmp_path / "found")
    cached, lazy = (load(tmp_path / "found", decode, **options) for decode in ("cache", "lazy"))
    for name in ("train", "test"):
        images, expected = getattr(lazy, name).images, getattr(cached, name).images
        assert (images.shape, images.dtype, len(images)) == (expected.shape, expected.dtype, len(expected))
        for index in (slice(None), slice(1, 3), np.array([2, 0, 2]), expected[:, 0, 0, 0] > 99, 1, np.int64(-1)):
            found = images[index]
            assert (type(found), found.dtype) == (np.ndarray, np.uint8)
            np.testing.assert_array_equal(found, expected[index])
        assert_equal(getattr(lazy, name), getattr(cached, name))
    assert lazy.source | {"decode": "cache", "cache": cached.source["cache"]} == cached.source


def test_a_subset_of_lazily_decoded_pictures_is_lazy(loaded):
    lazy, cached = (balanced_subset(split, 10, seed=1) for split in loaded["JPEG"])
    assert isinstance(lazy.images, LazyPictures)
    assert_equal(lazy, cached)


def test_bad_pictures_are_refused_or_skipped_as_with_the_cache(tmp_path):
    root = make_jpegs(tmp_path / "found")
    (root / "train" / "a" / "00003.jpg").write_bytes(b"")
    truncated(root / "test" / "b" / "00001.jpg")
    for decode in ("cache", "lazy"):
        with pytest.raises(DataError, match=r"2 of 29 pictures .* cannot be used: train/a/00003.jpg .*--skip-bad"):
            load(root, decode)
    cached, lazy = (load(root, decode, skip_bad=True) for decode in ("cache", "lazy"))
    assert lazy.source["skipped"] == cached.source["skipped"] == ["train/a/00003.jpg", "test/b/00001.jpg"]
    for name in ("train", "test"):
        assert_equal(getattr(lazy, name), getattr(cached, name))
    with pytest.raises(DataError, match="2 of 29 pictures"):  # also if the cache knows them
        load(root, "lazy")


@pytest.mark.parametrize("make", [make_tfds, make_parquet])
def test_layouts_that_are_read_from_front_to_back_are_refused(tmp_path, make):
    make(tmp_path / "found")
    with pytest.raises(DataError, match=r"cannot be read one by one: pass --decode cache.*array_record"):
        load(tmp_path / "found", "lazy")
