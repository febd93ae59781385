"""MNIST's four idx files in miniature."""

import gzip
import struct

import numpy as np

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(values):
    """An array as the content of an idx file of unsigned bytes."""
    return struct.pack(f">I{values.ndim}I", 0x800 | values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def digits(count, seed):
    """Pictures (count, 28, 28) with a bright bar whose place is the label, on noise; labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    images = rng.integers(0, 60, (count, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[4 + 2 * label : 6 + 2 * label, 6:22] = 220
    return images, labels


def write_mnist(root, train=20, test=10, name=lambda name: name):
    """Writes the four files, each under name(its usual name), compressed where that ends in .gz."""
    root.mkdir(parents=True, exist_ok=True)
    arrays = [*digits(train, seed=0), *digits(test, seed=1)]
    for file_name, array in zip(NAMES, arrays, strict=True):
        path = root / name(file_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = idx_bytes(array)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return root
