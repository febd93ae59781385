"""Reads MNIST (60,000 + 10,000 grey pictures of handwritten digits, 28x28) from TFDS or from its four idx files.

LeCun, Bottou, Bengio and Haffner: Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 86 (1998).
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
from tqdm import tqdm

from experiments.data.dataset import SPLITS, DataError, Dataset, Split
from experiments.data.layouts import folder_levels
from experiments.data.layouts.files import PictureFolder
from experiments.data.layouts.names import first_few, missing_package
from experiments.data.layouts.tfds import PACKAGES, tfds
from experiments.data.pictures import MAX_FILE_BYTES, Decoding, Failure, decode_many, read_file, reason_of

IMAGE_SIZE = (28, 28)
CLASS_NAMES = tuple("0123456789")
FULL = {"train": 60_000, "test": 10_000}
TRAIN_OF_CLASS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
FILES = {  # images and labels of each split
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
NAMES = [name for pair in FILES.values() for name in pair]
HINT = f"pass --data DIR with the four idx files {', '.join(NAMES[:3])} and {NAMES[3]}, each as it is or as .gz"
OTHERS = re.compile(r"\b(fashion|not|e|k|q)[-_]?mnist", re.IGNORECASE)  # names of folders with other data in such files
UNSIGNED_BYTES = 0x08  # the type code of an idx file


def load_mnist(data_dir: Path | None = None, tfds_dir: Path | None = None) -> Dataset:
    """Reads all of MNIST: images (N, 28, 28, 1) uint8, labels 0 to 9.

    Args:
      data_dir: a folder with the four idx files; None takes TFDS's mnist, and downloads it if necessary.
      tfds_dir: where TFDS keeps its data; None for TFDS's default ($TFDS_DATA_DIR, ~/tensorflow_datasets).

    Raises:
      DataError: a file is missing or damaged, tensorflow_datasets is missing, or the download fails.
    """
    dataset = from_tfds(tfds_dir) if data_dir is None else from_idx_files("idx files", find_files(data_dir))
    place = f"pictures in {dataset.source['directory']}"
    for split, count in FULL.items():
        if (found := dataset.source[split]) != count:
            print(f"warning: {found:,} {split} {place}: the whole of MNIST has {count:,}", file=sys.stderr)
    if OTHERS.search(dataset.source["directory"]):
        return dataclasses.replace(dataset, title=place)
    of_class = np.bincount(dataset.train.labels, minlength=10).tolist()
    if len(dataset.train) == FULL["train"] and of_class != TRAIN_OF_CLASS:
        print(f"warning: {place} are not MNIST's, which has other labels: is this Fashion-MNIST?", file=sys.stderr)
        return dataclasses.replace(dataset, title=place)
    return dataset


def mnist(layout: str, directory: Path, splits: Mapping[str, Split]) -> Dataset:
    source = {"layout": layout, "directory": str(directory)} | {split: len(splits[split]) for split in SPLITS}
    return Dataset("MNIST", CLASS_NAMES, splits["train"], splits["test"], source)


# The idx files.


def find_files(directory: Path) -> dict[str, Path]:
    """Finds the four files, {name: path}, in the folder or one inside it (MNIST/raw/); else raises a DataError."""
    if not directory.is_dir():
        raise DataError(f"--data {directory} {'is no folder' if directory.exists() else 'does not exist'}: {HINT}")
    for level in folder_levels(directory, {"mnist", "raw", "data", "archive"}):
        places = [root for root in level if any(find_file(root, name) for name in NAMES)]
        named = [root for root in places if "mnist" in str(root.relative_to(directory)).lower().split(os.sep)]
        if len(named) == 1:
            places = named  # torchvision puts FashionMNIST/ beside it
        if len(places) > 1:
            few = first_few(map(str, places))
            raise DataError(f"{directory} has {len(places)} sets of idx files: give one of {few}")
        for root in places:
            found = {name: find_file(root, name) for name in NAMES}
            if missing := [name for name, path in found.items() if path is None]:
                raise DataError(f"{root} has no {' and no '.join(missing)}: {HINT}")
            return found
    raise DataError(f"{directory} has none of MNIST's files: {HINT}")


def find_file(directory: Path, name: str) -> Path | None:
    """Finds a file, also with .idx in its name (from mirrors) or in a folder of the same name (from Kaggle)."""
    files = [stem + suffix for stem in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    paths = [directory / file for file in files] + [directory / file / file for file in files]
    return next((path for path in paths if path.is_file()), None)


def from_idx_files(layout: str, files: Mapping[str, Path]) -> Dataset:
    """Reads the four files {name: path}; raises a DataError if they are damaged or do not fit together."""
    splits = {}
    for split, (images_name, labels_name) in FILES.items():
        images_path, labels_path = files[images_name], files[labels_name]
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if images.shape[1:] != IMAGE_SIZE:
            size = "x".join(map(str, images.shape[1:]))
            raise DataError(f"{images_path} has pictures of {size}: expected 28x28, {HINT}")
        if not len(images):
            raise DataError(f"{images_path} has no pictures: download it again")
        if len(images) != len(labels):
            raise DataError(
                f"{images_path} has {len(images):,} pictures and {labels_path} has {len(labels):,} labels: "
                "expected equal numbers, download both again"
            )
        if labels.max() > 9:
            place = int(np.argmax(labels > 9))
            raise DataError(f"{labels_path} has the label {labels[place]} at place {place:,}: expected 0 to 9")
        splits[split] = Split(images[..., None], labels.astype(np.int32))
    return mnist(layout, files[NAMES[0]].parent, splits)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads an idx file of unsigned bytes as a read-only array; gzip is detected by the content, not by the name.

    The format: a magic number (two bytes 0, the type's code, the number of dimensions), the size of each dimension
    (big-endian, 4 bytes), then the values in C order.

    Raises:
      DataError: the file cannot be read, is damaged, or holds other values.
    """
    try:
        data = read_file(path)
        if data[:2] == b"\x1f\x8b":
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_FILE_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or damaged ({error}): download it again") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({reason_of(error)})") from error
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"{path} unpacks to more than {MAX_FILE_BYTES:,} bytes: no file of MNIST is that large")
    expected = UNSIGNED_BYTES << 8 | dimensions
    magic = int.from_bytes(data[:4], "big")
    if magic != expected:
        kind = {1: "labels", 3: "images"}[dimensions]
        raise DataError(f"{path} has the magic number {magic}: expected {expected} ({kind} as bytes); {HINT}")
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", data[4:start].ljust(start - 4, b"\0"))
    if len(data) - start != math.prod(shape):
        raise DataError(
            f"{path} holds {max(0, len(data) - start):,} bytes of values, but its header says "
            f"{'x'.join(map(str, shape))} = {math.prod(shape):,}: download it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# TFDS.


def from_tfds(tfds_dir: Path | None = None) -> Dataset:
    """Reads what TFDS prepared, or else has TFDS download the four idx files and verify their checksums.

    TensorFlow is not needed, unlike for TFDS's own preparation of mnist. Errors: see load_mnist.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(f"{missing_package('MNIST comes from TFDS, which', error, *PACKAGES)}, or {HINT}") from error
    builder = tensorflow_datasets.builder("mnist", data_dir=tfds_dir)
    folder = tfds(Path(builder.data_dir), "mnist", boxes=False)
    if folder is not None:
        return mnist(folder.layout, folder.directory, {split: decode_split(folder, split) for split in SPLITS})
    files = download(builder, Path(builder.data_dir).parents[1] / "downloads")
    return from_idx_files("idx files downloaded by TFDS", files)


def decode_split(folder: PictureFolder, split: str) -> Split:
    """Decodes the pictures of a prepared split; raises a DataError if one is damaged."""
    images = np.empty((folder.counts[split], *IMAGE_SIZE, 1), np.uint8)
    labels = np.empty(folder.counts[split], np.int32)
    decoded = decode_many(folder.pictures(split), Decoding(IMAGE_SIZE, grey=True, margin=None))
    bar = tqdm(decoded, f"MNIST, decoding {split}", len(labels), leave=False, dynamic_ncols=True, disable=None)
    for place, (picture, result) in enumerate(bar):
        if isinstance(result, Failure):
            raise DataError(f"{folder.directory} is damaged, {result.name} ({result.reason}): prepare it again")
        images[place], labels[place] = result.pixels, picture.label
    return Split(images, labels)


def download(builder: Any, downloads: Path) -> dict[str, Path]:
    """Has TFDS download the four files once, {name: path}; raises a DataError if the download fails."""
    import requests  # a dependency of TFDS
    import tensorflow_datasets

    urls = [urljoin(builder.URL, f"{name}.gz") for name in NAMES]
    try:
        if not all(any(downloads.glob(f"mnist/*{name}*.gz")) for name in NAMES):
            requests.head(urls[0], timeout=10).raise_for_status()  # offline, TFDS would try for minutes
        manager = tensorflow_datasets.download.DownloadManager(
            download_dir=downloads, dataset_name="mnist", force_checksums_validation=True
        )
        return dict(zip(NAMES, map(Path, manager.download(urls)), strict=True))
    except Exception as error:  # TFDS passes on what its downloader raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"MNIST cannot be downloaded to {downloads}: {HINT}. Reason: {reason}") from error
