"""jax_resnet.weight_files and unpickling: formats by content, data in pickles, and nothing is executed."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import functools
import io
import json
import os
import pathlib
import pickle
import struct
import tarfile
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from jax_resnet import unpickling, weight_files
from jax_resnet.checkpoint import Checkpoints

ARRAYS = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a.count": np.array(7, np.int64),
    "b.half": np.linspace(0, 1, 5).astype(np.float16),
    "b.double": np.array([np.pi]),
    "b.empty": np.zeros((0, 3), np.float32),
}
TENSORS = {name: torch.tensor(array) for name, array in ARRAYS.items()}


def read(path):
    """{name: array} of a file."""
    return {
        name: value.array() if isinstance(value, unpickling.Tensor) else value
        for name, value in weight_files.read_contents(path).arrays.items()
    }


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(found[name], array)
        assert found[name].flags.c_contiguous


def dump(protocol):
    return lambda path: path.write_bytes(pickle.dumps(ARRAYS, protocol))


STORAGES = {torch.float16: "Half", torch.float32: "Float", torch.float64: "Double", torch.int64: "Long"}


def write_tar(path):
    """Writes a file as PyTorch did in 2016: storages, then tensors, then a pickle that refers to them."""
    storages, tensors, keys = io.BytesIO(), io.BytesIO(), {}
    pickle.dump(len(TENSORS), storages, protocol=2)
    pickle.dump(len(TENSORS), tensors, protocol=2)
    for number, tensor in enumerate(TENSORS.values()):
        keys[id(tensor)] = 100 + number
        kind = getattr(torch, f"{STORAGES[tensor.dtype]}Storage")
        pickle.dump((number, "cpu", kind), storages, protocol=2)
        storages.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())
        pickle.dump((100 + number, number, torch.FloatTensor), tensors, protocol=2)
        tensors.write(struct.pack(f"<i4x{2 * tensor.ndim + 1}q", tensor.ndim, *tensor.shape, *tensor.stride(), 0))
    pickle.dump([], storages, protocol=2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return str(keys[id(thing)]) if isinstance(thing, torch.Tensor) else None

    Pickler(pickled := io.BytesIO(), protocol=2).dump(TENSORS)
    with tarfile.open(path, "w:") as archive:
        for name, data in (("storages", storages), ("tensors", tensors), ("pickle", pickled)):
            member = tarfile.TarInfo(name)
            member.size = len(data.getvalue())
            data.seek(0)
            archive.addfile(member, data)


def write_hdf5(path):
    h5py = pytest.importorskip("h5py", reason="needs the extra keras")
    with h5py.File(path, "w") as file:
        for name, array in ARRAYS.items():
            file[name.replace(".", "/")] = array


FORMATS = {
    "torch's zip": lambda path: torch.save(TENSORS, path),
    "before torch 1.6": lambda path: torch.save(TENSORS, path, _use_new_zipfile_serialization=False),
    "torch's tar of 2016": write_tar,
    "a pickle of tensors": lambda path: path.write_bytes(pickle.dumps(TENSORS, 2)),
    "a pickle of tensors, protocol 5": lambda path: path.write_bytes(pickle.dumps(TENSORS, 5)),
    **{f"a pickle of arrays, protocol {protocol}": dump(protocol) for protocol in range(6)},
    "npz": lambda path: np.savez(path.open("wb"), **ARRAYS),
    "compressed npz": lambda path: np.savez_compressed(path.open("wb"), **ARRAYS),
    "safetensors": lambda path: path.write_bytes(safetensors.numpy.save(ARRAYS)),
    "HDF5": write_hdf5,
}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "RESNET18.PTH", "w.safetensors", "w"])
@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_a_format_is_known_by_its_content(write, name, tmp_path):
    write(tmp_path / name)
    check_same(read(tmp_path / name), ARRAYS)


@pytest.mark.parametrize("zipped", [True, False])
def test_views_of_tensors(zipped, tmp_path):
    """Tensors are transposed, expanded, sliced, shared, channels_last, bfloat16, or a Parameter with attributes."""
    shared, parameter = torch.arange(12.0), torch.nn.Parameter(torch.ones(2))
    parameter.note = "x"
    tensors = {
        "t": torch.arange(6.0).reshape(2, 3).t(), "e": torch.ones(1).expand(3, 2), "s": shared.reshape(3, 4)[1:, 1:],
        "shared": shared, "p": parameter, "u": torch.tensor([1, 2], dtype=torch.uint16), "b": torch.tensor([True]),
        "c": torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    check_same(read(tmp_path / "a.pth"), {n: np.ascontiguousarray(t.detach().numpy()) for n, t in tensors.items()})
    torch.save({"a": torch.tensor([1.5, -2]).bfloat16()}, tmp_path / "b.pth", _use_new_zipfile_serialization=zipped)
    check_same(read(tmp_path / "b.pth"), {"a": np.array([1.5, -2], ml_dtypes.bfloat16)})


@pytest.mark.parametrize("zipped", [True, False])
def test_signs_that_torch_keeps_beside_the_numbers(zipped, tmp_path):
    """torch keeps a negative and a conjugate bit; a mark that does not fit is refused when the array is read."""
    numbers = torch.complex(torch.arange(3.0), torch.arange(3.0) + 1)
    tensors = {"negative": numbers.conj().imag, "conjugate": numbers.conj(), "both": numbers.conj().imag[1:]}
    assert [tensor.is_neg() for tensor in tensors.values()] == [True, False, True]
    for name, tensor in tensors.items():  # each on its own: torch refuses two types of one storage
        torch.save({name: tensor}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        check_same(read(tmp_path / "a.pth"), {name: tensor.resolve_neg().resolve_conj().numpy().copy()})
    storage = unpickling.Storage(np.dtype("f4"), bytes(4))
    for marks in ({"zero": True}, {"conj": True}):
        with pytest.raises(ValueError, match=rf"a marked \({next(iter(marks))}\) tensor"):
            unpickling._tensor(storage, 0, (1,), (1,), False, {}, marks).array()


def test_arrays_of_numpy_in_other_orders(tmp_path):
    arrays = {
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big-endian": np.arange(3, dtype=">f4"),
        "bfloat16": np.ones(3, ml_dtypes.bfloat16),
    }
    for protocol in (2, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays, protocol))
        check_same(read(tmp_path / "a.pkl"), arrays | {"big-endian": np.arange(3, dtype=np.float32),
                                                       "columns": np.arange(6.0).reshape(2, 3)})  # fmt: skip


DATA = {  # what training scripts put beside weights
    "a random state": np.random.RandomState(0).get_state(),
    "generators": [np.random.RandomState(0), np.random.default_rng(0)],
    "NumPy's": [np.float32, np.float64(1), np.int64(2), np.bool_(True), np.array(["a"]), np.array([{}, None], object)],
    "a command line": argparse.Namespace(data=pathlib.Path("/data"), lr=0.1, size=(3, 4)),
    "namespaces": types.SimpleNamespace(a=1),
    "collections": [collections.defaultdict(list, a=[1]), collections.deque([1], 3), collections.Counter("aab"),
                    collections.OrderedDict(a=1)],
    "dates": [datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC), datetime.timedelta(1), datetime.date(2024, 5, 1)],
    "torch's": [torch.__version__, torch.Size([2]), torch.device("cpu"), torch.float32, torch.Generator().get_state()],
    "unusual tensors": [torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
                        torch.ones(3).to(torch.float8_e4m3fn), torch.empty(3, device="meta")],
    "Python's": [{1, 2}, frozenset([1]), 1j, range(3), b"ab", bytearray(b"a"), slice(1), 10**30, None],
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_data_beside_the_weights_is_accepted(data, zipped, tmp_path):
    torch.save({"net": TENSORS, "data": data}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    arrays = weight_files.read_contents(tmp_path / "a.pth").arrays
    check_same({name: arrays[f"net.{name}"].array() for name in ARRAYS}, ARRAYS)


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Mine(dict):
    pass


REFUSED = {  # an object, and what its pickle asks for that is not data
    "a command": (Calls(os.system, "touch harmed"), r"posix\.system"),
    "eval": (Calls(eval, "open('harmed', 'w')"), r"\w+\.eval"),
    "getattr": (Calls(getattr, {}, "update"), r"\w+\.getattr"),
    "an import": (Calls(__import__, "this"), r"\w+\.__import__"),
    "a class of a library": (Mine(a=1), rf"{Mine.__module__}\.Mine"),
    "a whole model": (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    "a function of torch": (Calls(torch.load, "a"), r"torch\.serialization\.load"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(("thing", "wanted"), REFUSED.values(), ids=REFUSED)
def test_pickles_that_would_run_code_are_refused(thing, wanted, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"net": TENSORS, "x": thing}, "a.pth", _use_new_zipfile_serialization=zipped)
    pathlib.Path("a.pkl").write_bytes(pickle.dumps({"x": thing}))
    for name in ("a.pth", "a.pkl"):
        with pytest.raises(ValueError, match=rf"^{name} is refused: its pickle asks for {wanted}, .* state_dict"):
            weight_files.read_contents(pathlib.Path(name))
    assert sorted(os.listdir()) == ["a.pkl", "a.pth"]


def opcodes(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


ENCODE = b"c_codecs\nencode\n"


class Refused(Exception):
    """A ValueError with the file's name in it."""


def contents_of(path):
    try:
        return weight_files.read_contents(path).arrays
    except ValueError as error:
        if not str(error).startswith(f"{path} is "):
            raise
        raise Refused from error


HOSTILE = {  # pickles that no pickler writes: they call functions, claim huge sizes, or nest deeply
    "a memo of 4 billion": opcodes(b"}r\xff\xff\xff\xff"),
    "bytes without end": opcodes(b"\x8e" + struct.pack("<Q", 2**60)),
    "one text encoded often": opcodes(text(b"x" * 2**20), b"q\0]", (ENCODE + b"h\0\x85Ra") * 9),
    "a bytearray of 16 GB": opcodes(b"\x96" + struct.pack("<Q", 2**34)),
    "a state for a function": opcodes(ENCODE, b"}X\x01\x00\x00\x00aK\x01sb"),
    "a state for a class": opcodes(b"cargparse\nNamespace\n}X\x04\x00\x00\x00openK\x01sb"),
    "a call of a call": opcodes(ENCODE, text(b"a"), text(b"latin1"), b"\x86R)R"),
    "numbers outside": opcodes(b"K\x01Q"),
    "an extension": opcodes(b"\x82\x01"),
    "a deep nest": opcodes(b"]" * 5000, b"a" * 4999),
    "a dict in itself": opcodes(b"}q\0", text(b"a"), b"h\0s"),
    "lists of lists": pickle.dumps(functools.reduce(lambda inner, _: [inner] * 60, range(12), [])),
    "a tuple of tuples as a key": opcodes(b"}K\0", b"\x85q\0h\0\x86" * 40, b"K\1s"),
    "a dtype of lists of lists": opcodes(b"cnumpy\ndtype\n]q\0", *(b"]q%ch%ch%ce" % (0, 0, 0),), b"\x85R"),
    "a long name of many": pickle.dumps({"x" * 10**5: [0] * 10**5}),
    "doubled lists": opcodes(b"]q\0", *(bytes([0x5D, 0x71, i + 1, *[0x68, i, 0x61] * 2]) for i in range(60))),
}  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles(data, tmp_path):
    """Each is refused or read as holding nothing, and leaves the classes of `unpickling` and argparse unchanged."""
    (tmp_path / "a.pkl").write_bytes(data)
    before = {name: dict(vars(kind)) for name, kind in vars(unpickling).items() if isinstance(kind, type)}
    with contextlib.suppress(Refused):
        assert not contents_of(tmp_path / "a.pkl")
    assert {name: dict(vars(kind)) for name, kind in vars(unpickling).items() if isinstance(kind, type)} == before
    assert argparse.Namespace().__dict__ == {}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_damaged_files_are_an_error_or_whole(write, seed, tmp_path):
    """A file that is cut or has changed bytes raises a ValueError with its name, or gives arrays of numbers."""
    rng = np.random.default_rng(seed)
    path = tmp_path / "a"
    write(path)
    data = bytearray(path.read_bytes())
    for number in range(8):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged if number % 2 else data[: rng.integers(len(data))])
        with contextlib.suppress(Refused):
            for value in contents_of(path).values():
                with contextlib.suppress(ValueError):  # for example of a view that reaches out of its storage
                    assert isinstance(value.array() if isinstance(value, unpickling.Tensor) else value, np.ndarray)


def archive_of(*names):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "hello")

    return write


def tar_of(*names):
    def write(path):
        with tarfile.open(path, "w:") as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(name))

    return write


OTHERS = {
    "a tar archive": (tar_of("model.pth"), "is an archive of model.pth: unpack it and name a weight file from it"),
    "an empty archive": (archive_of(), "is not a readable weight file"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08"), "is not a readable weight file: it is compressed: gunzip"),
    "ONNX": (lambda path: path.write_bytes(b"\x08\x07\x12\x07pytorch"), "is not a readable weight file: its format"),
    "JSON": (lambda path: path.write_text('{"a": 1}'), "is not a readable weight file: it is text"),
    "JSON of a terabyte": (lambda path: (path.write_text("{"), os.truncate(path, 2**40)),
                           "is not a readable weight file: its format is not known"),
    "a shard that is missing": (lambda path: path.write_text('{"weight_map": {"a": "b.bin"}}'),
                                "names parts, of which one cannot be read: no weight file .*b.bin"),
    "shards elsewhere": (lambda path: path.write_text('{"weight_map": {"a": "../b.bin"}}'),
                         "is refused: it names a file in another folder"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "message"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_called_by_their_name(write, message, tmp_path):
    write(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth {message}"):
        weight_files.read_contents(tmp_path / "a.pth")


def test_hdf5_does_not_lead_out_of_the_file(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs the extra keras")
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["a"] = np.ones(3)
    (tmp_path / "raw").write_bytes(bytes(24))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["own"] = np.ones(2)
        file["link"] = h5py.ExternalLink("secret.h5", "a")
        file["loop"] = file["/"]
    assert {name.split(".")[-1] for name in read(tmp_path / "a.h5")} == {"own"}
    for name, make in {
        "outside": lambda file: file.create_dataset("x", (3,), "f8", external=[(str(tmp_path / "raw"), 0, 24)]),
        "virtual": lambda file: file.create_virtual_dataset("x", h5py.VirtualLayout((3,), "f8")),
    }.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            make(file)
        with pytest.raises(ValueError, match=r"is refused: its array x is in another file|not a readable weight file"):
            weight_files.read_contents(tmp_path / f"{name}.h5")


def test_folders(tmp_path):
    """Hugging Face folders hold one file or several; a run's last good checkpoint is read in torchvision's layout."""
    hub = tmp_path / "hub"
    hub.mkdir()
    with pytest.raises(ValueError, match=r"hub is a folder without model\.safetensors, weights\.safetensors or"):
        weight_files.read_contents(hub)
    (hub / "version_0").mkdir()
    (hub / "version_0" / "epoch=1.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"hub is a folder .*: name a weight file, such as .*version_0/epoch=1\.ckpt"):
        weight_files.read_contents(hub)
    for number, name in enumerate(ARRAYS):
        safetensors.numpy.save_file({name: ARRAYS[name]}, hub / f"model-{number}.safetensors")
    index = hub / "model.safetensors.index.json"
    parts = {name: f"model-{number}.safetensors" for number, name in enumerate(ARRAYS)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    check_same(read(hub), ARRAYS)
    check_same(read(index), ARRAYS)
    index.write_text(json.dumps({"weight_map": {"gone": "model-0.safetensors"}}))
    with pytest.raises(ValueError, match="names 1 arrays that its parts do not hold, such as gone"):
        read(index)
    safetensors.numpy.save_file(ARRAYS, hub / "model.safetensors")
    check_same(read(hub), ARRAYS)

    kernel, ones = np.arange(24.0).reshape(2, 3, 1, 4), np.ones(3)
    state = {"params": {"c": {"weight": kernel}}, "batch_stats": {"n": {"running_mean": ones}}, "opt_state": [kernel],
             "ema": {"params": {"c": {"weight": kernel + 1}}}}  # fmt: skip
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    for step in (3, 12):
        checkpoints.save(step, state | {"batch_stats": {"n": {"running_mean": ones * step}}}, {})
    checkpoints.close()
    ours = kernel.transpose(3, 2, 0, 1)
    expected = {"c.weight": ours, "n.running_mean": ones, "ema.c.weight": ours + 1}
    steps = {"run": 12, "run/checkpoints": 12, "run/checkpoints/3": 3, "run/checkpoints/3/state.safetensors": 3}
    for path, step in (steps | {"run/checkpoints/12": 12}).items():
        contents = weight_files.read_contents(tmp_path / path)
        assert contents.path == tmp_path / "run" / "checkpoints" / str(step)
        assert contents.notes == ()
        assert contents.arrays.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(contents.arrays[name], array * (step if "mean" in name else 1))
    file = tmp_path / "run/weights.safetensors"
    arrays = {name: np.ascontiguousarray(array) for name, array in contents.arrays.items() if "ema" not in name}
    for mean, newer in ((12, False), (3, True)):  # a run's file may be older than its last checkpoint
        safetensors.numpy.save_file(arrays | {"n.running_mean": ones * mean}, file)
        os.utime(file, (0, 0))
        note = f"weights.safetensors is older than checkpoint 12: for the newer weights, name {contents.path}"
        assert weight_files.read_contents(tmp_path / "run").notes == ((note,) if newer else ())
    file.unlink()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/metrics.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="begun is a run without weights"):
        weight_files.read_contents(tmp_path / "begun")
    (tmp_path / "run/checkpoints/12/record.json").write_bytes(b"")
    contents = weight_files.read_contents(tmp_path / "run")
    assert contents.path.name == "3"
    (note,) = contents.notes
    assert note.startswith(f"checkpoint 3 was read, because {tmp_path / 'run/checkpoints/12'} is damaged: ")
    with pytest.raises(ValueError, match="12 is damaged"):
        weight_files.read_contents(tmp_path / "run/checkpoints/12")


def test_a_safetensors_file_that_begins_like_a_pickle(tmp_path):
    """The file begins with its header's length, whose first byte may be 0x80, with which a pickle begins."""
    path = tmp_path / "a.safetensors"
    for padding in range(0, 512, 8):
        safetensors.numpy.save_file({"conv1.weight": np.ones((2, 3), np.float32)}, path, {"padding": padding * "x"})
        if path.read_bytes()[:1] == b"\x80":
            break
    assert path.read_bytes()[:1] == b"\x80"
    assert list(weight_files.read_contents(path).arrays) == ["conv1.weight"]
