"""experiments.frameworks: one training in three frameworks, step by step, and the error without PyTorch."""

import functools
import sys

import jax
import numpy as np
import pytest
from shallow import patch_shallow

import jax_resnet.resnet
import jax_resnet.weights
from experiments.data.augment import augment, normalize, to_unit_range
from experiments.frameworks import cnn
from experiments.frameworks.common import Recipe, make_training, resnet_network
from experiments.frameworks.experiment import TITLES, Experiment
from experiments.frameworks.schedules import make_schedule
from experiments.training import step_sizes

SHAPE = dict(num_classes=7, in_channels=1)
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def shallow(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch_shallow(patch, "resnet18")
        yield


def recipe(**changes):
    """A recipe with a cosine, decay, smoothed labels and augmentation whose key is the step."""
    precision = changes.get("precision", "float64")

    def preprocess(images):
        return normalize(to_unit_range(images, precision), np.array([0.4]), np.array([0.3]))

    @jax.jit
    def augmented(images, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        return preprocess(augment("shift", key, to_unit_range(images, precision) * 255))

    freeze_backbone = changes.pop("freeze_backbone", False)
    settings = dict(learning_rate=1e-3, gamma=0.1, weight_decay=1e-3, label_smoothing=0.1, precision="float64")
    experiment = Experiment(**settings | changes)
    schedule = make_schedule("cosine", 1e-3, STEPS, 0)
    return Recipe(experiment, schedule, STEPS, augmented, preprocess, freeze_backbone)


def resnet18():
    config = jax_resnet.resnet.resnet18(**SHAPE)
    drawn = jax.tree.map(np.asarray, jax_resnet.resnet.init(config, jax.random.key(0), np.float32))
    return resnet_network("resnet18", *drawn, **SHAPE)


def run(training, images, labels):
    """All losses, the last step's metrics and evaluation, the arrays before and after, and the moments."""
    state, losses, before = training.state, [], training.arrays(training.state.params, training.state.batch_stats)
    before = {name: array.copy() for name, array in before.items()}
    for _ in range(STEPS):
        state, metrics = training.train_step(state, images, labels)
        losses.append(float(metrics["loss"]))
    results = jax.device_get(training.eval_step(state.params, state.batch_stats, images, labels))
    results |= {f"train {name}": np.asarray(metrics[name]) for name in ("prediction", "top1")}
    return losses, results, before, training.arrays(state.params, state.batch_stats), training.moments(state)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (16, 32, 32, 1), np.uint8), rng.integers(0, 7, 16).astype(np.int32)


@pytest.fixture(scope="module")
def in_jax(batch):
    """The reference, compiled once for each recipe."""

    @functools.cache
    def run_in_jax(freeze_backbone):
        with jax.enable_x64(True):
            return run(make_training(resnet18(), recipe(freeze_backbone=freeze_backbone)), *batch)

    return run_in_jax


@pytest.mark.parametrize("freeze_backbone", [False, True])
@pytest.mark.parametrize("name", ["numpy", "torch", "torchvision"])
def test_a_training_is_jaxs(name, freeze_backbone, in_jax, batch, x64):
    """Three augmented steps in float64 agree to 1e-8 of an array's largest entry: BatchNorm's 16 values per channel
    magnify rounding. The first losses agree to 1e-12; the weights before and the names are the same."""
    training = make_training(resnet18(), recipe(framework=name, freeze_backbone=freeze_backbone))
    losses, results, before, after, moments = run(training, *batch)
    their_losses, their_results, their_before, their_after, their_moments = in_jax(freeze_backbone)
    assert losses[0] == pytest.approx(their_losses[0], rel=1e-12)
    np.testing.assert_allclose(losses, their_losses, rtol=1e-8)
    assert set(results) == set(their_results)
    for key in ("loss", "confidence"):
        np.testing.assert_allclose(results[key], their_results[key], rtol=1e-7)
    for key in ("prediction", "top5", "train prediction", "train top1"):
        np.testing.assert_array_equal(results[key], their_results[key])
    names = {key for key in after if not key.endswith("num_batches_tracked")}
    assert names == set(their_after)
    for key in names:
        np.testing.assert_array_equal(before[key], their_before[key])
        assert after[key].dtype == np.float64
        np.testing.assert_allclose(after[key], their_after[key], rtol=0, atol=1e-8 * np.abs(their_after[key]).max())
        moved = not np.array_equal(before[key], after[key])
        assert moved == (key.startswith("fc.") or not freeze_backbone), key
    assert int(moments.count) == int(their_moments.count) == STEPS
    settings = dict(base_lr=1e-3, final_lr=0.1, gamma=0.1, b1=0.9)
    ours, theirs = (step_sizes.layer_steps(found, **settings)["layers"] for found in (moments, their_moments))
    assert [layer["name"] for layer in ours] == [layer["name"] for layer in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our["median"] == pytest.approx(their["median"], rel=1e-4)


def test_float32_stays_float32(batch):
    for framework in TITLES:
        training = make_training(resnet18(), recipe(framework=framework, precision="float32"))
        # What jit would return is known without compiling.
        step = functools.partial(jax.eval_shape, training.train_step) if framework == "jax" else training.train_step
        state, metrics = step(training.state, *batch)
        found = {str(leaf.dtype) for leaf in jax.tree.leaves((state.params, state.batch_stats, metrics["loss"]))}
        counts = {"torch.int64"} if framework == "torch" else set()  # num_batches_tracked
        assert {name.removeprefix("torch.") for name in found - counts} == {"float32"}


def test_the_small_network_is_one(x64):
    """Losses and weights agree, though PyTorch's module orders the dense layer in another way."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (8, 28, 28, 1), np.uint8), rng.integers(0, 10, 8).astype(np.int32)
    network = cnn.network(cnn.init(rng))
    found = [run(make_training(network, recipe(framework=framework)), images, labels) for framework in TITLES]
    for losses, results, _, after, _ in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], rtol=1e-9)
        np.testing.assert_allclose(results["loss"], found[0][1]["loss"], rtol=1e-9)
        for name, array in found[0][3].items():
            np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-9)


def test_a_missing_torch_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r'--framework torch needs PyTorch, which is missing .*".\[torch\]"'):
        make_training(resnet18(), recipe(framework="torch"))
