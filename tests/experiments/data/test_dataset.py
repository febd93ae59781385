"""Subsets of data sets and the statistics of channels."""

import numpy as np
import pytest

from experiments.data.dataset import (
    Dataset,
    Split,
    balanced_subset,
    channel_statistics,
    draw_classes,
    hold_out,
    limit_test,
)


def split_of(counts):
    """counts[label] examples of each class, shuffled; an example's picture holds its number."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    np.random.default_rng(0).shuffle(labels)
    return Split(np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1), labels)


SHARES = {
    "even": ([10, 10, 10], 12, [4, 4, 4]),
    "with a remainder": ([10, 10, 10], 13, [4, 4, 5]),
    "fewer than classes": ([10, 10, 10], 2, [0, 1, 1]),
    "a small class gives all": ([2, 10, 10], 12, [2, 5, 5]),
    "two small classes": ([1, 3, 20], 20, [1, 3, 16]),
    "everything": ([2, 5, 9], 16, [2, 5, 9]),
    "a class without examples": ([4, 0, 4], 4, [0, 2, 2]),
    "one": ([3, 3], 1, [0, 1]),
}


@pytest.mark.parametrize("case", SHARES)
def test_classes_share_as_equally_as_they_can(case):
    counts, count, expected = SHARES[case]
    split = split_of(counts)
    subset = balanced_subset(split, count, seed=3)
    assert sorted(np.bincount(subset.labels, minlength=len(counts))) == expected
    chosen = subset.images.ravel()
    assert (np.diff(chosen.astype(int)) > 0).all()  # in the order of the original, none twice
    assert len(chosen) == count
    np.testing.assert_array_equal(split.labels[chosen], subset.labels)
    assert subset.images.dtype == np.uint8
    assert subset.labels.dtype == np.int32


def test_the_seed_decides():
    split = split_of([40, 40])
    draws = [balanced_subset(split, 21, seed).images.ravel().tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_every_example_and_every_remainder_can_be_drawn():
    """200 seeds miss an example with probability (1/2)^200."""
    split = split_of([3, 3])
    subsets = [balanced_subset(split, 3, seed) for seed in range(200)]
    assert {int(number) for subset in subsets for number in subset.images.ravel()} == set(range(6))
    assert {tuple(np.bincount(subset.labels)) for subset in subsets} == {(1, 2), (2, 1)}


def dataset_of(counts):
    train = split_of(counts)
    names = tuple(f"picture {i}" for i in range(len(train)))
    train = Split(train.images, train.labels, names)
    return Dataset("pictures", tuple(f"class {i}" for i in range(len(counts))), train, split_of(counts), {})


def test_drawn_classes_are_always_the_same():
    """All pictures of a drawn class stay, with a new number that goes with the new names."""
    whole = dataset_of([5, 6, 7, 8, 9, 10])
    few = draw_classes(whole, 3)
    assert few.class_names == draw_classes(whole, 3).class_names
    assert few.title == "3 classes of pictures"
    for split, original in ((few.train, whole.train), (few.test, whole.test)):
        assert split.labels.dtype == np.int32
        numbers = split.images.ravel()
        old = [whole.class_names[label] for label in original.labels[numbers]]
        assert [few.class_names[label] for label in split.labels] == old
        assert len(split) == sum(whole.class_names[label] in few.class_names for label in original.labels)
    assert few.train.names == tuple(f"picture {i}" for i in few.train.images.ravel())
    assert draw_classes(whole, 6).class_names == whole.class_names


def test_a_part_of_the_test_pictures_is_balanced_and_in_the_title():
    whole = dataset_of([4, 9, 20])
    part = limit_test(whole, 7)
    assert sorted(np.bincount(part.test.labels).tolist()) == [2, 2, 3]
    assert part.title == "pictures, 7 test pictures"
    assert part.train is whole.train
    np.testing.assert_array_equal(part.test.images, limit_test(whole, 7).test.images)


def test_what_is_held_out_is_not_trained_on():
    """A tenth of each class is held out, rounded, but at least one picture."""
    whole = dataset_of([2, 10, 26])
    held = hold_out(whole, 0.1)
    assert np.bincount(held.test.labels).tolist() == [1, 1, 3]
    trained, tested = (set(split.images.ravel().tolist()) for split in (held.train, held.test))
    assert trained | tested == set(range(38))
    assert not trained & tested
    np.testing.assert_array_equal(whole.train.labels[held.test.images.ravel()], held.test.labels)
    np.testing.assert_array_equal(hold_out(whole, 0.1).test.images, held.test.images)
    assert held.title == "pictures, 5 of the training pictures held out"


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda whole: balanced_subset(whole.train, 0, seed=0), "cannot take 0 of 12 examples: ask for 1 to 12"),
        (lambda whole: balanced_subset(whole.train, -1, seed=0), "cannot take -1 of 12 examples"),
        (lambda whole: limit_test(whole, 13), "cannot take 13 of 12 examples"),
        (lambda whole: draw_classes(whole, 0), "cannot take 0 of 2 classes"),
        (lambda whole: draw_classes(whole, 3), "cannot take 3 of 2 classes"),
        (lambda whole: hold_out(whole, 0.9), "cannot hold out 90% of class 0: it has 2 training pictures"),
    ],
)
def test_more_than_there_is_is_refused(take, message):
    with pytest.raises(ValueError, match=message):
        take(dataset_of([2, 10]))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 4, 3), (300, 70, 71, 3)])
def test_channel_statistics_are_exact(shape):
    """NumPy gives the same in float64; its own sums err by 1e-12. The last case has two chunks."""
    images = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    images[..., 0] //= 3
    mean, deviation = channel_statistics(images)
    scaled = images.reshape(-1, shape[-1]) / 255.0
    np.testing.assert_allclose(mean, scaled.mean(0), rtol=1e-12)
    np.testing.assert_allclose(deviation, scaled.std(0), rtol=1e-12, atol=1e-15)
    assert mean.dtype == deviation.dtype == np.float64


def test_channel_statistics_of_a_constant_are_exactly_so():
    """Sums of whole numbers leave no variance from rounding."""
    mean, deviation = channel_statistics(np.full((7, 3, 3, 2), 51, np.uint8))
    assert mean.tolist() == [0.2, 0.2]
    assert deviation.tolist() == [0.0, 0.0]
