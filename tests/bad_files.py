"""Creates the files and folders that the rows of docs/bad-input.md need, with their mistakes."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import jax
import numpy as np
import pytest
import scipy.io
from folder_changes import (
    Change,
    a_file,
    a_folder,
    a_picture,
    a_pipe,
    changed,
    cut,
    inside,
    linked,
    locked,
    moved,
    removed,
)
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


FACTS = {"arch": '"resnet18"', "class_names": '["a", "b", "c", "d", "e"]', "image_size": "[64, 64]", "grey": "false"}
FACTS |= {"mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]"}
RESNEXT = {  # arrays of a block with 32 groups
    "layer1.0.conv2.weight": np.zeros((128, 4, 3, 3), np.float16),
    "layer1.0.conv3.weight": np.zeros((256, 128, 1, 1), np.float16),
}


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


def single_array(folder: Path) -> None:
    np.save(folder / "w.npy", np.ones(3))
    (folder / "w.npy").rename(folder / "w.npz")


def zip_bomb(folder: Path) -> None:
    """Writes an archive that claims to unpack to 24 GB."""
    with ZipFile(folder / "w.npz", "w", ZIP_DEFLATED) as archive:
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


# What makes the files of a row of docs/bad-input.md, by the program and the input; the other rows need no files.
MAKERS: dict[str, dict[str, Change]] = {
    "cars": {
        "a file in place of a folder": file("notes.txt", b"of mine"),
        "a folder inside a file": file("notes.txt", b"of mine"),
        "an earlier run": run_folder(),
        "a broken link in place of a folder": linked("run", "nowhere"),
        "a read-only folder": a_folder("locked", mode=0o555),
        "an archive": file("cars", b"PK\3\4"),
        "a pipe": a_pipe("cars"),
        "an empty folder": a_folder("cars"),
        "classes without splits": a_picture("cars/Audi/0.png", "cars/BMW/0.png"),
        "labels in a table": a_file("cars/labels.csv"),
        "a folder name with two splits": cars(moved("test", "train_test")),
        "two folders for one split": cars(a_picture("training/Audi/0.png")),
        "both splits in a folder called training_data": a_picture(
            *(f"cars/training_data/{split}/{name}/0.png" for split in ("train", "test") for name in ("Audi", "BMW"))
        ),
        "pictures one folder too deep": cars(moved("train/BMW", "x"), moved("x", "train/BMW/new")),
        "a folder that links to itself": linked("cars/data", "."),
        "no test pictures": cars(removed("test")),
        "train/ links to itself": cars(removed("train"), linked("train", "train")),
        "pictures without classes": cars(removed("test"), a_picture("test/1.png")),
        "class folders without pictures": cars(removed(*NAMES[4:])),
        "a class that links to itself": cars(linked("train/VW", "VW")),
        "a locked folder": cars(locked("train")),
        "a locked class": cars(locked("train/BMW")),
        "no devkit": changed(devkit(), removed("cars/devkit")),
        "a web page in place of a .mat": devkit(meta=b"<html>404 Not Found</html>"),
        "an empty .mat": devkit(meta=b""),
        "a .mat of MATLAB 7.3": devkit(meta=b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM\x89HDF\r\n\x1a\n" + bytes(99)),
        "a .mat of zeros": devkit(meta=bytes(10_000)),
        "another .mat": devkit(meta={"x": 1}),
        "numbers in place of class names": devkit(meta={"class_names": np.arange(6.0).reshape(2, 3)}),
        "other annotations": devkit(bbox_x1=None, bbox_y1=None, bbox_x2=None, bbox_y2=None, fname=None),
        "a box of vectors": devkit(bbox_x1=np.arange(3)),
        "a box with a NaN": devkit(bbox_y2=np.nan),
        "no classes": devkit(**{"class": None}),
        "an unknown class": devkit(**{"class": 4}),
        "annotations of other pictures": devkit(fname="../0.png"),
        "annotations of missing pictures": changed(devkit(), removed("cars/cars_train/00002.png")),
        "boxes of other pictures": devkit(bbox_x2=99),
        "a pointer of git-lfs in place of parquet": a_file(
            "cars/train.parquet", "cars/test.parquet", content=b"version"
        ),
        "a pipe in place of parquet": a_pipe("cars/train.parquet", "cars/test.parquet"),
        "an empty file": bad_picture(b""),
        "text": bad_picture(b"a picture of a car"),
        "half of a JPEG": bad_picture(encoded(NOISE, "JPEG")[:-1500]),
        "half of a PNG": bad_picture(encoded(NOISE, "PNG")[:-5000]),
        "a JPEG's first bytes": bad_picture(encoded(NOISE, "JPEG")[:20]),
        "a PNG of 20,000x20,000 pixels": bad_picture(png_bomb()),
        "a JPEG that claims 65,500x65,500 pixels": bad_picture(jpeg_bomb()),
        "an endless PostScript program": bad_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n"),
        "negative pixels": bad_picture(encoded(Image.new("F", (8, 8), -0.5), "TIFF")),
        "a file of 5 GB": cars(sparse_file),
        "a broken link": cars(linked(BAD, "nowhere")),
        "a link to itself": cars(linked(BAD, "bad.jpg")),
        "a pipe in place of a picture": cars(a_pipe(BAD)),
        "a link to an endless device": cars(linked(BAD, "/dev/zero")),
        "a locked picture": cars(a_picture(BAD), locked(BAD)),
        "a photograph of an iPhone": bad_picture(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        "no readable picture": cars(a_file(*NAMES[4:], content=b"")),
        "a pipe to start from": changed(cars(), a_pipe("w.npz")),
        "another network to start from": changed(cars(), npz()),
        "a vector for a kernel": changed(cars(), npz(change=lambda a: a | {"conv1.weight": np.ones(3)})),
        "a number for a matrix": changed(cars(), npz(change=lambda a: a | {"fc.weight": 1.0, "fc.bias": np.zeros(2)})),
    },
    "mnist": {
        "more pictures than the data have": digits(),
        "a batch larger than the data": digits(),
        "more devices than there are": digits(),
        "a file in place of a folder": file("digits", b""),
        "a missing file": digits(test_labels=None),
        "an empty file": digits(train_images=b""),
        "labels in place of pictures": digits(train_images=idx(20)),
        "half a file": digits(train_images=idx(20, 28, 28)[:8016]),
        "a locked file": changed(digits(), locked("digits/train-images-idx3-ubyte")),
        "half of a .gz": digits(train_images=b"\x1f\x8b\x08" + bytes(20)),
        "pictures of another size": digits(train_images=idx(20, 32, 32)),
        "a label above 9": digits(train_labels=idx(20, value=10)),
        "fewer labels than pictures": digits(train_labels=idx(19)),
        "another seed": stopped_run(),
        "another length and rate": stopped_run(),
        "another precision": stopped_run(),
        "other pictures under the same settings": stopped_run(noisy_digits(seed=1)),
        "averages that the run does not have": stopped_run(),
        "half a config.json": stopped_run(cut("run/config.json")),
        "another program's config.json": stopped_run(file("run/config.json", b'["of", "mine"]')),
        "shortened metrics": stopped_run(cut("run/metrics.jsonl")),
        "removed metrics": stopped_run(removed("run/metrics.jsonl")),
        "a checkpoint of another network": stopped_run(lambda folder: foreign_checkpoint(folder / "run/checkpoints")),
        "a checkpoint of another program": stopped_run(lambda folder: foreign_facts(folder / "run/checkpoints")),
        "damaged checkpoints only": stopped_run(cut("run/checkpoints/5/record.json")),
        "damaged arrays": stopped_run(cut("run/checkpoints/5/state.safetensors")),
        "no config.json": stopped_run(removed("run/config.json")),
        "checkpoints of an earlier version": stopped_run(a_file("run/checkpoints/9/_CHECKPOINT_METADATA")),
        "a file in place of the checkpoints": stopped_run(
            removed("run/checkpoints"), file("run/checkpoints", b"of mine")
        ),
    },
    "compare": {
        "half a run's metrics": run_folder(metrics=b'{"epoch": 1.0, "st\n'),
        "another program's metrics": run_folder(metrics=b'{"loss": 1.0}\n'),
        "another program's config.json": run_folder(config=b"{}"),
        "a folder in place of a picture": run_folder(),
    },
    "convert": {
        "an existing file": file("old.npz", b"of mine"),
        "a folder in place of a weight file": a_folder("out.npz"),
        "a read-only folder": a_folder("locked", mode=0o555),
        "another format": file("w.onnx", b"\x08\x07\x12"),
        "a folder": a_folder("w.npz"),
        "a link to itself": linked("w.npz", "w.npz"),
        "a pipe": a_pipe("w.npz"),
        "a link to an endless device": linked("w.pth", "/dev/zero"),
        "a locked file": changed(npz(), locked("w.npz")),
        "an empty .npz": file("w.npz", b""),
        "an empty .pth": file("w.pth", b""),
        "an empty .safetensors": file("w.safetensors", b""),
        "half of a .npz": shortened("w.npz"),
        "half of a .pth": shortened("w.pth"),
        "half of a .safetensors": shortened("w.safetensors"),
        "text": file("w.npz", b"not\nfound"),
        "a web page": file("w.pth", b"<!DOCTYPE html>"),
        "a pointer of git-lfs": file("w.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "zeros": file("w.pth", bytes(5000)),
        "noise in a .npz": file("w.npz", np.random.default_rng(0).bytes(5000)),
        "noise in a .pth": file("w.pth", np.random.default_rng(0).bytes(5000)),
        "a single array": single_array,
        "Python objects": npz(change=lambda arrays: {"fc.weight": np.array([{}], object)}),
        "an archive of something else": lambda folder: ZipFile(folder / "w.npz", "w").writestr("readme.txt", "hello"),
        "a zip bomb": zip_bomb,
        "a tensor of 1 number that claims 512 billion": pth(lambda: trained_network(fc=tensor(1).expand(10**9, 512))),
        "a pickle that runs code": pth(lambda: {"fc.weight": RunsCode()}),
        "a whole model": pth(whole_model),
        "TorchScript": torchscript,
        "a list": pth(lambda: [tensor(3)]),
        "numbers in place of names": pth(lambda: {0: tensor(3)}),
        "an optimizer's state alone": pth(lambda: {"state": {0: {"momentum_buffer": tensor(3)}}, "param_groups": []}),
        "a sparse tensor": pth(lambda: trained_network(fc=tensor(3, 3).to_sparse())),
        "several networks": pth(lambda: {"student": trained_network(), "teacher": trained_network()}),
        "bfloat16 to write to .npz": pth(lambda: {name: t.bfloat16() for name, t in trained_network().items()}),
        "an unknown entry": npz(),
        "a header longer than its file": file("w.safetensors", struct.pack("<Q", 2**60) + b"{}"),
        "a header that is not JSON": safetensors_header(b"{'a': 1}"),
        "an array beyond the file's end": safetensors_header(
            {"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, b"1234"
        ),
        "eight-bit floats": safetensors_header(
            {"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"12"
        ),
        "bfloat16 in .npz": npz(change=lambda arrays: arrays | {"fc.bias": np.zeros(5, "V2")}),
        "another kind of network": npz(change=lambda arrays: {"weight": np.ones(3)}),
        "a network without classes": npz(change=lambda arrays: arrays | {"fc.weight": np.ones((0, 512), np.float16)}),
        "another number of blocks": npz(
            change=lambda arrays: {name: a for name, a in arrays.items() if not name.startswith("layer4.1")}
        ),
        "a ResNeXt": npz(change=lambda arrays: arrays | RESNEXT),
        "a missing array": npz(change=without("bn1.bias")),
        "an unexpected array": npz(change=lambda a: a | {"extra": np.ones(3)}),
        "a kernel in another layout": npz(
            change=lambda a: a | {"layer1.0.conv1.weight": a["layer1.0.conv1.weight"].transpose(2, 3, 1, 0)}
        ),
        "values that are not numbers": npz(change=lambda a: a | {"fc.bias": np.full(5, np.nan, np.float16)}),
        "a negative variance": npz(change=lambda a: a | {"bn1.running_var": -a["bn1.running_var"]}),
        "whole numbers": npz(change=lambda a: a | {"fc.bias": np.ones(5, np.int8)}),
        "another network to convert": npz(),
        "a network that Keras does not have": npz(),
    },
    "study": {
        "a protocol that is not TOML": file("p.toml", b"about ="),
        "a protocol with an unknown setting": file(
            "p.toml", b'about = "?"\ncontestants = []\n[settings]\nlr = 1\n[final]\nseeds = [1]\nepochs = 1\n'
        ),
    },
    "report": {
        "a report without a study": a_folder("empty"),
        "a file in place of a folder": file("notes.txt", b"of mine"),
    },
    "classify": {
        "a size for a run's pictures": with_metadata(**FACTS),
        "an unknown version": lambda folder: pytest.importorskip("torchvision", reason="needs the extra torch"),
        "an unknown format to export": npz(),
        "no such file": for_classify(),
        "a folder": for_classify(),
        "several bad pictures": for_classify(("a.jpg", b""), ("b.png", b"hello"), ("c.jpg", jpeg_bomb())),
        "one bad picture of two, for a run's network": changed(with_metadata(**FACTS), a_picture("a.png")),
        "a name with a line break": for_classify(("a\nb\x1b[2J.jpg", b"")),
        "a picture one pixel high": for_classify(("a.png", encoded(Image.new("L", (60_000, 1)), "PNG"))),
        "colours of 16 bits that use 8": for_classify(
            ("a.png", png_file(8, b"\x10\2\0\0\0", (b"\0" + b"\0\xc8" * 24) * 8))
        ),
        "a pipe": changed(npz(), a_pipe("a.jpg")),
        "a locked picture": changed(npz(), a_picture("a.png"), locked("a.png")),
        "a run without weights": run_folder(),
        "a backbone to classify with": npz(
            change=lambda arrays: {name: a for name, a in arrays.items() if not name.startswith("fc.")}
        ),
        "a network with one output": npz(
            change=lambda arrays: arrays | {name: arrays[name][:1] for name in ("fc.weight", "fc.bias")}
        ),
        "a grey network without a preparation": lambda folder: np.savez(folder / "w.npz", **network(1)),
        "another network to classify with": npz(),
        "incomplete metadata of a run": with_metadata(**without("mean")(FACTS)),
        "metadata that are not JSON": with_metadata(**FACTS | {"arch": "resnet18"}),
        "metadata of another network": with_metadata(**FACTS | {"arch": '"resnet34"'}),
        "metadata of other classes": with_metadata(**FACTS | {"class_names": '["a", "b"]'}),
        "metadata of huge pictures": with_metadata(**FACTS | {"image_size": "[1000000, 64]"}),
        "metadata with a deviation of 0": with_metadata(**FACTS | {"std": "[0, 1, 1]"}),
    },
}
