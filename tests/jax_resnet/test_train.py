"""jax_resnet.train: one compilation, one update by hand, and a step that lowers for every platform."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_network
from flax.training.dynamic_scale import DynamicScale
from trees import close, same

from jax_resnet import resnet
from jax_resnet.adabound import adabound
from jax_resnet.train import (
    create_train_state,
    decay_mask,
    loss_and_logits,
    make_eval_step,
    make_nonfinite_search,
    make_train_step,
)

# Few blocks, of both kinds: quick to compile.
CONFIG = resnet.ResNetConfig(block="basic", stage_sizes=(1, 1, 1, 1), num_classes=7, in_channels=1)


def batch(n=4, size=32):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((n, size, size, 1)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, 7, n), jnp.int32)


def test_compiles_once_while_the_learning_rate_changes():
    """The schedule reads the count from the optimizer's state: three steps, three rates, one trace."""
    traces = []

    def preprocess(images, step):
        traces.append(images.shape)
        return images

    optimizer = adabound(optax.linear_schedule(1e-3, 0.0, 10))
    state, step = tiny_state(optimizer), tiny_step(optimizer, preprocess=preprocess)
    for _ in range(3):
        state, metrics = step(state, *tiny_batch(4))
    assert traces == [(4, 8, 8, 1)]
    assert int(state.step) == 3
    state, _ = step(state, *tiny_batch(6))
    assert traces == [(4, 8, 8, 1), (6, 8, 8, 1)]
    assert np.isfinite(metrics["loss"])


def test_a_step_is_gradient_optimizer_update(x64):
    """The step is SGD by hand on jax.grad of a cross-entropy with smoothed targets; statistics follow the batch. 1e-12
    is for what jit reorders."""
    optimizer = optax.sgd(0.1)
    images, labels = tiny_batch()
    before = tiny_state(optimizer)

    def loss(params):
        out = tiny_network.apply(tiny_network.TinyConfig(), params, before.batch_stats, images, train=True)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 3), 0.2)
        return optax.softmax_cross_entropy(out.logits, targets).mean(), out

    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(before.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before.params, grads)
    state, metrics = tiny_step(optimizer, label_smoothing=0.2)(before, images, labels)
    close(state.params, expected, 1e-12)
    close(state.batch_stats, out.batch_stats, 1e-12)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-12)
    assert float(metrics["top1"]) == np.mean(np.argmax(out.logits, -1) == labels)
    np.testing.assert_array_equal(metrics["prediction"], np.argmax(out.logits, -1))


def test_steps_take_any_network_of_that_form():
    """This network is a dense layer on the pixels, with an option of its own."""

    def apply(config, params, batch_stats, images, *, train, scale):
        return resnet.Output(scale * images.reshape(len(images), -1) @ params["weight"], batch_stats, {})

    images, labels = batch()
    params = {"weight": 0.01 * jax.random.normal(jax.random.key(0), (32 * 32, 7))}
    optimizer = optax.sgd(0.1)
    step = make_train_step(None, optimizer, apply=apply, scale=2.0)
    result = make_eval_step(None, apply=apply, scale=2.0)(params, {}, images, labels)
    logits = 2 * images.reshape(4, -1) @ params["weight"]
    _, metrics = step(create_train_state(params, {}, optimizer), images, labels)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(result["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)


@pytest.mark.parametrize("make", [functools.partial(make_train_step, optimizer=optax.sgd(0.1)), make_eval_step])
@pytest.mark.parametrize("option", ["lable_smoothing", "train", "images"])
def test_an_unknown_keyword_is_refused_at_once(make, option):
    with pytest.raises(TypeError, match=f"unknown option '{option}': .* apply takes dtype, remat"):
        make(CONFIG, **{option: 0.1})


def scaled_state(optimizer, scale):
    params, batch_stats = resnet.init(CONFIG, jax.random.key(0))
    return create_train_state(params, batch_stats, optimizer, loss_scale=DynamicScale(scale=scale, growth_interval=1))


@pytest.fixture(scope="module")
def float16_step():
    """float16 activations, compiled once."""
    optimizer = adabound(1e-3)
    return optimizer, make_train_step(CONFIG, optimizer, dtype=jnp.float16)


def test_float16_with_a_loss_scale(float16_step):
    """An overflow lowers the scale and changes no parameter or optimizer state. A small enough scale grows again."""
    optimizer, step = float16_step
    state = scaled_state(optimizer, 2.0**40)
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, *batch())
    assert not bool(metrics["finite"])
    assert np.isfinite(metrics["loss"])
    assert (int(state.step), int(state.nonfinite), float(state.loss_scale.scale)) == (1, 0, 2.0**39)
    same((state.params, state.opt_state), (before.params, before.opt_state))
    state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2.0**10)))
    losses = []
    for _ in range(4):
        state, metrics = step(state, *batch())
        losses.append(float(metrics["loss"]))
    assert bool(metrics["finite"])
    assert float(state.loss_scale.scale) > 2.0**10
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1  # the scale's Python numbers are arrays from the start
    _, metrics = step(state, batch()[0] * np.nan, batch()[1])
    assert not np.isfinite(metrics["loss"])


def test_decay_mask_takes_kernels_alone():
    params, _ = jax.eval_shape(functools.partial(resnet.init, CONFIG), jax.random.key(0))
    mask = decay_mask(params)
    assert mask["conv1"]["weight"]
    assert mask["fc"]["weight"]
    assert not mask["fc"]["bias"]
    assert not mask["bn1"]["weight"]


def test_eval_step_by_hand():
    params, batch_stats = resnet.init(CONFIG, jax.random.key(0))
    images, labels = batch()
    result = make_eval_step(CONFIG, preprocess=lambda x: 2 * x)(params, batch_stats, images, labels)
    logits = jax.jit(functools.partial(resnet.apply, CONFIG, train=False))(params, batch_stats, 2 * images).logits
    np.testing.assert_array_equal(result["prediction"], logits.argmax(-1))
    np.testing.assert_allclose(result["confidence"], jax.nn.softmax(logits).max(-1), rtol=1e-5)
    ranks = (logits > jnp.take_along_axis(logits, labels[:, None], 1)).sum(-1)
    np.testing.assert_array_equal(result["top5"], ranks < 5)
    np.testing.assert_allclose(
        result["loss"], optax.softmax_cross_entropy_with_integer_labels(logits, labels), rtol=1e-5
    )


def test_fewer_than_five_classes_have_a_top5():
    evaluate = make_eval_step(tiny_network.TinyConfig(), apply=tiny_network.apply)
    assert bool(evaluate(*tiny_network.draw(), *tiny_batch())["top5"].all())


def test_resnet101_step_lowers_for_every_platform():
    """The step is lowered, not run: with XLA's own convolution for CUDA and TPU, with products only for the CPU."""
    config = resnet.resnet101(num_classes=196, in_channels=1)
    optimizer = adabound(1e-3)
    state = jax.eval_shape(lambda key: create_train_state(*resnet.init(config, key), optimizer), jax.random.key(0))
    images = jax.ShapeDtypeStruct((8, 96, 96, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((8,), jnp.int32)
    step = make_train_step(config, optimizer)
    for platform, own_convolutions in {"cpu": False, "cuda": True, "tpu": True}.items():
        program = jax.export.export(step, platforms=[platform])(state, images, labels).mlir_module()
        assert ("stablehlo.convolution" in program) == own_convolutions, platform
        products = program.count("stablehlo.dot_general")  # the dense layer's three, and on a CPU those of convolutions
        assert (products == 3) == own_convolutions, (platform, products)


def tiny_state(optimizer, batch_norm=True, ema=False):
    params, batch_stats = tiny_network.draw()
    params, batch_stats = jax.tree.map(jnp.asarray, (params, batch_stats if batch_norm else {}))
    return create_train_state(params, batch_stats, optimizer, ema=ema)


def tiny_batch(n=12):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((n, 8, 8, 1)) + 3 * rng.standard_normal((n, 1, 1, 1))  # so that predictions differ
    return jnp.asarray(images), jnp.asarray(rng.integers(0, 3, n), jnp.int32)


def tiny_step(optimizer, batch_norm=True, **options):
    return make_train_step(tiny_network.TinyConfig(batch_norm), optimizer, apply=tiny_network.apply, **options)


def after_a_step(batch_norm=True, targets=None, loss_scale=None, **options):
    """The new state and the metrics."""
    optimizer, (images, labels) = optax.sgd(0.1), tiny_batch()
    state = tiny_state(optimizer, batch_norm).replace(loss_scale=loss_scale)
    return tiny_step(optimizer, batch_norm, **options)(state, images, labels if targets is None else targets(labels))


def smooth(labels):
    return optax.smooth_labels(jax.nn.one_hot(labels, 3), 0.1)


WHOLE = dict(batch_norm=False, label_smoothing=0.1)
# The scale is a power of 2 and nothing overflows. 1e-6: DynamicScale has float32 gradients.
SCALED = dict(loss_scale=DynamicScale(jnp.int32(0), jnp.float32(2.0**10)))
SAME = {  # two ways to the same step, and the tolerance; 1e-12 is for rounding
    "a loss of one's own": (dict(loss=optax.softmax_cross_entropy, targets=smooth), dict(label_smoothing=0.1), 1e-12),
    "a loss scale": (SCALED, {}, 1e-6),
    "a loss scale, accumulated": (dict(**SCALED, accumulate=3), dict(accumulate=3), 1e-6),
    **{f"{parts} parts": (dict(**WHOLE, accumulate=parts), WHOLE, 1e-12) for parts in (2, 3, 12)},
}


@pytest.mark.parametrize(("options", "others", "tolerance"), SAME.values(), ids=SAME)
def test_two_steps_are_the_same(options, others, tolerance, x64):
    """Parameters and metrics; predictions are in the order of the batch, also if they come in parts."""
    (state, metrics), (expected, expected_metrics) = after_a_step(**options), after_a_step(**others)
    close(state.params, expected.params, tolerance)
    close(*(jax.tree.map(np.float64, found) for found in (metrics, expected_metrics)), tolerance)
    if state.loss_scale:
        assert int(state.loss_scale.fin_steps) == options.get("accumulate", 1)


def test_label_smoothing_with_another_loss_is_refused():
    with pytest.raises(ValueError, match="label_smoothing is for the default loss"):
        after_a_step(loss=optax.softmax_cross_entropy, label_smoothing=0.1)


def test_accumulating_with_batch_norm_normalizes_and_updates_by_part(x64):
    """Part k has the rows k, k + 3, …; the running statistics see one part after the other."""
    optimizer = optax.sgd(0.1)
    state, _ = tiny_step(optimizer, accumulate=3)(tiny_state(optimizer), *tiny_batch())
    images, labels = tiny_batch()
    params, stats = tiny_network.draw()
    grads = []
    for k in range(3):
        out = jax.grad(loss_and_logits, argnums=1, has_aux=True)
        grad, (_, stats) = out(
            tiny_network.TinyConfig(), params, stats, images[k::3], labels[k::3], apply=tiny_network.apply
        )
        grads.append(grad)
    expected = jax.tree.map(lambda p, *g: p - 0.1 * sum(g) / 3, params, *grads)
    close(state.params, expected, 1e-12)
    close(state.batch_stats, stats, 1e-12)


def test_a_batch_that_cannot_be_parted_is_refused():
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="a batch of 12 cannot be computed in 5 equal parts"):
        tiny_step(optimizer, accumulate=5)(tiny_state(optimizer), *tiny_batch())


def test_averages_of_weights_and_statistics_by_hand(x64):
    optimizer = optax.sgd(0.1)
    step = tiny_step(optimizer, ema_decay=0.75)
    state = tiny_state(optimizer, ema=True)
    expected = jax.tree.map(np.array, {"params": state.params, "batch_stats": state.batch_stats})
    for _ in range(3):
        state, _ = step(state, *tiny_batch())
        new = {"params": state.params, "batch_stats": state.batch_stats}
        expected = jax.tree.map(lambda average, value: 0.75 * average + 0.25 * np.array(value), expected, new)
    close(state.ema, expected, 1e-14)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing_for_good(value):
    """Pictures of 1e30 are finite, but their gradients are not."""
    optimizer = adabound(1e-2)
    step = tiny_step(optimizer, False, ema_decay=0.9)
    good, labels = tiny_batch()
    state, metrics = step(tiny_state(optimizer, False, ema=True), good, labels)
    assert bool(metrics["finite"])
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, good * value, labels)
    assert not bool(metrics["finite"])
    same(state.replace(nonfinite=before.nonfinite), before)
    state, metrics = step(state, good, labels)  # as if dispatched before anybody read the metrics
    assert bool(metrics["finite"])
    same(state.replace(nonfinite=before.nonfinite), before)
    assert int(state.nonfinite) == 1


def test_steps_that_are_skipped_count_as_steps():
    optimizer = adabound(optax.linear_schedule(1e-2, 0.0, 10))
    step = tiny_step(optimizer, skip_nonfinite=1)
    good, labels = tiny_batch()
    state, _ = step(tiny_state(optimizer), good, labels)
    before = jax.tree.map(np.array, state)
    state, _ = step(state, good * np.nan, labels)
    assert (int(state.step), int(state.nonfinite)) == (2, 1)
    same((state.params, state.batch_stats, state.opt_state), (before.params, before.batch_stats, before.opt_state))
    state, _ = step(state, good, labels)
    assert int(state.step) == 3
    assert not np.array_equal(state.params["fc"]["weight"], before.params["fc"]["weight"])
    state, _ = step(state, good * np.nan, labels)
    assert (int(state.step), int(state.nonfinite)) == (3, 2)


def test_the_search_names_what_is_not_finite_in_order():
    optimizer = optax.sgd(0.1)
    search = make_nonfinite_search(tiny_network.TinyConfig(), apply=tiny_network.apply)
    images, labels = tiny_batch()
    state = tiny_state(optimizer)
    assert search(state, images, labels) == []
    fc = {"weight": state.params["fc"]["weight"].at[0, 0].set(jnp.inf), "bias": state.params["fc"]["bias"]}
    found = search(state.replace(params={**state.params, "fc": fc}), images, labels)
    assert found[:3] == ["the weight fc.weight", "the logits", "the loss"]
    assert "the gradient conv1.weight" in found
    assert not any("activation" in name for name in found)


def test_the_arrays_given_at_the_start_survive_a_step():
    """The step donates its state, which must not hold the caller's own arrays."""
    params, batch_stats = resnet.init(CONFIG, jax.random.key(0))
    optimizer = optax.sgd(0.1)
    make_train_step(CONFIG, optimizer)(create_train_state(params, batch_stats, optimizer), *batch())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, batch_stats)))


def test_clipping_shortens_the_update(x64):
    """optax clips before the optimizer, as in experiments; grad_norm is the length before clipping."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    start = tiny_state(optimizer)
    before = jax.tree.map(np.array, start.params)
    state, metrics = tiny_step(optimizer)(start, *tiny_batch())
    moved = jax.tree.map(lambda a, b: a - np.array(b), before, state.params)
    assert float(optax.tree.norm(moved)) == pytest.approx(0.01)
    assert float(metrics["grad_norm"]) > 0.01


SCRIPT = Path(__file__).parents[1] / "mesh_trajectory.py"


def start_on_virtual_devices(*arguments):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])},
    )


def errors_of(process):
    """{number of devices: [error after the first step, after the last]}."""
    printed, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, errors
    return json.loads(printed.splitlines()[-1])


def test_two_devices_give_what_one_gives():
    """Parameters and BatchNorm's statistics, after one step and after three."""
    first, last = errors_of(start_on_virtual_devices("float64", "3", "2"))["2"]
    assert first < 1e-11
    assert last < 1e-10


BOUNDS = {"float64": (1e-11, 1e-9), "float32": (1e-5, 1e-3)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS)
def test_any_number_of_devices_gives_what_one_gives(dtype):
    after_one, after_20 = BOUNDS[dtype]
    for first, last in errors_of(start_on_virtual_devices(dtype, "20", "2", "4", "8")).values():
        assert first < after_one
        assert last < after_20
