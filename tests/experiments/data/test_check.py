"""The check of a data set before a training finds counts, missing classes, copies and plain pictures."""

import numpy as np
import pytest
from folder_changes import a_file, a_folder, a_picture
from picture_folders import noise as random_pixels

from experiments.data import check, stanford_cars
from experiments.data.check import Finding, check_dataset, format_findings
from experiments.data.dataset import Dataset, Split, balanced_subset
from experiments.data.drawn_cars import drawn_cars
from experiments.data.stanford_cars import load_stanford_cars

NAMES = ("coupe", "sedan", "van")


def noise(count, seed, channels=1):
    return random_pixels(count, 6, 5, channels, seed=seed)


def dataset_of(train, train_labels, test, test_labels, names=NAMES):
    def split(images, labels):
        return Split(np.asarray(images, np.uint8), np.asarray(labels, np.int32))

    return Dataset("pictures", names, split(train, train_labels), split(test, test_labels), {})


def texts(dataset, severity):
    return [finding.text for finding in check_dataset(dataset) if finding.severity == severity]


def test_of_a_sound_set_there_is_only_to_count():
    dataset = dataset_of(noise(4, 0), [0, 1, 2, 2], noise(3, 1), [0, 1, 2])
    assert check_dataset(dataset) == [
        Finding("fact", "4 train pictures of 3 classes, from 1 (coupe) to 2 (van)"),
        Finding("fact", "3 test pictures of 3 classes, 1 each"),
    ]


def test_the_demos_drawings_are_sound():
    """No class is rare, and no drawing occurs twice."""
    found = check_dataset(drawn_cars((32, 32), train_count=120, test_count=60, grey=True, seed=0))
    assert [finding.severity for finding in found] == ["fact", "fact"]


def test_what_makes_no_sense_is_an_error_and_comes_first():
    empty = dataset_of(noise(2, 0), [0, 1], noise(0, 1), [])
    assert [finding.severity for finding in check_dataset(empty)] == ["error", "fact"]
    assert texts(empty, "error") == ["there are no test pictures: add some"]
    outside = dataset_of(noise(3, 0), [0, 3, -1], noise(2, 1), [0, 1])
    assert texts(outside, "error") == [
        "2 train pictures have labels other than 0 to 2: the first is number 1, with 3",
    ]


def test_missing_classes():
    dataset = dataset_of(noise(2, 0), [0, 0], noise(3, 1), [1, 1, 0], names=(*NAMES, "truck"))
    assert texts(dataset, "warning") == [
        "3 classes have no train pictures: sedan, van, truck",
        "2 classes have no test pictures: van, truck",
        "2 test pictures are of classes without train pictures: add train pictures, or remove these",
        "all train pictures are of one class: there is nothing to tell apart",
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_pictures(channels):
    """All pixels of a plain picture have one colour, in 1 or 3 channels. Plain pictures do not count as copies."""
    train, test = noise(5, 0, channels), noise(2, 1, channels)
    train[1:4] = range(7, 7 + channels)
    train[3, 2, 2, channels - 1] += 1
    test[0] = 255
    dataset = dataset_of(train, [0, 1, 1, 1, 2], test, [0, 1])
    assert texts(dataset, "warning")[1:] == [  # after the class that has no test picture
        "2 train pictures are of one colour throughout: train picture 1 (sedan), train picture 2 (sedan); replace them",
        "1 test picture is of one colour throughout: test picture 0 (coupe); replace it",
    ]


def test_copies():
    """Copies within and across splits, of the same and of another class, have separate lines."""
    train, test = noise(8, 0), noise(6, 1)
    train[3] = train[1]  # the same class
    train[5], train[6] = train[2], train[2]  # another class, and the same class again
    test[0] = train[0]  # the same class
    test[1], test[2] = train[4], train[4]  # another class, and the same class
    test[5] = test[4]
    dataset = dataset_of(train, [0, 1, 2, 1, 0, 0, 2, 1], test, [0, 1, 0, 2, 1, 1])
    assert texts(dataset, "warning") == [
        "1 of 6 test pictures equal train pictures of another class: test picture 1 (sedan) = train picture 4 (coupe); "
        "one of the labels is wrong: correct or remove both",
        "2 of 6 test pictures are train pictures, too: test picture 0 (coupe) = train picture 0 (coupe), "
        "test picture 2 (coupe) = train picture 4 (coupe); the result would be too good: remove one of them",
        "1 of 6 test pictures equal test pictures of another class: test picture 2 (coupe) = test picture 1 (sedan); "
        "one of the labels is wrong: correct or remove both",
        "1 of 6 test pictures repeat another test picture: test picture 5 (sedan) = test picture 4 (sedan); each "
        "counts twice: remove one of them",
        "2 of 8 train pictures equal train pictures of another class: train picture 5 (coupe) = train picture 2 (van), "
        "train picture 6 (van) = train picture 5 (coupe); one of the labels is wrong: correct or remove both",
        "1 of 8 train pictures repeat another train picture: train picture 3 (sedan) = train picture 1 (sedan); each "
        "counts twice: remove one of them",
    ]


def test_a_copy_in_another_chunk_is_found(monkeypatch):
    monkeypatch.setattr(check, "CHUNK_BYTES", 70)  # two pictures
    images = noise(9, 0)
    images[8] = images[1]
    (text,) = texts(dataset_of(images, [0, 1, 2] * 3, noise(3, 1), [0, 1, 2]), "warning")
    assert "train picture 8 (van) = train picture 1 (sedan)" in text


@pytest.mark.parametrize(("copies", "named"), [(2, 2), (3, 3), (4, 3)])
def test_only_the_first_few_are_named(copies, named):
    images = np.repeat(noise(1, 0), 1 + copies, axis=0)
    dataset = dataset_of(images, [0] * len(images), noise(1, 1), [0], names=("car",))
    assert texts(dataset, "warning")[1].count("=") == named


class Slices:
    """Pictures that record how they are sliced."""

    def __init__(self, images):
        self.images, self.shape, self.read = images, images.shape, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.append(index)
        return self.images[index]


def test_every_picture_is_read_once_and_few_at_a_time(monkeypatch):
    monkeypatch.setattr(check, "CHUNK_BYTES", 100)  # three pictures
    images = Slices(noise(8, 0))
    scan = check.scan(images)
    assert images.read == [slice(0, 3), slice(3, 6), slice(6, 9)]
    np.testing.assert_array_equal(scan.digests, check.scan(noise(8, 0)).digests)


def test_files_are_named_and_what_the_reader_knows_is_told(tmp_path):
    """An unreadable picture is left out, and the names of the others stay correct; nothing is told twice."""
    root = tmp_path / "cars"
    a_picture("train/A 'x'/1.png", "train/Bé/2.png", "train/Bé/3.png")(root)
    a_picture("test/A 'x'/3.png", "test/A 'x'/4.png", "test/A 'x'/5.png", "test/Bé/6.png", "test/Bé/7.png")(root)
    a_file("train/A 'x'/0.png", content=b"")(root)
    a_folder("test/C")(root)
    dataset = load_stanford_cars(root, (8, 8), True, skip_bad=True, cache_dir=tmp_path / "cache")
    found = check_dataset(dataset)
    assert [finding.text for finding in found if finding.severity == "warning"] == [
        "1 of 5 test pictures equal train pictures of another class: test/A 'x'/3.png = train/Bé/3.png; one of the "
        "labels is wrong: correct or remove both",
    ]
    part = balanced_subset(dataset.train, 2, seed=0)
    assert part.names == ("train/A 'x'/1.png", part.names[1])
    assert part.names[1] in ("train/Bé/2.png", "train/Bé/3.png")
    notes = "\n".join(dataset.source["notes"])
    assert "1 picture that cannot be used is left out: train/A 'x'/0.png (the file is empty)" in notes
    assert "1 folder without pictures is no class: test/C" in notes


def test_format():
    findings = [Finding("error", "a"), Finding("warning", "b"), Finding("fact", "c")]
    assert format_findings(findings) == "error: a\nwarning: b\nc"


@pytest.mark.slow
def test_the_real_cars(stanford_cars_dir, tmp_path, monkeypatch):
    """The data have 38 pairs of copies: 36 pairs are of two classes, 19 lie across the splits."""
    load_stanford_cars(stanford_cars_dir, (32, 32), True, cache_dir=tmp_path)
    monkeypatch.setattr(stanford_cars, "decode_many", None)  # the second time nothing is decoded
    dataset = load_stanford_cars(stanford_cars_dir, (32, 32), True, cache_dir=tmp_path)
    assert (dataset.title, dataset.source["notes"]) == ("Stanford Cars", [])
    found = {text.partition(":")[0] for text in texts(dataset, "warning")}
    assert found == {
        "18 of 8,041 test pictures equal train pictures of another class",
        "1 of 8,041 test pictures are train pictures, too",
        "7 of 8,041 test pictures equal test pictures of another class",
        "1 of 8,041 test pictures repeat another test picture",
        "11 of 8,144 train pictures equal train pictures of another class",
    }
    assert texts(dataset, "fact") == [
        "8,144 train pictures of 196 classes, from 24 (Hyundai Accent Sedan 2012) to 68 (GMC Savana Van 2012)",
        "8,041 test pictures of 196 classes, from 24 (Hyundai Accent Sedan 2012) to 68 (GMC Savana Van 2012)",
    ]
