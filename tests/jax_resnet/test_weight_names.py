"""jax_resnet.weight_names and weight_checks: they find the network in a file, or name the kind of another network.

Nothing is written, and most arrays are zeros that take no memory.
"""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
import torchvision

from jax_resnet import naming, resnet, weight_checks, weight_names
from jax_resnet.unpickling import Storage, Tensor


def zeros(*shape, dtype=np.float32):
    return np.broadcast_to(np.zeros((), dtype), shape)


@functools.cache
def arrays_of(name, **options):
    """{name: array} of a torchvision network with 5 classes."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=5, **options)
    return {key: zeros(*v.shape, dtype=np.float32 if v.ndim else np.int64) for key, v in model.state_dict().items()}


NET = arrays_of("resnet18")
BACKBONE = {name: array for name, array in NET.items() if not name.startswith("fc.")}
HEAD = {"weight": NET["fc.weight"], "bias": NET["fc.bias"]}


def under(prefix, arrays=NET):
    return {prefix + name: array for name, array in arrays.items()}


def replaced(old, new, arrays=NET):
    return {re.sub(old, new, name): array for name, array in arrays.items()}


SEQUENTIAL = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
IN_SEQUENTIAL = {re.sub(r"^\w+", lambda m: SEQUENTIAL[m[0]], name): array for name, array in BACKBONE.items()}

# What a file holds; the prefix and the name of the dense layer that are found in it; what is left out.
SURROUNDED = {
    "nothing": (NET, "", "fc", []),
    "DataParallel": (under("module."), "module.", "fc", []),
    "torch.compile": (under("_orig_mod."), "_orig_mod.", "fc", []),
    "both, in an entry": (under("state_dict.module._orig_mod."), "state_dict.module._orig_mod.", "fc", []),
    "any attribute": (under("net.resnet.encoder."), "net.resnet.encoder.", "fc", []),
    "compiled inside": (replaced(r"^(layer\d)", r"\1._orig_mod"), "", "fc", []),
    "FSDP": (
        under("_fsdp_wrapped_module.", replaced(r"^(layer\d\.\d)", r"\1._fsdp_wrapped_module")),
        "", "fc", [],
    ),
    "a stage in DataParallel": (under("net.", replaced(r"^layer3", "layer3.module")), "net.", "fc", []),
    "Lightning, loss and metrics": (
        under("state_dict.model.")
        | {"state_dict.criterion.weight": zeros(5), "state_dict.val_acc.correct": zeros(dtype=np.int64)},
        "state_dict.model.", "fc", ["state_dict.criterion.weight", "state_dict.val_acc.correct"],
    ),
    "loss, counts and projection beside the layers": (
        NET | {"criterion.weight": zeros(5), "n_averaged": zeros(dtype=np.int64), "projector.0.weight": zeros(9, 9)},
        "", "fc", ["criterion.weight", "n_averaged", "projector"],
    ),
    "an optimizer": (
        under("model.") | {"optimizer.state.0.exp_avg": zeros(3), "optimizer.state.1.exp_avg": zeros(3)},
        "model.", "fc", ["optimizer"],
    ),
    "an average": (
        under("state_dict.") | under("state_dict_ema.") | {"state_dict_ema.n": zeros()},
        "state_dict.", "fc", ["state_dict_ema"],
    ),
    "an average in the same entry": (
        under("state_dict.model.") | under("state_dict.ema_model.module."),
        "state_dict.model.", "fc", ["state_dict.ema_model"],
    ),
    "an average alone": (under("model_ema.module."), "model_ema.module.", "fc", []),
    "DeepSpeed": (under("module.") | {"ds_config.x": zeros(2)}, "module.", "fc", ["ds_config.x"]),
    "a backbone alone": (BACKBONE, "", None, []),
    "MoCo v2": (
        under("module.encoder_q.", BACKBONE)
        | {"module.encoder_q.fc.0.weight": zeros(512, 512), "module.encoder_q.fc.2.weight": zeros(128, 512),
           "module.queue": zeros(128, 9), "module.queue_ptr": zeros(1, dtype=np.int64)},
        "module.encoder_q.", None, ["module.encoder_q.fc", "module.queue", "module.queue_ptr"],
    ),
    "DINO's head": (
        under("backbone.", BACKBONE) | {"head.mlp.0.weight": zeros(8, 512), "head.mlp.0.bias": zeros(8)},
        "backbone.", None, ["head"],
    ),
    "SimCLR, Sequential": (
        under("backbone.", IN_SEQUENTIAL) | {"projection_head.layers.0.weight": zeros(512, 512)},
        "backbone.", None, ["projection_head"],
    ),
    "Sequential with a dense layer": (IN_SEQUENTIAL | under("9.", HEAD), "", "fc", []),
    "Sequential, flattened too": (IN_SEQUENTIAL | under("10.", HEAD), "", "10", []),
    "Sequential(backbone, Linear)": (under("0.", BACKBONE) | under("1.", HEAD), "0.", "1", []),
    "fastai: a head with BatchNorm": (
        under("0.", IN_SEQUENTIAL)
        | {"1.2.weight": zeros(1024), "1.4.weight": zeros(512, 1024), "1.6.weight": zeros(512)}
        | {"1.8.weight": zeros(5, 512)},
        "0.", None, ["'1' (2.weight, 4.weight, 6.weight, …)"],
    ),
    "mmpretrain": (under("state_dict.backbone.", BACKBONE) | under("state_dict.head.fc.", HEAD),
                   "state_dict.backbone.", "head.fc", []),
    "detection": (
        under("backbone.body.", BACKBONE) | {"backbone.fpn.x.weight": zeros(9, 9, 1, 1), "rpn.bias": zeros(3)},
        "backbone.body.", None, ["backbone.fpn", "rpn.bias"],
    ),
    "a hidden layer": (
        BACKBONE | {"fc.0.weight": zeros(256, 512), "fc.3.weight": zeros(5, 256)}, "", None, ["fc"],
    ),
    **{f"the dense layer {name}": (BACKBONE | under(f"{name}.", HEAD), "", name, [])
       for name in ("classifier", "head", "last_linear", "linear", "fc.1", "classifier.1", "head.fc", "output")},
    "weights of classes in a loss": (NET | {"class_weights": zeros(5)}, "", "fc", ["class_weights"]),
    "a projection that is one layer": (
        BACKBONE | under("projection_head.", HEAD), "", None, ["projection_head"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arrays", "prefix", "head", "left_out"), SURROUNDED.values(), ids=SURROUNDED)
def test_the_network_is_found(arrays, prefix, head, left_out):
    found = weight_names.find(arrays, ())
    assert (found.prefix, found.head, list(found.left_out), found.notes) == (prefix, head, left_out, ())
    expected = BACKBONE if head is None else NET
    assert found.arrays.keys() == expected.keys()
    for name, array in found.arrays.items():
        assert array.shape == expected[name].shape, name
    arch, config = weight_checks.recognize(found.arrays)
    assert arch == "resnet18"
    weight_checks.check_arrays(found.arrays, config, "here")


@pytest.mark.parametrize(("layer", "inputs"), [("fc", 1000), ("head", 512)])
def test_a_head_beside_a_network_with_its_own_is_noted(layer, inputs):
    """The network's answer is not the model's: the layer takes the network's logits, or its features."""
    found = weight_names.find(under("backbone.") | {f"{layer}.weight": zeros(5, inputs), f"{layer}.bias": zeros(5)}, ())
    assert (found.head, found.left_out) == ("fc", (layer,))
    assert found.notes == (f"{layer}.weight, which may be the layer that names the classes, was left out",)


MEAN, STD = zeros(1, 3, 1, 1), zeros(3)
NORMALIZING = {  # what a file holds; what is left out; how the names in the note begin, if there is a note
    "beside the layers": (NET | {"normalize.mean": MEAN, "normalize.std": STD}, ["normalize"], "normalize"),
    "Sequential(normalize, net)": (
        {"0.mean": MEAN, "0.std": STD} | under("1."), ["'0' (mean, std)"], "0",
    ),
    "buffers of the model": (
        under("net.") | {"pixel_mean": STD, "pixel_std": STD}, ["pixel_mean", "pixel_std"], "pixel",
    ),
    "outside of two": (under("net.body.") | {"pre.mean": STD, "pre.std": STD}, ["pre"], "pre"),
    "of another network": (
        under("model.") | under("model_ema.") | {"model_ema.pre.mean": STD, "model_ema.pre.std": STD},
        ["model_ema"], "",
    ),
    "of no picture": (under("model.") | {"loss.mean": zeros(9), "loss.std": zeros(9)}, ["loss"], ""),
}  # fmt: skip


@pytest.mark.parametrize(("arrays", "left_out", "noted"), NORMALIZING.values(), ids=NORMALIZING)
def test_a_normalization_that_is_left_out_is_noted(arrays, left_out, noted):
    found = weight_names.find(arrays, ())
    assert (list(found.left_out), found.arrays.keys()) == (left_out, NET.keys())
    pattern = rf"{noted}[._]mean and {noted}[._]std were left out: normalize the pictures with them"
    assert len(found.notes) == bool(noted)
    assert all(re.match(pattern, note) for note in found.notes)


SEVERAL = {  # prefixes, the entry that is asked for, the prefix that is found or the error
    "MoCo": (("module.encoder_q.", "module.encoder_k."), None, "has several networks: in module.encoder_q, module.enc"),
    "asked for": (("student.backbone.", "teacher.backbone."), "teacher", "teacher.backbone."),
    "the average": (("state_dict.", "state_dict_ema."), "state_dict_ema", "state_dict_ema."),
    "in the middle": (("module.encoder_q.", "module.encoder_k."), "encoder_k", "module.encoder_k."),
    "a wrapper": (("module.",), "module", "module."),
    "none there": (("model.", "model_ema."), "ema", "has no network in 'ema', only in model, model_ema"),
    "still several": (("a.student.", "a.teacher."), "a", "has several networks: in a.student, a.teacher"),
    "the file itself": (("", "teacher."), "", ""),
    "one that holds another": (("net.", "net.teacher."), "net", "net."),
}


@pytest.mark.parametrize(("prefixes", "entry", "expected"), SEVERAL.values(), ids=SEVERAL)
def test_one_of_several_networks(prefixes, entry, expected):
    arrays = {name: array for prefix in prefixes for name, array in under(prefix).items()}
    if " " not in expected:
        assert weight_names.find(arrays, (), entry).prefix == expected
        return
    with pytest.raises(ValueError, match=f"^{expected}"):
        weight_names.find(arrays, (), entry)


def huge(kind="", shape=(10**9, 512)):
    return Tensor(Storage(np.dtype("f4"), bytes(4)), np.dtype("f4"), shape, (0,) * len(shape), 0, kind)


def short_tensor():
    return Tensor(Storage(np.dtype("f4"), bytes(8)), np.dtype("f4"), (3,), (1,), 0)


NOT_FOUND = {
    "no arrays": ({}, "holds no ResNet: there is no layer1.0.conv1.weight, whatever the prefix; the first names are n"),
    "beyond its storage": (NET | {"fc.weight": short_tensor()},
                           "has tensors that are not plain arrays: fc.weight is a tensor larger"),
}  # fmt: skip


@pytest.mark.parametrize(("arrays", "message"), NOT_FOUND.values(), ids=NOT_FOUND)
def test_files_without_a_network(arrays, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        weight_names.find(arrays, ())


def test_a_bomb_beside_the_network_is_left_alone():
    assert weight_names.find(NET | {"queue": huge(), "x.sparse": huge("sparse", ())}, ()).arrays.keys() == NET.keys()


RELATIVES = {  # arrays, what the message says they are
    "another depth": (arrays_of("resnet34"), "holds the weights of a resnet34 with 5 classes and 3 channels, not of a "
                      "resnet18 with 5 classes and 3 channels: pass --arch resnet34"),
    "wide": (arrays_of("wide_resnet50_2"), "holds a ResNet of another width: 128 instead of 64 channels in its first"),
    "GroupNorm": (arrays_of("resnet18", norm_layer=lambda c: torch.nn.GroupNorm(32, c)), "holds a ResNet without run"),
    "squeeze and excite": (NET | {"layer1.0.se.fc1.weight": zeros(4, 64, 1, 1)}, "holds a ResNet with attention in it"),
    "blur": (NET | {"layer2.0.conv2.1.filt": zeros(64, 1, 3, 3)}, "holds a ResNet with conv2.1 in its blocks"),
    "deep stem": ({n: a for n, a in NET.items() if n != "conv1.weight"} | {"conv1.0.weight": zeros(32, 3, 3, 3)},
                  "holds a ResNet with another stem"),
    "CIFAR": (NET | {"conv1.weight": zeros(64, 3, 3, 3)}, "holds a ResNet with a stem of 3x3, as for small pictures"),
    "ResNet-D": (replaced(r"downsample\.1\.", "downsample.2.") | {"layer2.0.downsample.1.weight": zeros(128, 64, 1, 1)},
                 "holds a ResNet-D, which pools in its shortcuts"),
    "quantized": (NET | {"layer1.0.conv1.weight": zeros(64, 64, 3, 3, dtype=np.int8)}, "holds a quantized network"),
    "pruned": (NET | {"conv1.weight_orig": zeros(64, 3, 7, 7)}, "holds weights in two parts"),
    "other blocks": ({n: a for n, a in NET.items() if not n.startswith("layer4.1")},
                     r"holds a ResNet with \(2, 2, 2, 1\) basic blocks: not supported, or incomplete"),
}  # fmt: skip


@pytest.mark.parametrize(("arrays", "message"), RELATIVES.values(), ids=RELATIVES)
def test_relatives_are_called_by_their_name(arrays, message):
    """The message names the relative, whether an architecture is given or not. A missing block is listed as missing."""
    config = resnet.resnet18(num_classes=5)
    with pytest.raises(ValueError, match=rf"^here {message}|^here does not fit .*\n  missing: layer4\.1") as error:
        weight_checks.check_arrays(arrays, config, "here")
    assert str(error.value).count("\n") <= 9
    if "--arch" not in message:
        with pytest.raises(ValueError, match=f"^{message}"):
            weight_checks.recognize(arrays)


@pytest.mark.parametrize("name", weight_checks.ARCHITECTURES)
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("num_classes", [196, 0])
def test_networks_are_recognized(name, batch_norm, num_classes):
    config = getattr(resnet, name)(num_classes=num_classes, in_channels=1, batch_norm=batch_norm)
    arrays = {key: zeros(*shape) for key, shape in weight_checks._shapes(config).items()}
    assert weight_checks.recognize(arrays) == (name, config)
    assert weight_checks.recognize(arrays, "resnet18") == (
        "resnet18", resnet.resnet18(num_classes=num_classes, in_channels=1, batch_norm=batch_norm)
    )  # fmt: skip
    weight_checks.check_arrays(arrays, config, "here")
    del arrays["layer3.1.conv1.weight"]
    assert weight_checks.recognize(arrays) == (name, config)  # what is missing is for check_arrays


HINTS = {
    "classes": (
        {"fc.weight": zeros(7, 512), "fc.bias": zeros(7)},
        r'\(a different number of classes: training with --init draws a new one, as head="new" does in Python\)$',
    ),
    "no dense layer": (
        {"fc.weight": None, "fc.bias": None},
        r"missing: fc.weight \(5, 512\) \(no dense layer: training with --init [^\n]*Python\)$",
    ),
    "no bias": ({"fc.bias": None}, r"  missing: fc.bias \(5,\) \(half a dense layer: training with --init [^\n]*$"),
    "another bias": (
        {"fc.bias": zeros(7)},
        r"has \(7,\) \(a different number of classes from the file's fc.weight\)$",
    ),
    "an array missing": ({"bn1.bias": None}, r"missing: bn1.bias \(64,\)$"),
}


@pytest.mark.parametrize(("changes", "message"), HINTS.values(), ids=HINTS)
def test_what_does_not_fit_is_listed(changes, message):
    arrays = {name: array for name, array in (NET | changes).items() if array is not None}
    with pytest.raises(
        ValueError, match=f"(?s)^here does not fit a resnet18 with 5 classes and 3 channels:\n.*{message}"
    ):
        weight_checks.check_arrays(arrays, resnet.resnet18(num_classes=5), "here")


def test_a_long_list_is_cut():
    arrays = {name: array for name, array in NET.items() if "bn" not in name}
    with pytest.raises(ValueError, match="the file") as error:
        weight_checks.check_arrays(arrays | {"fc.bias": zeros(9)}, resnet.resnet18(num_classes=5), "the file")
    assert len(str(error.value).splitlines()) == 10
    assert str(error.value).endswith("more")


THEIRS = {  # torchvision's name, Hugging Face's, Keras'
    "conv1.weight": ("embedder.embedder.convolution.weight", "conv1_conv.kernel"),
    "bn1.running_var": ("embedder.embedder.normalization.running_var", "conv1_bn.moving_variance"),
    "layer1.0.downsample.0.weight": (
        "encoder.stages.0.layers.0.shortcut.convolution.weight",
        "conv2_block1_0_conv.kernel",
    ),
    "layer1.0.downsample.1.bias": ("encoder.stages.0.layers.0.shortcut.normalization.bias", "conv2_block1_0_bn.beta"),
    "layer3.22.conv3.weight": ("encoder.stages.2.layers.22.layer.2.convolution.weight", "conv4_block23_3_conv.kernel"),
    "layer4.2.bn1.weight": ("encoder.stages.3.layers.2.layer.0.normalization.weight", "conv5_block3_1_bn.gamma"),
    "fc.bias": ("classifier.1.bias", "predictions.bias"),
}


@pytest.mark.parametrize(("ours", "theirs"), THEIRS.items(), ids=THEIRS)
def test_names_of_other_libraries(ours, theirs):
    """The names are those that transformers 5.24 and keras 3.15 write."""
    assert (naming.HUGGING_FACE.theirs(ours), naming.KERAS.theirs(ours)) == theirs


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("library", naming.NAMINGS, ids=lambda library: library.title)
def test_every_name_is_read_back(library, name):
    arrays = arrays_of(name)
    if library is naming.KERAS:  # in its layout
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}
        arrays = {n: a.transpose(axes.get(a.ndim, range(a.ndim))) for n, a in arrays.items() if "tracked" not in n}
    found = weight_names.find({f"a.{library.theirs(key)}": array for key, array in arrays.items()}, ())
    assert (found.naming, found.prefix) == (library, "a.")
    assert {key: a.shape for key, a in found.arrays.items()} == {key: arrays_of(name)[key].shape for key in arrays}


def test_keras_biases_and_eps_are_folded_into_the_statistics():
    """BatchNorm of x + bias with Keras' eps equals BatchNorm of x with ours, in float64 to the last digits."""
    rng = np.random.default_rng(0)
    arrays = {naming.KERAS.theirs(n): zeros(*a.shape[::-1]) for n, a in arrays_of("resnet50").items() if a.ndim}
    names = ("conv1_conv.bias", "conv1_bn.gamma", "conv1_bn.beta", "conv1_bn.moving_mean", "conv1_bn.moving_variance")
    bias, gamma, beta, mean, variance = values = rng.uniform(0.001, 1, (5, 64))
    found = weight_names.find(arrays | dict(zip(names, values, strict=True)), ()).arrays
    assert "conv1.bias" not in found
    x = rng.normal(size=64)
    theirs = gamma * (x + bias - mean) / np.sqrt(variance + 1.001e-5) + beta
    ours = found["bn1.weight"] * (x - found["bn1.running_mean"]) / np.sqrt(found["bn1.running_var"] + 1e-5)
    np.testing.assert_allclose(ours + found["bn1.bias"], theirs, rtol=1e-12)


def test_arrays_without_a_first_block_are_no_resnet():
    with pytest.raises(ValueError, match=r"holds no ResNet: layer1\.0\.conv1\.weight is missing"):
        weight_checks.recognize({"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)})
