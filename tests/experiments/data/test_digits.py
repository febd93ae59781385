"""MNIST's reader on its real files, on small ones, on broken ones, and on what TFDS prepares or downloads."""

import gzip
import re
import sys

import numpy as np
import pytest
from idx_files import NAMES, digits, idx_bytes, write_mnist
from picture_folders import encoded
from tfds_folder import image_feature, label_feature, write_tfds

from experiments.data.dataset import DataError, channel_statistics
from experiments.data.digits import load_mnist

FEATURES = {"image": image_feature(28, 28, 1), "label": label_feature(range(10))}
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES


def check_digits(dataset):
    assert (dataset.title, dataset.class_names) == ("MNIST", tuple("0123456789"))
    for split, (images, labels) in ((dataset.train, digits(20, seed=0)), (dataset.test, digits(10, seed=1))):
        np.testing.assert_array_equal(split.images, images[..., None])
        np.testing.assert_array_equal(split.labels, labels)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    assert (dataset.source["train"], dataset.source["test"]) == (20, 10)


def test_real_files(mnist_dir, capsys):
    """The classes' counts, the first ten digits, the mean and the deviation are the known values."""
    dataset = load_mnist(mnist_dir)
    assert dataset.train.images.shape == (60_000, 28, 28, 1)
    assert dataset.test.images.shape == (10_000, 28, 28, 1)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(dataset.train.labels).tolist() == counts
    assert dataset.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert dataset.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    mean, std = channel_statistics(dataset.train.images)
    assert (round(mean[0], 4), round(std[0], 4)) == (0.1307, 0.3081)
    assert "warning" not in capsys.readouterr().err


def dotted(name):
    return name.replace("-idx", ".idx")


PLACES = {  # how the four files are called, and where mirrors, torchvision, Kaggle and unpacked archives have them
    "as they are": lambda name: name,
    "compressed": lambda name: f"{name}.gz",
    "with a dot": dotted,
    "with a dot, compressed": lambda name: f"{dotted(name)}.gz",
    "mixed": lambda name: name if "images" in name else f"{name}.gz",
    "torchvision": lambda name: f"MNIST/raw/{name}",
    "Kaggle": lambda name: f"{name}/{name}",
    "Kaggle, with a dot": lambda name: f"archive/{dotted(name)}/{dotted(name)}",
    "the only folder": lambda name: f"some/where/{name}.gz",
}


@pytest.mark.parametrize("name", PLACES.values(), ids=PLACES)
def test_idx_files(name, tmp_path, capsys):
    dataset = load_mnist(write_mnist(tmp_path, name=name))
    check_digits(dataset)
    assert dataset.source["layout"] == "idx files"
    assert "20 train pictures" in capsys.readouterr().err  # instead of 60,000: a warning, no error


def test_compressed_or_not_is_seen_in_the_content(tmp_path):
    """Browsers unpack a file and keep its name, or keep it packed and drop the suffix."""
    write_mnist(tmp_path)
    (tmp_path / TRAIN_IMAGES).rename(tmp_path / f"{TRAIN_IMAGES}.gz")
    labels = tmp_path / TEST_LABELS
    labels.write_bytes(gzip.compress(labels.read_bytes()))
    check_digits(load_mnist(tmp_path))


def replaced(name, content):
    """Writes other content, or what a function makes of the content, into a file of a small MNIST."""

    def change(root):
        path = root / name
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return change


def damaged_gzip(content):
    packed = bytearray(gzip.compress(content))
    packed[40] ^= 0xFF
    return bytes(packed)


BROKEN = {  # docs/bad-input.md has more
    "another file": (replaced(TRAIN_IMAGES, b"<html></html>"), "has the magic number 1013478509: expected 2051"),
    "a bare magic number": (replaced(TRAIN_LABELS, b"\0\0\x08\1"), "holds 0 bytes of values"),
    "a cut header": (
        replaced(TRAIN_IMAGES, lambda content: content[:15]),
        "holds 0 bytes of values, but its header says 20x28x",
    ),
    "a byte too many": (replaced(TEST_LABELS, lambda content: content + b"\0"), "holds 11 bytes of values.* = 10:"),
    "damaged gzip": (replaced(TRAIN_IMAGES, damaged_gzip), f"{TRAIN_IMAGES} is truncated or damaged"),
    "no pictures": (replaced(TEST_IMAGES, idx_bytes(np.zeros((0, 28, 28)))), f"{TEST_IMAGES} has no pictures"),
}


@pytest.mark.parametrize(("spoil", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(spoil, message, tmp_path):
    spoil(write_mnist(tmp_path))
    with pytest.raises(DataError, match=message) as raised:
        load_mnist(tmp_path)
    assert "\n" not in str(raised.value)


def test_of_two_sets_the_one_called_mnist_is_taken_or_none(tmp_path):
    for name, count in (("MNIST", 20), ("FashionMNIST", 30)):
        write_mnist(tmp_path / name / "raw", train=count)
    check_digits(load_mnist(tmp_path))
    (tmp_path / "MNIST").rename(tmp_path / "MNIST_old")
    with pytest.raises(DataError, match=r"has 2 sets of idx files: give one of .*FashionMNIST/raw, .*MNIST_old/raw"):
        load_mnist(tmp_path)


@pytest.mark.parametrize("name", ["FashionMNIST/raw", "kmnist"])
def test_another_set_is_known_by_its_folder(name, tmp_path):
    write_mnist(tmp_path / name)
    assert load_mnist(tmp_path / name.split("/")[0]).title == f"pictures in {tmp_path / name}"


def test_another_set_of_that_size_is_not_called_mnist(tmp_path, capsys):
    """Fashion-MNIST has the same files and counts, but equally many pictures of each class."""
    write_mnist(tmp_path, train=60_000, test=10)
    assert load_mnist(tmp_path).title == f"pictures in {tmp_path}"
    assert "is this Fashion-MNIST?" in capsys.readouterr().err


# TFDS


def prepared(tfds_dir, file_format="tfrecord", **changes):
    """What TFDS leaves in its folder after preparing mnist; changes replace features of the eighth training digit."""
    pytest.importorskip("tensorflow_datasets", reason="needs the extra tfds")
    examples = {
        split: [
            {"image": encoded(image.astype(np.uint8)), "label": int(label)}
            for image, label in zip(*digits(count, seed), strict=True)
        ]
        for split, count, seed in (("train", 20, 0), ("test", 10, 1))
    }
    examples["train"][7] |= changes
    write_tfds(tfds_dir / "mnist" / "3.0.1", "mnist", "3.0.1", FEATURES, "0123456789", examples, file_format)
    return tfds_dir


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_prepared_by_tfds_and_read_without_tensorflow(file_format, tmp_path):
    dataset = load_mnist(tfds_dir=prepared(tmp_path, file_format))
    assert "tensorflow" not in sys.modules
    check_digits(dataset)
    assert dataset.source["layout"] == f"TFDS mnist ({file_format})"
    assert dataset.source["directory"].endswith("mnist/3.0.1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": b"no picture"}, r"is damaged, train 7 \(not a picture in any format"),
        ({"label": 10}, "train 7 of .* has the label 10: expected 0 to 9"),
    ],
)
def test_damage_in_what_tfds_prepared_is_named(changes, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_mnist(tfds_dir=prepared(tmp_path, **changes))


def test_without_tensorflow_datasets_the_command_and_the_way_round_it_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=re.escape('pip install "tensorflow-datasets" "array-record"')) as raised:
        load_mnist(tfds_dir=tmp_path)
    assert "--data DIR" in str(raised.value)
    assert all(name in str(raised.value) for name in NAMES)


@pytest.fixture
def network(monkeypatch):
    """Stands for the network: records requests of TFDS's host and TFDS's downloads; requests fail on demand."""
    tensorflow_datasets = pytest.importorskip("tensorflow_datasets", reason="needs the extra tfds")
    import requests

    class Network:
        asked, downloaded, error, files = [], [], None, None

    state = Network()

    def head(url, timeout):
        state.asked.append(url)
        if state.error:
            raise state.error
        response = requests.Response()
        response.status_code = 200
        return response

    def download(manager, urls):
        state.downloaded.extend(urls)
        return [str(state.files / url.rpartition("/")[2]) for url in urls]

    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setattr(tensorflow_datasets.download.DownloadManager, "download", download)
    return state


def test_offline_is_one_line_that_names_the_way_round_it(network, tmp_path):
    import requests

    network.error = requests.ConnectionError("Failed to resolve 'storage.googleapis.com'\nand more")
    with pytest.raises(DataError, match=r"cannot be downloaded to .*: pass --data DIR.*Failed to resolve") as raised:
        load_mnist(tfds_dir=tmp_path)
    assert all(name in str(raised.value) for name in NAMES)
    assert "\n" not in str(raised.value)
    assert not network.downloaded  # TFDS itself would try for minutes


def test_what_tfds_downloads_is_read_as_it_is(network, tmp_path):
    network.files = write_mnist(tmp_path / "elsewhere", name=lambda name: f"{name}.gz")
    dataset = load_mnist(tfds_dir=tmp_path)
    check_digits(dataset)
    assert dataset.source["layout"] == "idx files downloaded by TFDS"
    host = "https://storage.googleapis.com/cvdf-datasets/mnist/"
    assert network.downloaded == [f"{host}{name}.gz" for name in NAMES]


def test_what_is_downloaded_already_needs_no_network(network, tmp_path):
    """TFDS names a download by path and checksum."""
    network.files = write_mnist(tmp_path / "elsewhere", name=lambda name: f"{name}.gz")
    for name in NAMES:
        path = tmp_path / "downloads" / "mnist" / f"cvdf-datasets_mnist_{name}rkbE8mCsSQWHEgQDiwGmwKETYxrS1aI.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    check_digits(load_mnist(tfds_dir=tmp_path))
    assert not network.asked
