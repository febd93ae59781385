"""Creates the files and folders that the cases of bad_inputs.py need, with their mistakes."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.io
from folder_changes import Change, a_file, a_picture, changed, cut, inside
from idx_files import idx_bytes, write_mnist
from picture_folders import annotations_of, encoded, make_original, noise, png_file, save_annotations
from PIL import Image

from experiments.data.digits import FILES as MNIST_FILES
from jax_resnet import resnet, weights
from jax_resnet.checkpoint import Checkpoints

# Pictures of cars.

NAMES = [f"{split}/{name}/{number}.png" for split in ("train", "test") for name in ("Audi", "BMW") for number in (0, 1)]
BAD = "train/Audi/bad.jpg"


def cars(*changes: Change) -> Change:
    """Creates cars/ with two classes of two pictures in train and in test, then changes it."""
    return inside("cars", a_picture(*NAMES), *changes)


def bad_picture(content: bytes) -> Change:
    return cars(a_file(BAD, content=content))


NOISE = Image.fromarray(noise(64, 64, 3))


def png_bomb() -> bytes:
    """A PNG of less than a kilobyte that claims 20,000x20,000 pixels."""
    return png_file(20_000, b"\1\0\0\0\0", bytes(20_000 // 8 + 1) * 200)


def jpeg_bomb() -> bytes:
    """A small JPEG whose header says 65,500x65,500."""
    data = bytearray(encoded(NOISE, "JPEG"))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def sparse_file(root: Path) -> None:
    """Creates a picture file of 5 GB that takes no space on the disk."""
    with (root / BAD).open("wb") as file:
        file.truncate(5 * 10**9)


def devkit(meta: dict | bytes | None = None, **changes) -> Change:
    """Creates cars/ in the original layout, with changed fields in the train annotations or another cars_meta.mat."""

    def change(root: Path) -> None:
        make_original(root)
        if changes:
            rows = [row | changes for row in annotations_of("train")]
            rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
            save_annotations(root / "devkit" / "cars_train_annos.mat", rows)
        if isinstance(meta, dict):
            scipy.io.savemat(root / "devkit" / "cars_meta.mat", meta)
        elif meta is not None:
            (root / "devkit" / "cars_meta.mat").write_bytes(meta)

    return inside("cars", change)


def idx(*shape: int, value: int = 0) -> bytes:
    """An idx file of bytes that are all the same."""
    return idx_bytes(np.full(shape, value))


def digits(**changes: bytes | None) -> Change:
    """Creates digits/ with MNIST's four files, 20 training and 5 test digits; None leaves a file out."""

    def made(folder: Path) -> None:
        write_mnist(folder / "digits", test=5)
        for kind, data in changes.items():
            split, _, content = kind.partition("_")
            path = folder / "digits" / MNIST_FILES[split][content == "labels"]
            path.unlink() if data is None else path.write_bytes(data)

    return made


@functools.cache
def network(in_channels: int = 3) -> dict[str, np.ndarray]:
    """The arrays of a ResNet-18 for 5 classes, all zeros but the variances, in float16 to keep files small."""
    config = resnet.resnet18(num_classes=5, in_channels=in_channels)
    shapes = jax.eval_shape(functools.partial(resnet.init, config), jax.random.key(0))
    arrays = weights.to_torch(*jax.tree.map(lambda spec: np.zeros(spec.shape, np.float16), shapes))
    return {name: array + 1 if name.endswith("running_var") else array for name, array in arrays.items()}


def npz(name: str = "w.npz", change: Callable[[dict], dict] = lambda arrays: arrays) -> Change:
    """Writes a network's weights to an .npz file after a change."""
    return lambda folder: np.savez(folder / name, **change(network()))


def trained_network(**layers: object) -> dict[str, object]:
    """The arrays of network() as PyTorch tensors, with other weights in some layers."""
    import torch

    changes = {f"{name}.weight": value for name, value in layers.items()}
    return {name: torch.tensor(array) for name, array in network().items()} | changes


def without(name: str) -> Callable[[dict], dict]:
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


def with_metadata(**facts: str) -> Change:
    return lambda folder: weights.write_arrays(folder / "w.safetensors", network(), metadata=facts)


def file(name: str, content: bytes) -> Change:
    return a_file(name, content=content)


def pth(contents: Callable[[], object]) -> Change:
    """Writes w.pth with torch.save."""

    def made(folder: Path) -> None:
        torch = pytest.importorskip("torch", reason="needs the extra torch")
        torch.save(contents(), folder / "w.pth")

    return made


def tensor(*shape: int):
    import torch

    return torch.ones(shape)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def whole_model():
    import torch

    return torch.nn.Linear(2, 2)


def torchscript(folder: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "w.pth")


def safetensors_header(header: bytes | dict, data: bytes = b"") -> Change:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return file("w.safetensors", struct.pack("<Q", len(text)) + text + data)


def shortened(name: str) -> Change:
    """Writes a weight file and cuts off its last 1,200 bytes."""

    def made(folder: Path) -> None:
        if name.endswith(".pth"):
            pytest.importorskip("torch", reason="needs the extra torch")
        weights.write_arrays(folder / name, {"fc.weight": np.ones((9, 99), np.float32)})
        cut(name, -1200)(folder)

    return made


def zip_bomb(folder: Path) -> None:
    """Writes an archive that claims to unpack to 24 GB."""
    with zipfile.ZipFile(folder / "w.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "abcdef":
            archive.writestr(f"{name}.npy", bytes(10**6))
    data = (folder / "w.npz").read_bytes()
    (folder / "w.npz").write_bytes(data.replace(struct.pack("<I", 10**6), struct.pack("<I", 4 * 10**9)))


def run_folder(
    metrics: bytes = b"", config: bytes = b'{"input": {"arch": "cnn"}, "data": {"title": "MNIST"}}'
) -> Change:
    return inside("run", file("metrics.jsonl", metrics), file("config.json", config))


def for_classify(*names_and_data: tuple[str, bytes]) -> Change:
    """Creates w.npz and the named files."""
    return changed(npz(), *(file(name, data) for name, data in names_and_data))


def noisy_digits(seed: int, train: int = 20, test: int = 5) -> Change:
    """Creates digits/ with MNIST's four files and random pictures, no two of them equal."""

    def made(folder: Path) -> None:
        write_mnist(folder / "digits", train=train, test=test)
        for split, count in (("train", train), ("test", test)):
            (folder / "digits" / MNIST_FILES[split][0]).write_bytes(idx_bytes(noise(count, 28, 28, seed=[seed, count])))

    return made


@functools.cache
def trained() -> Path:
    """A folder with digits/ and run/, a run of five steps whose checkpoint is run/checkpoints/5."""
    from experiments import mnist

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    noisy_digits(seed=0)(folder)
    arguments = ["--model", "cnn", "--epochs", "1", "--batch-size", "4", "--framework", "jax"]
    assert mnist.main([*arguments, "--data", str(folder / "digits"), "--out", str(folder / "run")]) == 0
    return folder


def stopped_run(*changes: Change) -> Change:
    """Creates digits/ and a run on them that can be resumed, then changes them."""
    return changed(lambda folder: shutil.copytree(trained(), folder, dirs_exist_ok=True), *changes)


def foreign_checkpoint(folder: Path) -> None:
    """Saves a later checkpoint, of another network."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(9, {"weight": np.ones(3)}, {})
    checkpoints.close()


def foreign_facts(folder: Path) -> None:
    """Saves a later checkpoint with the same arrays but another program's facts."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(6, checkpoints.read(5)[0], {"name": "mine"})
    checkpoints.close()
