"""experiments.convert keeps every bit, prints what it did, and leaves no file after an error."""

import argparse
import io
import itertools
import json
import os
import sys

import jax
import numpy as np
import pytest
import safetensors
import torch
import torchvision

import numpy_ref.resnet
import numpy_ref.weights
from experiments import convert
from experiments.classify import __main__ as classify
from jax_resnet import naming, resnet, weights
from jax_resnet.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def state_dict():
    """torchvision's untrained ResNet-18 for 5 classes, with all batch counts set to 7."""
    torch.manual_seed(0)
    state_dict = torchvision.models.resnet18(num_classes=5).state_dict()
    return {name: torch.full_like(array, 7) if array.ndim == 0 else array for name, array in state_dict.items()}


@pytest.fixture
def path(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "in.pth")
    return tmp_path / "in.pth"


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def in_type(dtype, state_dict):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state_dict.items()}


SUFFIXES = [".pth", ".safetensors", ".npz", ".pt", ".npz", ".pth"]


@pytest.mark.parametrize(
    ("dtype", "suffixes"),
    [(torch.float32, SUFFIXES), (torch.float16, SUFFIXES), (torch.bfloat16, [".pth", ".safetensors", ".pth"])],
)
def test_around_through_every_suffix(dtype, suffixes, state_dict, tmp_path, capsys):
    """Bits, types and batch counts survive all conversions, and torchvision loads the last file."""
    given = in_type(dtype, state_dict)
    torch.save(given, tmp_path / "0.pth")
    names = [f"{number}{suffix}" for number, suffix in enumerate(suffixes)]
    for source, target in itertools.pairwise(names):
        assert run(tmp_path / source, tmp_path / target) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed == [
            f"{tmp_path / source}, {convert.megabytes(tmp_path / source)}: resnet18, 5 classes, 3 channels; "
            f"11,179,077 parameters, 102 arrays of {str(dtype).removeprefix('torch.')}",
            f"{tmp_path / target}, {convert.megabytes(tmp_path / target)}: read back, the same bit for bit",
        ]
    assert sorted(os.listdir(tmp_path)) == names
    written = torch.load(tmp_path / names[-1], weights_only=True)
    assert written.keys() == given.keys()
    for name, value in given.items():
        assert written[name].dtype == value.dtype
        assert torch.equal(written[name], value), name
    torchvision.models.resnet18(num_classes=5).load_state_dict(written, strict=True)
    if dtype == torch.float32:
        params, _ = numpy_ref.weights.load(tmp_path / "4.npz", numpy_ref.resnet.resnet18(num_classes=5))
        np.testing.assert_array_equal(params["fc"]["weight"], given["fc.weight"].T)


def test_checkpoints_are_said_to_be_such(state_dict, tmp_path, capsys):
    """Prints which entry it reads and what it leaves out; reads channels_last tensors."""
    wrapped = {
        f"module.{name}": value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in state_dict.items()
    }
    average = {name: value + 1 for name, value in state_dict.items()}
    checkpoint = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": wrapped, "model_ema": average}
    torch.save(checkpoint, tmp_path / "in.pth")
    assert run(tmp_path / "in.pth", tmp_path / "out.safetensors") == 0
    assert capsys.readouterr().out.splitlines()[1:-1] == [
        "  found in 'state_dict.module'",
        "  left out: model_ema, epoch, args",
    ]
    assert run(tmp_path / "in.pth", tmp_path / "ema.npz", "--entry", "model_ema") == 0
    for file, expected in (("out.safetensors", state_dict), ("ema.npz", average)):
        arrays = weights.read_arrays(tmp_path / file)
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("suffix", [".PTH", ".NPZ", ".SafeTensors"])
def test_the_case_of_a_suffix_does_not_matter(suffix, path, state_dict):
    assert run(path, path.with_suffix(suffix)) == 0
    assert sorted(os.listdir(path.parent)) == sorted([path.name, f"in{suffix}"])
    assert weights.read_arrays(path.with_suffix(suffix)).keys() == state_dict.keys()
    if suffix != ".PTH":  # numpy_ref reads no pickles
        numpy_ref.weights.load(path.with_suffix(suffix), numpy_ref.resnet.resnet18(num_classes=5))


def test_batch_counts_are_added_for_torch(state_dict, tmp_path, capsys):
    """Files that are made from the new file keep the counts."""
    trees = weights.from_torch(state_dict)
    weights.save(tmp_path / "in.npz", *trees)
    assert run(tmp_path / "in.npz", tmp_path / "out.pth") == 0
    assert "  20 batch counts of 0 added, since torch expects them" in capsys.readouterr().out.splitlines()
    assert torch.load(tmp_path / "out.pth", weights_only=True)["bn1.num_batches_tracked"] == 0
    assert run(tmp_path / "out.pth", tmp_path / "back.npz") == 0
    assert weights.read_arrays(tmp_path / "back.npz").keys() == state_dict.keys()


def test_metadata_is_kept_where_the_format_has_it(state_dict, tmp_path, capsys):
    metadata = {"arch": '"resnet18"', "class_names": "[]"}
    weights.save(tmp_path / "in.safetensors", *weights.from_torch(state_dict), metadata=metadata)
    assert run(tmp_path / "in.safetensors", tmp_path / "out.safetensors") == 0
    assert weights.read_file(tmp_path / "out.safetensors").metadata == metadata
    assert "left out" not in capsys.readouterr().out
    assert run(tmp_path / "in.safetensors", tmp_path / "out.npz") == 0
    assert "  left out: metadata arch, metadata class_names" in capsys.readouterr().out.splitlines()


def test_names_and_layers_that_were_called_otherwise_are_said(state_dict, tmp_path, capsys):
    """Hugging Face's names become torchvision's, with a dense layer of another name or none."""
    theirs = {naming.HUGGING_FACE.theirs(name): value for name, value in state_dict.items()}
    theirs = {name if name.startswith("cl") else f"resnet.{name}": value for name, value in theirs.items()}
    torch.save(theirs, tmp_path / "in.bin")
    assert run(tmp_path / "in.bin", tmp_path / "out.pth") == 0
    assert capsys.readouterr().out.splitlines()[1:-1] == [
        "  found in 'resnet'",
        "  Hugging Face's names: converted to torchvision's",
        "  the source calls the dense layer 'classifier.1'",
    ]
    assert torch.load(tmp_path / "out.pth", weights_only=True).keys() == state_dict.keys()
    torch.save(without("fc", state_dict), tmp_path / "in.bin")
    assert run(tmp_path / "in.bin", tmp_path / "out.npz") == 0
    printed = capsys.readouterr().out
    assert "resnet18, no classes, 3 channels" in printed
    assert "the file holds the backbone alone" in printed
    assert weights.read_arrays(tmp_path / "out.npz").keys() == without("fc", state_dict).keys()


def test_hugging_faces_names_are_written(path, tmp_path, capsys):
    assert run(path, tmp_path / "model.safetensors", "--names", "huggingface") == 0
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # or transformers refuses it
        assert {"resnet.embedder.embedder.convolution.weight", "classifier.1.bias"} <= set(file.keys())
    assert "model.safetensors" in capsys.readouterr().out.splitlines()[-1]


def test_keras_names_are_written(tmp_path, capsys):
    """The network must have its strides where Keras has them."""
    config, rng = resnet.resnet50(num_classes=3, stride_in="conv1"), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: resnet.init(config, jax.random.key(0)))
    tree = jax.tree.map(lambda spec: rng.random(spec.shape, np.float32), shapes)
    weights.save(tmp_path / "in.safetensors", *tree, metadata={"stride_in": "conv1"})
    assert run(tmp_path / "in.safetensors", tmp_path / "out.h5") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith("the same bit for bit, except that variances are rounded, since Keras has another eps")
    assert run(tmp_path / "out.h5", tmp_path / "back.safetensors") == 0
    assert weights.read_file(tmp_path / "back.safetensors").metadata == {"stride_in": "conv1"}
    weights.save(tmp_path / "in.npz", *tree)
    assert run(tmp_path / "in.npz", tmp_path / "b.h5") == 2
    assert "Keras would compute something else" in capsys.readouterr().err
    assert not (tmp_path / "b.h5").exists()


def test_a_checkpoint_of_a_run_becomes_its_weight_file(tmp_path, capsys):
    """The metadata come from config.json; --entry selects the average."""
    params, batch_stats = resnet.init(resnet.resnet18(num_classes=3, in_channels=1), jax.random.key(0))
    average = {"params": jax.tree.map(lambda a: a + 1, params), "batch_stats": batch_stats}
    state = {"params": params, "batch_stats": batch_stats, "opt_state": {"mu": params}, "ema": average}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(5, state, {})
    checkpoints.close()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"input": {"arch": "resnet18", "grey": True}}))
    for target, source, arguments, expected in (
        ("last.safetensors", "run", [], params),
        ("5.safetensors", "run/checkpoints/5", [], params),
        ("ema.safetensors", "run/checkpoints/5", ["--entry", "ema"], average["params"]),
    ):
        assert run(tmp_path / source, tmp_path / target, *arguments) == 0
        file = weights.read_file(tmp_path / target)
        assert file.metadata == {"arch": '"resnet18"', "grey": "true"}
        np.testing.assert_array_equal(file.arrays["fc.bias"], expected["fc"]["bias"])
    assert "  left out: ema, opt_state" in capsys.readouterr().out
    (tmp_path / "run/checkpoints/7").mkdir()
    (tmp_path / "run/checkpoints/7/record.json").write_bytes(b"")
    assert run(tmp_path / "run", tmp_path / "older.npz") == 0
    noted = f"  checkpoint 5 was read, because {tmp_path / 'run/checkpoints/7'} is damaged: "
    assert noted in capsys.readouterr().out


def test_a_name_that_stdout_cannot_write(path, monkeypatch):
    """The file is written and the exit code is 0."""
    source = path.rename(path.parent / "w\u00e4ge.pth")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run(source, path.parent / "out.npz") == 0
    assert b"w\\xe4ge.pth" in stdout.buffer.getvalue()


def test_a_file_is_replaced_if_asked_to(state_dict, path):
    assert run(path, path, "--overwrite") == 0
    assert torch.load(path, weights_only=True).keys() == state_dict.keys()
    assert os.listdir(path.parent) == [path.name]


def without(part, state_dict):
    return {name: value for name, value in state_dict.items() if part not in name}


def test_another_eps_is_told_kept_and_never_ignored(tmp_path, capsys):
    config = resnet.resnet18(num_classes=5, batch_norm_eps=1e-3)
    given = tmp_path / "given.safetensors"
    weights.save(given, *resnet.init(config, jax.random.key(0)), config=config)
    assert run(given, tmp_path / "kept.safetensors") == 0
    assert "  BatchNorm's eps is 0.001: pass it as batch_norm_eps when you load it" in capsys.readouterr().out
    weights.load(tmp_path / "kept.safetensors", config)
    assert run(given, tmp_path / "kept.npz") == 0
    assert "metadata batch_norm_eps" in capsys.readouterr().out  # is left out
    assert classify.main([str(given), "--weights", str(given)]) == 2
    assert "was saved with batch_norm_eps=0.001: only jax_resnet can run it" in capsys.readouterr().err


DAMAGE = {  # changes to a written array that the check must detect
    "a bit": lambda array: np.nextafter(array, np.float32(9)),
    "a sign of zero": lambda array: np.where(array == 0, -array, array),
    "the type": lambda array: array.view(np.int32),
    "the shape": lambda array: array[None],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_was_written_is_read_back_and_compared(damage, path, monkeypatch, capsys):
    """bn1.bias is 0 in an untrained network, so a sign of zero can be damaged, too."""
    write = weights.write_arrays

    def write_damaged(path, arrays, **options):
        write(path, arrays | {"bn1.bias": damage(arrays["bn1.bias"])}, **options)

    monkeypatch.setattr(weights, "write_arrays", write_damaged)
    target = path.parent / "out.safetensors"
    assert run(path, target) == 2
    assert capsys.readouterr().err == f"error: {target} was not written: read back, 1 arrays differ: bn1.bias\n"
    assert os.listdir(path.parent) == [path.name]
