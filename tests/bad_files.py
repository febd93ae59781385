"""Files and folders with their mistakes, for the cases of bad_inputs.py: what makes them in a folder."""

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
from idx_files import idx_bytes, write_mnist
from picture_folders import encoded, noise, png_file, save_annotations
from PIL import Image

from experiments.data.digits import FILES as MNIST_FILES
from jax_resnet import resnet, weights
from jax_resnet.checkpoint import Checkpoints

Make = Callable[[Path], object]

# Pictures of cars.


def png(path: Path, size: tuple[int, int] = (40, 40)) -> None:
    """Noise, the same for the same path below its class folder."""
    path.write_bytes(encoded(noise(*size, 3, seed=list(os.fsencode(path.name)))))


def cars_by_class(folder: Path) -> Path:
    """cars/, two classes of two pictures in train and in test."""
    for split in ("train", "test"):
        for name in ("Audi", "BMW"):
            directory = folder / "cars" / split / name
            directory.mkdir(parents=True)
            for number in range(2):
                png(directory / f"{number}.png")
    return folder / "cars"


BAD = "train/Audi/bad.jpg"


def bad_picture(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """cars/ with one more picture, and bad.jpg, the same file; beside them weights of a network for three channels."""

    def made(folder: Path) -> None:
        make(cars_by_class(folder) / BAD)

    return made


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


NOISE = Image.fromarray(noise(64, 64, 3))


def png_bomb() -> bytes:
    """20,000x20,000 pixels in some kilobytes."""
    return png_file(20_000, b"\1\0\0\0\0", bytes(20_000 // 8 + 1) * 200)


def jpeg_bomb() -> bytes:
    """A small JPEG whose header says 65,500x65,500."""
    data = bytearray(encoded(NOISE, "JPEG"))
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def sparse_file(path: Path) -> None:
    """5 GB by its size, nothing on the disk."""
    with path.open("wb") as file:
        file.truncate(5 * 10**9)


def devkit(meta: dict | bytes | None = None, annotations: dict | bytes | None = None, **changes):
    """cars/ in the original layout; `changes` are of the train annotations' fields, the rest replaces a file."""

    def made(folder: Path) -> None:
        root = folder / "cars"
        for split, file in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
            (root / f"cars_{split}").mkdir(parents=True)
            rows = []
            for number in range(2):
                png(root / f"cars_{split}" / f"{number}.png")
                row = dict(bbox_x1=5, bbox_y1=5, bbox_x2=30, bbox_y2=30, fname=f"{number}.png") | {"class": number + 1}
                rows.append(row | (changes if split == "train" else {}))
            (root / "devkit").mkdir(exist_ok=True)
            save_annotations(root / "devkit" / file, [{k: v for k, v in row.items() if v is not None} for row in rows])
        write_mat(root / "devkit" / "cars_meta.mat", {"class_names": np.array([["Audi", "BMW"]], object)})
        for name, value in (("cars_meta.mat", meta), ("cars_train_annos.mat", annotations)):
            if value is not None:
                write_mat(root / "devkit" / name, value)

    return made


def write_mat(path: Path, value: dict | bytes) -> None:
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        scipy.io.savemat(path, value)


def by_class_but(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(cars_by_class(folder))


def remove(root: Path, *names: str) -> None:
    for name in names:
        for path in sorted((root / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (root / name).rmdir()


def without_class_folders(root: Path) -> None:
    remove(root, "test")
    (root / "test").mkdir()
    png(root / "test" / "1.png")


def without_pictures(root: Path) -> None:
    for path in root.glob("test/*/*.png"):
        path.unlink()


def locked(*names: str) -> Callable[[Path], object]:
    """A change of cars/: nobody may read these."""

    def change(root: Path) -> None:
        for name in names:
            (root / name).chmod(0)

    return change


def idx(*shape: int, value: int = 0) -> bytes:
    """An idx file of bytes that are all the same."""
    return idx_bytes(np.full(shape, value))


def digits(**changes: bytes | None) -> Callable[[Path], object]:
    """digits/ with MNIST's four files, 20 digits to train and 5 to test on; None leaves one out."""

    def made(folder: Path) -> None:
        write_mnist(folder / "digits", test=5)
        for kind, data in changes.items():
            split, _, content = kind.partition("_")
            path = folder / "digits" / MNIST_FILES[split][content == "labels"]
            path.unlink() if data is None else path.write_bytes(data)

    return made


@functools.cache
def network(in_channels: int = 3) -> dict[str, np.ndarray]:
    """The arrays of a ResNet-18 for 5 classes, all zeros but the variances, in float16 since that is short."""
    config = resnet.resnet18(num_classes=5, in_channels=in_channels)
    shapes = jax.eval_shape(functools.partial(resnet.init, config), jax.random.key(0))
    arrays = weights.to_torch(*jax.tree.map(lambda spec: np.zeros(spec.shape, np.float16), shapes))
    return {name: array + 1 if name.endswith("running_var") else array for name, array in arrays.items()}


def npz(name: str = "w.npz", change: Callable[[dict], dict] = lambda arrays: arrays) -> Callable[[Path], object]:
    """A network's weights after a change."""
    return lambda folder: np.savez(folder / name, **change(network()))


def trained_network(**layers: object) -> dict[str, object]:
    """The same in PyTorch, with other weights in some layers."""
    import torch

    changes = {f"{name}.weight": value for name, value in layers.items()}
    return {name: torch.tensor(array) for name, array in network().items()} | changes


def without(name: str) -> Callable[[dict], dict]:
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


def with_metadata(**facts: str) -> Callable[[Path], object]:
    return lambda folder: weights.write_arrays(folder / "w.safetensors", network(), metadata=facts)


def file(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def pth(contents: Callable[[], object]) -> Callable[[Path], object]:
    """w.pth as PyTorch writes it."""

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


def safetensors_header(header: bytes | dict, data: bytes = b"") -> Callable[[Path], object]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return file("w.safetensors", struct.pack("<Q", len(text)) + text + data)


def cut(name: str) -> Callable[[Path], object]:
    """A weight file without its last third."""

    def made(folder: Path) -> None:
        if name.endswith(".pth"):
            pytest.importorskip("torch", reason="needs the extra torch")
        weights.write_arrays(folder / name, {"fc.weight": np.ones((9, 99), np.float32)})
        (folder / name).write_bytes((folder / name).read_bytes()[:-1200])

    return made


def zip_bomb(folder: Path) -> None:
    """An archive that says it unpacks to 20 GB."""
    with zipfile.ZipFile(folder / "w.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "abcdef":
            archive.writestr(f"{name}.npy", bytes(10**6))
    data = (folder / "w.npz").read_bytes()
    (folder / "w.npz").write_bytes(data.replace(struct.pack("<I", 10**6), struct.pack("<I", 4 * 10**9)))


def run_folder(metrics: bytes = b"", config: bytes = b'{"input": {"arch": "cnn"}, "data": {"title": "MNIST"}}'):
    def made(folder: Path) -> None:
        (folder / "run").mkdir()
        (folder / "run" / "metrics.jsonl").write_bytes(metrics)
        (folder / "run" / "config.json").write_bytes(config)

    return made


def for_classify(*names_and_data: tuple[str, bytes]) -> Callable[[Path], object]:
    """Weights and pictures."""

    def made(folder: Path) -> None:
        npz()(folder)
        for name, data in names_and_data:
            (folder / name).write_bytes(data)

    return made


def noisy_digits(folder: Path, seed: int) -> None:
    """digits/ with MNIST's four files, none of its pictures like another."""
    write_mnist(folder / "digits", test=5)
    for split, count in (("train", 20), ("test", 5)):
        (folder / "digits" / MNIST_FILES[split][0]).write_bytes(idx_bytes(noise(count, 28, 28, seed=[seed, count])))


def other_digits(folder: Path) -> None:
    noisy_digits(folder, seed=1)


@functools.cache
def trained() -> Path:
    """A folder with digits/ and run/, of five steps, whose checkpoint is run/checkpoints/5."""
    from experiments import mnist

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    noisy_digits(folder, seed=0)
    arguments = ["--model", "cnn", "--epochs", "1", "--batch-size", "4", "--framework", "jax"]
    assert mnist.main([*arguments, "--data", str(folder / "digits"), "--out", str(folder / "run")]) == 0
    return folder


def stopped_run(change: Callable[[Path], object] = lambda folder: None) -> Callable[[Path], object]:
    """digits/ and a run on them to go on with, changed."""

    def made(folder: Path) -> None:
        shutil.copytree(trained(), folder, dirs_exist_ok=True)
        change(folder)

    return made


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign_checkpoint(folder: Path) -> None:
    """Of another network, and later."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(9, {"weight": np.ones(3)}, {})
    checkpoints.close()


def orbax_checkpoint(path: Path) -> None:
    """As earlier versions wrote them."""
    path.mkdir()
    (path / "_CHECKPOINT_METADATA").touch()


def foreign_facts(folder: Path) -> None:
    """The same arrays, with what another program says of them."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(6, checkpoints.read(5)[0], {"name": "mine"})
    checkpoints.close()


def file_for_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"of mine")
