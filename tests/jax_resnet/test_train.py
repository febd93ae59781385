"""jax_resnet.train: one compilation, one update by hand, and a step that lowers for every platform."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_resnet import resnet
from jax_resnet.adabound import adabound
from jax_resnet.train import create_train_state, decay_mask, loss_and_logits, make_eval_step, make_train_step

CONFIG = resnet.resnet18(num_classes=7, in_channels=1)


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

    schedule = optax.linear_schedule(1e-3, 0.0, 10)
    optimizer = adabound(schedule)
    state = create_train_state(*resnet.init(CONFIG, jax.random.key(0)), optimizer)
    step = make_train_step(CONFIG, optimizer, preprocess=preprocess)
    for _ in range(3):
        state, metrics = step(state, *batch())
    assert traces == [(4, 32, 32, 1)]
    assert int(state.step) == 3
    state, _ = step(state, *batch(n=6))
    assert traces == [(4, 32, 32, 1), (6, 32, 32, 1)]
    assert np.isfinite(metrics["loss"])


def test_a_step_is_gradient_optimizer_update(x64):
    """SGD by hand from jax.grad; statistics follow the batch; 1e-12 for what jit reorders."""
    optimizer = optax.sgd(0.1)
    params, batch_stats = resnet.init(CONFIG, jax.random.key(0))
    images, labels = batch()
    images = images.astype(jnp.float64)
    loss = functools.partial(loss_and_logits, CONFIG, label_smoothing=0.2)
    (value, (logits, new_stats)), grads = jax.value_and_grad(loss, has_aux=True)(params, batch_stats, images, labels)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    step = make_train_step(CONFIG, optimizer, label_smoothing=0.2)
    state, metrics = step(create_train_state(params, batch_stats, optimizer), images, labels)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(state.batch_stats), jax.tree.leaves(new_stats), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-12)
    assert float(metrics["top1"]) == np.mean(np.argmax(logits, -1) == labels)
    np.testing.assert_array_equal(metrics["prediction"], np.argmax(logits, -1))


def test_label_smoothing_is_cross_entropy_with_smoothed_targets(x64):
    params, batch_stats = resnet.init(CONFIG, jax.random.key(0))
    images, labels = batch()
    value, (logits, _) = loss_and_logits(CONFIG, params, batch_stats, images, labels, label_smoothing=0.1)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 7), 0.1)
    assert float(value) == pytest.approx(float(optax.softmax_cross_entropy(logits, targets).mean()), rel=1e-12)


def test_training_learns_a_batch():
    """Twenty steps of AdaBound on one batch: the loss falls to less than a fifth."""
    optimizer = adabound(1e-3)
    state = create_train_state(*resnet.init(CONFIG, jax.random.key(0)), optimizer)
    step = make_train_step(CONFIG, optimizer)
    losses = []
    for _ in range(20):
        state, metrics = step(state, *batch(n=8))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 5


def test_steps_take_any_network_of_that_form():
    """A dense layer on the pixels, with an option of its own."""

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
    logits = resnet.apply(CONFIG, params, batch_stats, 2 * images, train=False).logits
    np.testing.assert_array_equal(result["prediction"], logits.argmax(-1))
    np.testing.assert_allclose(result["confidence"], jax.nn.softmax(logits).max(-1), rtol=1e-5)
    ranks = (logits > jnp.take_along_axis(logits, labels[:, None], 1)).sum(-1)
    np.testing.assert_array_equal(result["top5"], ranks < 5)
    np.testing.assert_allclose(
        result["loss"], optax.softmax_cross_entropy_with_integer_labels(logits, labels), rtol=1e-5
    )


def test_fewer_than_five_classes_have_a_top5():
    config = resnet.resnet18(num_classes=3, in_channels=1)
    images, _ = batch()
    result = make_eval_step(config)(*resnet.init(config, jax.random.key(0)), images, jnp.array([0, 1, 2, 0]))
    assert bool(result["top5"].all())


def test_resnet101_step_lowers_for_every_platform():
    """Lowered, not run: CPU, CUDA and TPU, with the convolution that belongs to each."""
    config = resnet.resnet101(num_classes=196, in_channels=1)
    optimizer = adabound(1e-3)
    state = jax.eval_shape(lambda key: create_train_state(*resnet.init(config, key), optimizer), jax.random.key(0))
    images = jax.ShapeDtypeStruct((8, 96, 96, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((8,), jnp.int32)
    step = make_train_step(config, optimizer)
    for platform, own_convolutions in {"cpu": False, "cuda": True, "tpu": True}.items():
        exported = jax.export.export(step, platforms=[platform])(state, images, labels)
        assert ("stablehlo.convolution" in exported.mlir_module()) == own_convolutions, platform
