"""jax_resnet.weights: torchvision's names and layout, bit for bit, and one clear error for files that do not fit."""

import argparse
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import torchvision

import numpy_ref.resnet
import numpy_ref.weights
from jax_resnet import resnet, weights

CONFIG = resnet.resnet18(num_classes=5, in_channels=1)
COLOUR = resnet.resnet18(num_classes=5)
CUT_AT = (0, 10, 1000, -10)  # bytes: nothing, within the header, after it, at the very end

every_suffix = pytest.mark.parametrize("suffix", weights.SUFFIXES)


@pytest.fixture(scope="module")
def tree():
    return resnet.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def model():
    """torchvision's ResNet-18 after some training: no statistic, no BatchNorm weight and no count is its first one."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    for name, array in model.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            array.copy_(torch.full_like(array, 7) if array.ndim == 0 else torch.rand_like(array) + 0.5)
    return model


def same(ours, theirs):
    """The same names, dtypes and numbers."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def numpy_arrays(state_dict):
    return {name: tensor.detach().numpy() for name, tensor in state_dict.items()}


def state_dict_of(path):
    """A file as its users in PyTorch read it, without jax_resnet."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix == ".npz":
        with np.load(path) as file:
            return {name: torch.from_numpy(array) for name, array in file.items()}
    return torch.load(path, weights_only=True)


# There and back.


@every_suffix
def test_there_and_back(suffix, tree, tmp_path):
    path = tmp_path / f"weights{suffix}"
    weights.save(path, *tree)
    same(weights.load(path, CONFIG), tree)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_layout_is_torchvisions(tree):
    arrays = weights.to_torch(*tree)
    assert arrays["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert arrays["fc.weight"].shape == (5, 512)
    kernel = tree[0]["layer1"]["0"]["conv2"]["weight"]
    assert arrays["layer1.0.conv2.weight"][3, 2, 0, 1] == kernel[0, 1, 2, 3]
    same(weights.from_torch(arrays | {"bn1.num_batches_tracked": np.array(7)}), tree)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_names_and_shapes_are_torchvisions(name):
    """Of all five, nothing drawn; torch's batch counts aside."""
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in getattr(torchvision.models, name)().state_dict().items()}
    trees = jax.eval_shape(lambda: resnet.init(getattr(resnet, name)(), jax.random.key(0)))
    arrays = weights.to_torch(*jax.tree.map(lambda spec: np.broadcast_to(np.float32(0), spec.shape), trees))
    assert {key: array.shape for key, array in arrays.items()} == {
        key: shape for key, shape in expected.items() if not key.endswith("num_batches_tracked")
    }


@every_suffix
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_torchvision_loads_them(suffix, dtype, model, tmp_path):
    """torch -> tree -> file -> torch: load_state_dict, strict, and every bit of what came in."""
    given = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    params, batch_stats = weights.from_torch(given)
    weights.save(tmp_path / f"weights{suffix}", params, batch_stats)
    copy = torchvision.models.resnet18(num_classes=5).to(dtype)
    copy.load_state_dict(state_dict_of(tmp_path / f"weights{suffix}"), strict=True)
    for name, value in copy.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert value.dtype == dtype
            assert torch.equal(value, given[name]), name
    same(weights.load(tmp_path / f"weights{suffix}", COLOUR), (params, batch_stats))


def test_pth_files_hold_all_that_torch_has(model, tmp_path):
    """Names and types of torchvision's own state_dict, batch counts (0) included. safetensors' strict loader is content
    without them."""
    tree = weights.from_torch(model.state_dict())
    weights.save(tmp_path / "a.pth", *tree)
    written = torch.load(tmp_path / "a.pth", weights_only=True)
    assert type(written) is dict
    assert {k: (v.dtype, v.shape) for k, v in written.items()} == {
        k: (v.dtype, v.shape) for k, v in model.state_dict().items()
    }
    assert written["bn1.num_batches_tracked"] == 0
    weights.save(tmp_path / "a.safetensors", *tree)
    safetensors.torch.load_model(torchvision.models.resnet18(num_classes=5), tmp_path / "a.safetensors", strict=True)


@every_suffix
def test_bfloat16(suffix, tree, tmp_path):
    """Kept where the format has it; .npz would hold raw bytes of no type, so it is refused and writes nothing."""
    brain = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        with pytest.raises(ValueError, match=r"\.npz files cannot hold bfloat16, got .*a\.npz: take"):
            weights.save(path, *brain)
        assert not os.listdir(tmp_path)
        return
    weights.save(path, *brain)
    assert state_dict_of(path)["conv1.weight"].dtype == torch.bfloat16
    same(weights.load(path, CONFIG), brain)
    same(weights.from_torch(state_dict_of(path)), brain)


def test_float16_stays_float16(tree, tmp_path):
    half = jax.tree.map(lambda a: a.astype(jnp.float16), tree)
    weights.save(tmp_path / "a.safetensors", *half)
    loaded = weights.load(tmp_path / "a.safetensors", CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float16)}
    same(loaded, half)


def test_metadata(tree, tmp_path):
    weights.save(tmp_path / "a.safetensors", *tree, metadata={"class_names": "[]"})
    assert weights.read_metadata(tmp_path / "a.safetensors") == {"class_names": "[]"}
    for suffix in (".npz", ".pth"):
        with pytest.raises(ValueError, match=r"only \.safetensors files hold metadata"):
            weights.save(tmp_path / f"a{suffix}", *tree, metadata={"a": "b"})


@every_suffix
def test_arrays_in_another_order_of_memory(suffix, model, tmp_path):
    """safetensors writes memory as it lies; torch's channels_last must not come out as other numbers."""
    strided = {name: np.asfortranarray(value) for name, value in numpy_arrays(model.state_dict()).items()}
    weights.write_arrays(tmp_path / f"a{suffix}", strided)
    read = weights.read_arrays(tmp_path / f"a{suffix}")
    assert read.keys() == strided.keys()
    for name, array in strided.items():
        assert read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


# The styles that people have.


def prefixed(prefix, state_dict):
    return {prefix + name: value for name, value in state_dict.items()}


def distributed(model):
    return torch.nn.DataParallel(model).state_dict()


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


OTHER = {"epoch": 3, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}}
STYLES = {  # what a file holds, and the entry, the prefix and the names left out that are found there
    "state_dict": (lambda model: model.state_dict(), None, "", ()),
    "parameters": (lambda model: dict(model.named_parameters()) | dict(model.named_buffers()), None, "", ()),
    "channels_last": (
        lambda model: {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
                       for k, v in model.state_dict().items()},
        None, "", (),
    ),
    "DataParallel": (distributed, None, "module.", ()),
    "torch.compile": (lambda model: torch.compile(model).state_dict(), None, "_orig_mod.", ()),
    "torch.compile in DataParallel": (lambda model: distributed(torch.compile(model)), None, "module._orig_mod.", ()),
    "examples/imagenet": (
        lambda model: OTHER | {"arch": "resnet18", "state_dict": distributed(model), "best_acc1": torch.tensor(7.0)},
        "state_dict", "module.", ("epoch", "optimizer", "arch", "best_acc1"),
    ),
    "torchvision's references": (
        lambda model: OTHER | {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1), "scaler": {"scale": 2},
                               "model_ema": averaged(model)},
        "model", "", ("epoch", "optimizer", "args", "scaler", "model_ema"),
    ),
    "timm": (
        lambda model: {"arch": "resnet18", "state_dict_ema": prefixed("", model.state_dict()), "version": 2,
                       "state_dict": model.state_dict(), "metric": 80.1, "best_acc": np.float64(80.1)},
        "state_dict", "", ("arch", "state_dict_ema", "version", "metric", "best_acc"),
    ),
    "Lightning": (
        lambda model: OTHER | {"state_dict": prefixed("model.", model.state_dict()), "hyper_parameters": {"lr": 0.1}},
        "state_dict", "model.", ("epoch", "optimizer", "hyper_parameters"),
    ),
    "tutorials": (
        lambda model: OTHER | {"model_state_dict": model.state_dict()}, "model_state_dict", "", ("epoch", "optimizer"),
    ),
    "an entry of any name": (lambda model: {"net": distributed(model), "acc": 93.1}, "net", "module.", ("acc",)),
    "an average alone": (lambda model: {"model_ema": averaged(model)}, "model_ema", "module.", ("n_averaged",)),
}  # fmt: skip


@pytest.mark.parametrize(("contents", "entry", "prefix", "left_out"), STYLES.values(), ids=STYLES)
def test_styles_of_checkpoints(contents, entry, prefix, left_out, model, tmp_path):
    torch.save(contents(model), tmp_path / "a.pth")
    file = weights.read_file(tmp_path / "a.pth")
    assert (file.entry, file.prefix, file.left_out) == (entry, prefix, left_out)
    assert file.arrays.keys() == model.state_dict().keys()
    assert file.arrays["bn1.num_batches_tracked"] == 7
    same(weights.load(tmp_path / "a.pth", COLOUR), weights.from_torch(model.state_dict()))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".pth.tar"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_formats_of_torch(suffix, zipped, model, tmp_path):
    torch.save(model.state_dict(), tmp_path / f"a{suffix}", _use_new_zipfile_serialization=zipped)
    same(weights.load(tmp_path / f"a{suffix}", COLOUR), weights.from_torch(model.state_dict()))


@every_suffix
def test_prefixes_are_stripped_where_every_name_has_them(suffix, model, tmp_path):
    path = tmp_path / f"a{suffix}"
    arrays = prefixed("module.", numpy_arrays(model.state_dict()))
    weights.write_arrays(path, arrays)
    same(weights.load(path, COLOUR), weights.from_torch(model.state_dict()))
    weights.write_arrays(path, arrays | {"head.bias": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"unexpected: module\.conv1\.weight \(64, 3, 7, 7\)"):
        weights.load(path, COLOUR)


def test_the_entry_of_a_checkpoint_can_be_named(model, tmp_path):
    average = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": average, "epoch": 3}, tmp_path / "a.pth")
    file = weights.read_file(tmp_path / "a.pth", "model_ema")
    assert (file.entry, file.left_out) == ("model_ema", ("model", "epoch"))
    np.testing.assert_array_equal(file.arrays["fc.bias"], average["fc.bias"])
    for entry in ("epoch", "none"):
        with pytest.raises(ValueError, match=f"no entry '{entry}' with arrays: model, model_ema has some"):
            weights.read_file(tmp_path / "a.pth", entry)
    torch.save({"student": model.state_dict(), "teacher": average}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="arrays in several entries, student, teacher: name one"):
        weights.read_file(tmp_path / "a.pth")


def test_new_head_and_grey_stem(tmp_path):
    source = resnet.resnet18(num_classes=10, in_channels=3)
    params, batch_stats = resnet.init(source, jax.random.key(1))
    weights.save(tmp_path / "a.npz", params, batch_stats)
    with pytest.raises(ValueError, match=r"conv1.weight: expected \(64, 1, 7, 7\)") as error:
        weights.load(tmp_path / "a.npz", CONFIG)
    assert str(error.value).count('head="new"') == 2  # fc.weight and fc.bias
    assert str(error.value).count('stem="grey"') == 1
    loaded, _ = weights.load(tmp_path / "a.npz", CONFIG, head="new", stem="grey", key=jax.random.key(2))
    kernel = params["conv1"]["weight"]
    np.testing.assert_allclose(loaded["conv1"]["weight"], kernel.sum(2, keepdims=True), rtol=1e-5, atol=1e-7)
    assert loaded["fc"]["weight"].shape == (512, 5)
    np.testing.assert_array_equal(loaded["layer4"]["1"]["bn2"]["weight"], params["layer4"]["1"]["bn2"]["weight"])
    with pytest.raises(ValueError, match="pass key"):
        weights.load(tmp_path / "a.npz", CONFIG, head="new")


# What does not fit, and what goes wrong.


@every_suffix
def test_all_that_does_not_fit_is_listed(suffix, tree, tmp_path):
    """In one error; numpy_ref, for the suffixes that it reads, finds the same (transposed or not, floats or not)."""
    arrays = weights.to_torch(*tree)
    del arrays["bn1.bias"]
    arrays["extra"] = np.zeros(3, np.float32)
    arrays["conv1"] = np.zeros(2, np.float32)  # where the tree has a dict
    arrays["layer1.0.conv1.weight"] = arrays["layer1.0.conv1.weight"].transpose(2, 3, 1, 0).copy()
    arrays["layer1.0.bn1.weight"] = np.full(64, np.nan, np.float32)
    arrays["layer2.0.bn1.running_var"] = np.where(np.arange(128) < 3, -1, 1).astype(np.float32)
    arrays["fc.weight"] = np.where(np.arange(5 * 512).reshape(5, 512) < 2, np.inf, arrays["fc.weight"])
    path = tmp_path / f"a{suffix}"
    weights.write_arrays(path, arrays)
    problems = [
        "fc.weight: 2 of 2,560 values are not finite",
        "layer1.0.bn1.weight: 64 of 64 values are not finite",
        "layer1.0.conv1.weight: expected (64, 64, 3, 3), the file has (3, 3, 64, 64) (transposed?)",
        "layer2.0.bn1.running_var: 3 of 128 variances are negative",
        "missing: bn1.bias (64,)",
        "unexpected: conv1 (2,)",
        "unexpected: extra (3,)",
    ]
    with pytest.raises(ValueError, match=f"does not fit .*, {len(problems)} times:") as error:
        weights.load(path, CONFIG)
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == problems
    if suffix in numpy_ref.weights.SUFFIXES:
        with pytest.raises(ValueError, match="does not fit") as error:
            numpy_ref.weights.load(path, numpy_ref.resnet.resnet18(num_classes=5, in_channels=1))
        found = sorted(line.strip() for line in str(error.value).splitlines()[1:])
        assert found == [problem.removesuffix(" (transposed?)") for problem in problems]


@every_suffix
def test_only_floats_are_weights(suffix, tree, tmp_path):
    weights.write_arrays(tmp_path / f"a{suffix}", weights.to_torch(*tree) | {"fc.bias": np.zeros(5, np.int8)})
    with pytest.raises(ValueError, match=r"1 times:\n  fc\.bias: expected floats, the file has int8$"):
        weights.load(tmp_path / f"a{suffix}", CONFIG)


def test_bad_files_are_named(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weight file .*none\.npz"):
        weights.load(tmp_path / "none.npz", CONFIG)
    with pytest.raises(ValueError, match=r"end in \.safetensors, \.npz, \.pth or \.pt, got .*a\.ckpt"):
        weights.save(tmp_path / "a.ckpt", *tree)
    with pytest.raises(ValueError, match=r"end in \.safetensors, \.npz, \.pth, \.pt, \.ckpt or \.tar, got .*a\.txt"):
        weights.load(tmp_path / "a.txt", CONFIG)


@every_suffix
@pytest.mark.parametrize("size", CUT_AT)
def test_truncated_files_are_named(suffix, size, tree, tmp_path):
    path = tmp_path / f"cut{suffix}"
    weights.save(path, *tree)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"cut\{suffix} is not a readable \{suffix} file: .+") as error:
        weights.load(path, CONFIG)
    assert "weights_only" not in str(error.value)


class RunsCode:
    """Unpickled without care it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickles_that_would_run_code_are_refused(zipped, model, tmp_path):
    path, mark = tmp_path / "a.pth", tmp_path / "mark"
    contents = {"state_dict": model.state_dict(), "x": RunsCode(mark)}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"is refused: it is a pickle that wants posix\.mkdir, .* state_dict") as error:
        weights.load(path, COLOUR)
    assert "weights_only" not in str(error.value)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it was no harmless file


NO_STATE_DICTS = {
    "a whole model": (torch.nn.Linear(2, 2), r"is refused: .* wants torch\.nn\.modules\.linear\.Linear"),
    "a list": ([torch.ones(2)], "must hold a state_dict, {name: array}, got a list"),
    "numbers for names": ({0: torch.ones(2)}, "must hold a state_dict, {name: array}, got a dict"),
    "no arrays": ({"epoch": 3, "optimizer": {"state": {}}}, "holds no arrays"),
    "sparse": ({"fc.weight": torch.eye(3).to_sparse()}, "tensors that are no plain arrays: can't convert Sparse"),
}


@pytest.mark.parametrize(("contents", "message"), NO_STATE_DICTS.values(), ids=NO_STATE_DICTS)
def test_files_without_a_state_dict(contents, message, tmp_path):
    torch.save(contents, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a\.pth.* {message}"):
        weights.read_file(tmp_path / "a.pth")


def test_npz_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **{"conv1.weight": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match=r"not a readable \.npz file"):
        weights.load(tmp_path / "a.npz", CONFIG)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_torch_is_named_where_it_is_missing(suffix, tree, tmp_path, monkeypatch):
    """And not needed for the others."""
    path = tmp_path / f"a{suffix}"
    weights.save(path, *tree)
    monkeypatch.setitem(sys.modules, "torch", None)
    for call in (lambda: weights.load(path, CONFIG), lambda: weights.save(path, *tree)):
        with pytest.raises(ValueError, match=r'files need PyTorch.* pip install -e "\.\[torch\]"'):
            call()
    for other in (".safetensors", ".npz"):
        weights.save(tmp_path / f"a{other}", *tree)
        same(weights.load(tmp_path / f"a{other}", CONFIG), tree)


@every_suffix
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(suffix, tree, tmp_path, monkeypatch):
    path = tmp_path / f"a{suffix}"
    weights.save(path, *tree)
    before = path.read_bytes()

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    for module, name in ((np, "savez"), (safetensors.numpy, "save"), (torch, "save")):
        monkeypatch.setattr(module, name, disk_full)
    with pytest.raises(OSError, match="No space left"):
        weights.save(path, *jax.tree.map(lambda a: a + 1, tree))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
