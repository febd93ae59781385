"""jax_resnet.weights: torchvision's names and layout, bit for bit, and one clear error for files that do not fit."""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import torchvision
from flax.traverse_util import flatten_dict
from random_networks import randomized
from trees import close, same

from jax_resnet import naming, resnet, weights

CONFIG = resnet.resnet18(num_classes=5, in_channels=1)
COLOUR = resnet.resnet18(num_classes=5)

every_suffix = pytest.mark.parametrize("suffix", weights.SUFFIXES)


@pytest.fixture(scope="module")
def tree():
    return resnet.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def model():
    """torchvision's ResNet-18 as if trained: no statistic, no BatchNorm weight and no count has its initial value."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    for name, array in model.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            array.copy_(torch.full_like(array, 7) if array.ndim == 0 else torch.rand_like(array) + 0.5)
    return model


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
    """All names and shapes agree, except torch's batch counts; nothing is drawn."""
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
    """torch -> tree -> file -> torch: load_state_dict is strict, and every bit comes back."""
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
    expected = jax.tree.map(lambda a: a.astype(np.promote_types(a.dtype, np.float32)), (params, batch_stats))
    same(weights.load(tmp_path / f"weights{suffix}", COLOUR), expected)


def test_pth_files_hold_all_that_torch_has(model, tmp_path):
    """The file has the names, types and shapes of torchvision's own state_dict, batch counts (0) included. safetensors'
    strict loader does not need the counts."""
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
    """Formats that have bfloat16 keep it. .npz would hold raw bytes with no type, so save raises and writes nothing."""
    brain = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        with pytest.raises(ValueError, match=r"\.npz files cannot hold bfloat16, got .*a\.npz: use"):
            weights.save(path, *brain)
        assert not os.listdir(tmp_path)
        return
    weights.save(path, *brain)
    assert state_dict_of(path)["conv1.weight"].dtype == torch.bfloat16
    same(weights.from_torch(state_dict_of(path)), brain)
    same(weights.from_torch(weights.read_arrays(path)), brain)
    same(weights.load(path, CONFIG), jax.tree.map(lambda a: np.asarray(a, np.float32), brain))


def test_metadata(tree, tmp_path):
    weights.save(tmp_path / "a.safetensors", *tree, metadata={"class_names": "[]"})
    assert weights.read_file(tmp_path / "a.safetensors").metadata == {"class_names": "[]"}
    for suffix in (".npz", ".pth"):
        with pytest.raises(ValueError, match=r"only \.safetensors files hold metadata"):
            weights.save(tmp_path / f"a{suffix}", *tree, metadata={"a": "b"})


@every_suffix
def test_arrays_in_another_order_of_memory(suffix, model, tmp_path):
    """safetensors writes memory as it lies; arrays in another order, as in channels_last, must keep their numbers."""
    strided = {name: np.asfortranarray(value) for name, value in numpy_arrays(model.state_dict()).items()}
    weights.write_arrays(tmp_path / f"a{suffix}", strided)
    read = weights.read_arrays(tmp_path / f"a{suffix}")
    assert read.keys() == strided.keys()
    for name, array in strided.items():
        assert read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


# Other libraries' names.


def published_keys(depths, per_block):
    """The names in microsoft/resnet-18 and resnet-50 on the hub, of transformers' ResNetForImageClassification."""
    fields = {"convolution": ("weight",), "normalization": ("weight", "bias", *naming.STATISTICS, naming.COUNT)}
    layers = ["resnet.embedder.embedder"]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            where = f"resnet.encoder.stages.{stage}.layers.{block}"
            shortcut = block == 0 and (stage > 0 or per_block == 3)
            layers += [f"{where}.layer.{i}" for i in range(per_block)] + [f"{where}.shortcut"] * shortcut
    inner = {f"{layer}.{part}.{field}" for layer in layers for part, names in fields.items() for field in names}
    return inner | {"classifier.1.weight", "classifier.1.bias"}


@every_suffix
def test_hugging_faces_names(suffix, tree, tmp_path):
    """The names are the published ones, and a round trip keeps all numbers."""
    path = tmp_path / f"a{suffix}"
    weights.save(path, *tree, names="huggingface")
    assert state_dict_of(path).keys() == published_keys((2, 2, 2, 2), per_block=2)
    same(weights.load(path, CONFIG), tree)
    same(weights.from_torch(weights.read_arrays(path)), tree)
    if suffix == ".safetensors":  # transformers refuses a file without it
        assert weights.read_file(path).metadata == {"format": "pt"}


def test_hugging_faces_names_of_bottlenecks():
    shapes = jax.eval_shape(lambda: resnet.init(resnet.resnet50(), jax.random.key(0)))
    arrays = weights.to_torch(*jax.tree.map(lambda spec: np.broadcast_to(np.float32(0), spec.shape), shapes))
    assert naming.to_hugging_face(arrays).keys() == published_keys((3, 4, 6, 3), per_block=3)


BOTTLENECKS = resnet.ResNetConfig("bottleneck", (2, 1, 1, 1), num_classes=5, stride_in="conv1")


def drawn(config):
    """Parameters and statistics; no statistic and nothing in a BatchNorm has its initial value."""
    return randomized(np.random.default_rng(0), resnet.init(config, jax.random.key(0)))


def test_what_arrays_do_not_show_is_saved_and_compared(tmp_path):
    config = dataclasses.replace(BOTTLENECKS, batch_norm_eps=1e-3)
    trees = resnet.init(config, jax.random.key(0))
    weights.save(tmp_path / "a.safetensors", *trees, config=config)
    weights.load(tmp_path / "a.safetensors", config)
    for change, message in (({"stride_in": "conv2"}, "stride_in='conv1'"), ({"batch_norm_eps": 1e-5}, "eps=0.001")):
        with pytest.raises(ValueError, match=message):
            weights.load(tmp_path / "a.safetensors", dataclasses.replace(config, **change))
    with pytest.raises(ValueError, match=r"only .safetensors files can say .* stride_in=conv1, batch_norm_eps=0.001"):
        weights.save(tmp_path / "a.npz", *trees, config=config)
    of_numpy = dataclasses.replace(config, batch_norm_eps=np.float64(1e-3))
    weights.save(tmp_path / "b.safetensors", *trees, config=of_numpy)
    assert weights.read_file(tmp_path / "b.safetensors").batch_norm_eps == 1e-3


def test_keras_names(tmp_path):
    """A round trip keeps all bits except in variances, which round as eps is folded in. 0 stays 0 within 1e-15."""
    params, batch_stats = drawn(BOTTLENECKS)
    batch_stats["bn1"]["running_var"][:3] = [0, 1e-9, 1e-12]
    weights.save(tmp_path / "a.h5", params, batch_stats, config=BOTTLENECKS)
    loaded, loaded_stats = weights.load(tmp_path / "a.h5", BOTTLENECKS)
    same(loaded, params)
    for name, array in flatten_dict(batch_stats, sep=".").items():
        is_mean = name.endswith("running_mean")
        np.testing.assert_allclose(
            flatten_dict(loaded_stats, sep=".")[name], array, rtol=0 if is_mean else 2e-7, atol=0 if is_mean else 1e-15
        )
    assert os.listdir(tmp_path) == ["a.h5"]


def test_keras_eps_is_folded_into_the_variances(tmp_path):
    """A network with its own eps is saved with other variances, which give the same logits with the default eps. 1e-5
    is for float32 in 20 layers."""
    config = dataclasses.replace(BOTTLENECKS, batch_norm_eps=1e-3)
    tree = drawn(config)
    weights.save(tmp_path / "a.h5", *tree, config=config)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    run = jax.jit(resnet.apply, static_argnums=0, static_argnames="train")
    expected = run(config, *tree, images, train=False).logits
    ours = run(BOTTLENECKS, *weights.load(tmp_path / "a.h5", BOTTLENECKS), images, train=False).logits
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


REFUSED = {  # what Keras or the format does not have
    "no network": (None, "a.h5", None, "pass config, which shows whether Keras has this network"),
    "its stride": (dataclasses.replace(BOTTLENECKS, stride_in="conv2"), "a.h5", None, "Keras would compute something"),
    "basic blocks": (resnet.resnet18(), "a.h5", None, "Keras has ResNet50, ResNet101 and ResNet152, whose"),
    "a suffix": (BOTTLENECKS, "a.npz", "keras", r"files with Keras' names, and only these, end in \.h5, got .*a\.npz"),
    "another library's": (BOTTLENECKS, "a.h5", "huggingface", r"files with Keras' names, and only these, end in \.h5"),
    "its newer format": (BOTTLENECKS, "a.weights.h5", None, r"leave \.weights out of the name"),
    "unknown names": (BOTTLENECKS, "a.npz", "flax", 'names are "torchvision", "huggingface" or "keras", got \'flax\''),
}  # fmt: skip


@pytest.mark.parametrize(("config", "name", "names", "message"), REFUSED.values(), ids=REFUSED)
def test_what_other_libraries_have_not_is_refused(config, name, names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        weights.save(tmp_path / name, *resnet.init(BOTTLENECKS, jax.random.key(0)), names=names, config=config)
    assert not os.listdir(tmp_path)


def test_networks_without_batch_norm_have_torchvisions_names_alone(tmp_path):
    config = dataclasses.replace(BOTTLENECKS, batch_norm=False)
    tree = resnet.init(config, jax.random.key(0))
    for name, names in (("a.h5", "keras"), ("a.npz", "huggingface")):
        with pytest.raises(ValueError, match='a network without BatchNorm can only be written with names="torch'):
            weights.save(tmp_path / name, *tree, names=names, config=config)


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs the extra test: keras")
def test_keras_itself_loads_them(tmp_path):
    """keras.applications.ResNet50, loaded by order or by name, gives our logits to 1e-4 (float32 in 50 layers)."""
    config = resnet.resnet50(num_classes=7, stride_in="conv1")
    tree = drawn(config)
    weights.save(tmp_path / "a.h5", *tree, config=config)
    images = np.asarray(jax.random.normal(jax.random.key(1), (2, 64, 64, 3)))
    run = jax.jit(resnet.apply, static_argnums=0, static_argnames="train")
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "expected.npy", run(config, *tree, images, train=False).logits)
    subprocess.run(
        [sys.executable, "-c", WITH_KERAS], cwd=tmp_path, check=True, env=os.environ | {"KERAS_BACKEND": "jax"}
    )
    for name in ("back.keras", "back.weights.h5", "back.h5"):  # what Keras writes
        back = weights.load(tmp_path / name, config)
        close(back, tree, 1e-6)
    for name in ("by_order.npy", "by_name.npy"):
        expected, theirs = np.load(tmp_path / "expected.npy"), np.load(tmp_path / name)
        np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        assert 0.1 < np.ptp(expected) < 1e6


WITH_KERAS = """
import keras, numpy
model = keras.applications.ResNet50(weights=None, classes=7, input_shape=(64, 64, 3), classifier_activation=None)
for name, by_name in (("by_order", False), ("by_name", True)):
    model.set_weights([0 * array for array in model.get_weights()])
    model.load_weights("a.h5", by_name=by_name)
    numpy.save(name, model.predict(numpy.load("images.npy"), verbose=0))
for write, name in ((model.save, "back.keras"), (model.save_weights, "back.weights.h5"), (model.save, "back.h5")):
    write(name)
"""  # a process of its own: Keras chooses its backend when it is imported


# Checkpoints of other programs.


OTHER = {"epoch": 3, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}}
STYLES = {  # what a file holds, the prefix of every name, and the names left out
    "parameters": (lambda model: dict(model.named_parameters()) | dict(model.named_buffers()), "", ()),
    "examples/imagenet": (
        lambda model: OTHER | {"arch": "resnet18", "state_dict": torch.nn.DataParallel(model).state_dict(),
                               "best_acc1": torch.tensor(7.0)},
        "state_dict.module.", ("optimizer", "best_acc1", "epoch", "arch"),
    ),
    "torchvision's references": (
        lambda model: OTHER | {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1), "scaler": {"scale": 2},
                               "model_ema": torch.optim.swa_utils.AveragedModel(model).state_dict()},
        "model.", ("optimizer", "model_ema", "epoch", "args", "scaler.scale"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("contents", "prefix", "left_out"), STYLES.values(), ids=STYLES)
def test_styles_of_checkpoints(contents, prefix, left_out, model, tmp_path):
    """torch itself makes these files; `test_weight_names` has more styles."""
    torch.save(contents(model), tmp_path / "a.pth")
    file = weights.read_file(tmp_path / "a.pth")
    assert (file.prefix, file.left_out) == (prefix, left_out)
    assert file.arrays.keys() == model.state_dict().keys()
    assert file.arrays["bn1.num_batches_tracked"] == 7
    same(weights.load(tmp_path / "a.pth", COLOUR), weights.from_torch(model.state_dict()))


def test_the_entry_of_a_checkpoint_can_be_named(model, tmp_path):
    average = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({"student": model.state_dict(), "teacher": average, "epoch": 3}, tmp_path / "a.pth")
    params, _ = weights.load(tmp_path / "a.pth", COLOUR, entry="teacher")
    np.testing.assert_array_equal(params["fc"]["bias"], average["fc.bias"])
    with pytest.raises(ValueError, match=r"a\.pth has several networks: in student, teacher"):
        weights.read_file(tmp_path / "a.pth")


STRIDES = {  # the settings beside Hugging Face's weights, the stride that they tell
    "no settings": ({}, None),
    "torchvision's": ({"downsample_in_bottleneck": False}, None),
    "the paper's": ({"downsample_in_bottleneck": True}, "conv1"),
}


@pytest.mark.parametrize(("settings", "stride"), STRIDES.values(), ids=STRIDES)
def test_a_stride_that_a_file_tells_must_be_the_networks(settings, stride, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = resnet.resnet50(num_classes=2)
    shapes = jax.eval_shape(lambda: resnet.init(config, jax.random.key(0)))
    arrays = weights.to_torch(*jax.tree.map(lambda spec: np.broadcast_to(np.float16(0), spec.shape), shapes))
    weights.write_arrays(tmp_path / "model.safetensors", arrays)
    assert weights.read_file(tmp_path).stride_in == stride
    if stride is None:
        weights.load(tmp_path, config)
    else:
        with pytest.raises(ValueError, match=r"pass a configuration with stride_in='conv1'"):
            weights.load(tmp_path, config)
        weights.load(tmp_path, dataclasses.replace(config, stride_in="conv1"))


PLAIN = [
    {"architecture": "resnet18", "global_pool": "avg", "num_classes": 5},
    {"architecture": "resnet50.a1_in1k", "model_args": {"num_classes": 5}},
    {"model_type": "resnet", "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2],
     "hidden_act": "relu", "embedding_size": 64, "downsample_in_first_stage": False, "num_channels": 1},
    {"model_type": "detr", "hidden_act": "gelu", "backbone": "resnet50", "dilation": False},
    {"architecture": "ResNet18"}, {"backbone": "ResNet-18"}, {"dilation": 1}, {"model_args": ["--lr", "0.1"]},
]  # fmt: skip
OTHERWISE = [
    *({"architecture": name} for name in ("resnetblur18", "resnetaa50.d_in1k", "resnet50d", "gcresnet50t")),
    {"model_args": {"act_layer": "silu"}}, {"global_pool": "max"}, {"output_stride": 16},
    {"hidden_act": "gelu"}, {"downsample_in_first_stage": True}, {"layer_type": "wide"}, {"embedding_size": 32},
    {"hidden_sizes": [64, 64, 64, 64]}, {"depths": [1, 1, 1, 1]}, {"depths": {}},
    {"model_type": "detr", "backbone_config": {"hidden_act": "silu"}}, {"backbone": "resnet50d"}, {"dilation": True},
]  # fmt: skip


def test_settings_of_another_network_are_refused_in_a_line(tree, tmp_path):
    """The arrays fit a plain ResNet. timm's or Hugging Face's config.json must fit too: the error names the field."""
    weights.save(tmp_path / "model.safetensors", *tree)
    for settings in PLAIN:
        (tmp_path / "config.json").write_text(json.dumps(settings))
        assert weights.read_file(tmp_path).settings == settings
    for settings in OTHERWISE:
        (tmp_path / "config.json").write_text(json.dumps(settings))
        field = "hidden_act" if "backbone_config" in settings else [*settings][-1]
        with pytest.raises(ValueError, match=rf"^[^\n]*config\.json beside it says {field} [^\n]*no plain ResNet$"):
            weights.read_file(tmp_path)


def test_settings_that_cannot_be_read(tree, tmp_path):
    weights.save(tmp_path / "model.safetensors", *tree)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        weights.read_file(tmp_path)
    (tmp_path / "config.json").write_text("[1]")  # another program's
    assert weights.read_file(tmp_path).settings == {}


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


# What goes wrong.


def test_bad_files_are_named(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weight file .*none\.npz"):
        weights.load(tmp_path / "none.npz", CONFIG)
    with pytest.raises(ValueError, match=r"weight files end in \.safetensors, .* got .*a\.ckpt"):
        weights.save(tmp_path / "a.ckpt", *tree)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_torch_is_named_where_it_is_missing(suffix, tree, tmp_path, monkeypatch):
    """torch is needed to write its own files, neither to read them nor for other formats."""
    path = tmp_path / f"a{suffix}"
    weights.save(path, *tree)
    monkeypatch.setitem(sys.modules, "torch", None)
    same(weights.load(path, CONFIG), tree)
    with pytest.raises(ValueError, match=r'files needs PyTorch, which is missing.* pip install -e "\.\[torch\]"'):
        weights.save(path, *tree)
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
