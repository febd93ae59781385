"""The contestants of the benchmarks compute the same thing: networks, convolutions, single layers."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from flax.traverse_util import flatten_dict, unflatten_dict
from shallow import patch_shallow

import jax_resnet.resnet
import numpy_ref.fast
from experiments.bench import contestants, layers
from experiments.describe import layer_rows
from experiments.frameworks import linen
from jax_resnet import weights

CASE = contestants.Case("resnet18", 8, 32, 32)


FLAX_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def from_flax(tree):
    """{"layer1_0": {"bn1": {"scale": …}}} -> {"layer1.0.bn1.weight": …}."""
    flat = flatten_dict(tree)
    return {
        ".".join([*(part.replace("_", ".") for part in path), FLAX_NAMES.get(last, last)]): array
        for (*path, last), array in flat.items()
    }


def to_flax(arrays, like):
    """The inverse, with the structure of `like`."""
    flat = flatten_dict(arrays, sep=".")
    return unflatten_dict({path: flat[ours] for path, ours in zip(flatten_dict(like), from_flax(like), strict=True)})


def network_results(name: str, task: contestants.Task) -> dict[str, np.ndarray]:
    """What a contestant of `bench step` computes, by name, in this project's layouts."""
    result = contestants.CONTESTANTS[name](CASE._replace(task=task))()
    if task == "inference":
        return {"logits": np.asarray(result)}
    loss, batch_stats, grads = result
    if name.startswith("torch"):
        batch_stats = weights.from_torch(batch_stats)[1]
        grads = weights.from_torch(grads)[0]
    if name == "flax":
        batch_stats, grads = (from_flax(tree) for tree in (batch_stats, grads))
    return flatten_dict({"loss": np.asarray(loss), "batch_stats": batch_stats, "grads": grads}, sep=".")


@pytest.fixture
def same_weights(monkeypatch, x64):
    """Gives all networks one block per stage, numpy_ref's weights of seed 0, and float64."""
    patch_shallow(monkeypatch, "resnet18")
    monkeypatch.setitem(linen.STAGES, "resnet18", (1, 1, 1, 1))
    images, labels = contestants.batch(CASE)
    monkeypatch.setattr(contestants, "batch", lambda case: (images.astype(np.float64), labels))
    config = numpy_ref.fast.resnet18(num_classes=CASE.num_classes, in_channels=CASE.channels)
    drawn = numpy_ref.fast.init(config, np.random.default_rng(0), np.float64)
    monkeypatch.setattr(numpy_ref.fast, "init", lambda *_: drawn)
    monkeypatch.setattr(jax_resnet.resnet, "init", lambda *_: jax.tree.map(jnp.asarray, drawn))
    flax_init = linen.ResNet.init

    def drawn_for_flax(model, *arguments, **options):
        like = jax.eval_shape(lambda: flax_init(model, *arguments, **options))
        trees = dict(zip(("params", "batch_stats"), drawn, strict=True))
        return jax.tree.map(jnp.asarray, {name: to_flax(trees[name], like[name]) for name in trees})

    monkeypatch.setattr(linen.ResNet, "init", drawn_for_flax)
    build = torchvision.models.resnet18

    def torch_resnet18(num_classes):
        model = build(num_classes=num_classes).double()
        state_dict = {name: torch.from_numpy(array) for name, array in weights.to_torch(*drawn).items()}
        model.load_state_dict(state_dict, strict=False)  # without torch's counts of batches
        return model

    monkeypatch.setattr(torchvision.models, "resnet18", torch_resnet18)


@pytest.mark.usefixtures("same_weights")
@pytest.mark.parametrize("task", ["training", "inference"])
def test_networks_compute_the_same(task):
    """Loss, running statistics and gradients agree, or logits; 1e-10 leaves room for rounding in float64.

    In float32 rounding may switch a ReLU whose input is nearly 0, and gradients jump by percents, even between
    PyTorch's two layouts.
    """
    expected = network_results("numpy", task)
    for name in ("jax", "jax.remat", "torch", "torch.channels_last", "flax"):
        results = network_results(name, task)
        for key in [key for key in results if name == "flax" and key.endswith("running_var")]:
            del results[key], expected[key]  # flax comes last and keeps the biased variance, the others the unbiased
        assert results.keys() == expected.keys()
        for key, reference in expected.items():
            tolerance = 1e-10 * np.abs(reference).max()
            np.testing.assert_allclose(results[key], reference, rtol=0, atol=tolerance, err_msg=f"{name}: {key}")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs the extra bench")
def test_keras_computes_a_network_of_that_size(monkeypatch):
    """Keras' ResNet-50 has biases in its convolutions."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # as a contestant's process has it
    case = contestants.Case("resnet50", 2, 32, 32)
    loss, _, grads = contestants.keras_step(case)()
    assert 0 < loss < 20
    config = jax_resnet.resnet.resnet50(num_classes=196)
    ours, _ = jax.eval_shape(lambda: jax_resnet.resnet.init(config, jax.random.key(0)))
    biases = sum(
        array.size for name, array in flatten_dict(ours, sep=".").items() if name.endswith("bias") and name != "fc.bias"
    )
    assert sum(g.size for g in grads) == sum(a.size for a in jax.tree.leaves(ours)) + biases  # one for each channel
    logits = contestants.keras_step(case._replace(task="inference"))()
    assert logits.shape == (2, 196)
    with pytest.raises(ValueError, match=r"keras\.applications has no ResNet18"):
        contestants.keras_step(case._replace(arch="resnet18"))


def test_the_layers_of_a_network_are_all_there():
    """Convolutions and the dense layer sum to the multiply-adds of `experiments.describe`."""
    for arch, channels in (("resnet18", 3), ("resnet101", 1)):
        case = contestants.Case(arch, 2, 64, 96, channels=channels)
        found = layers.distinct_layers(case)
        config = getattr(jax_resnet.resnet, arch)(num_classes=case.num_classes, in_channels=channels)
        expected = sum(row.multiply_adds for row in layer_rows(config, 64, 96))
        assert sum(count * layer.operations for layer, count in found.items()) == 2 * case.batch_size * expected


LAYERS = [
    layers.Layer("conv", (2, 6, 7, 3), 5, 3, 2),
    layers.Layer("conv", (2, 6, 7, 3), 5),
    layers.Layer("norm+relu", (2, 6, 7, 3)),
    layers.Layer("max_pool", (2, 6, 7, 3), kernel=3, stride=2),
    layers.Layer("dense", (2, 1, 1, 3), 5),
]


@pytest.mark.parametrize("name", ["numpy", "numpy.unfolded", "jax", "torch", "torch.channels_last"])
def test_small_convolutions_compute_the_same(name):
    """The plain loops give the same; 1e-5 is for float32 sums of a few hundred terms."""
    result = (layers.NUMPY_FORMS | layers.CONTESTANTS)[name](layers.SMALL, "forward", "float32")()
    result = np.moveaxis(result.numpy(), 1, -1) if name.startswith("torch") else result
    expected = layers.NUMPY_FORMS["numpy.loops"](layers.SMALL, "forward", "float32")()
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer_contestants_compute_the_same(layer, channels_last):
    """1e-5 is for float32 sums of a few hundred terms."""
    for name in layer.passes:
        ours = np.asarray(jax.tree.leaves(layers.jax_layer(layer, name, "float32")())[0])
        theirs = layers.torch_layer(layer, name, "float32", channels_last=channels_last)()
        theirs = (theirs if name == "forward" else theirs[0]).numpy()
        theirs = theirs.transpose((2, 3, 1, 0) if name == "dweight" else (0, 2, 3, 1))
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5 * np.abs(ours).max(), err_msg=name)
