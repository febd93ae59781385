"""numpy_ref.train: the steps of jax_resnet.train in NumPy."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import close, same

import jax_resnet.resnet
import jax_resnet.train
import numpy_ref.train
from numpy_ref import optim, resnet
from numpy_ref.train import create_train_state, make_eval_step, make_train_step, smoothed_cross_entropy

CONFIG, JAX_CONFIG = (
    module.ResNetConfig("basic", (1, 1, 1, 1), num_classes=7, in_channels=1) for module in (resnet, jax_resnet.resnet)
)


def batch(n=8, size=32):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, size, size, 1)), rng.integers(0, 7, n).astype(np.int32)


@pytest.mark.parametrize(("freeze_backbone", "batch_norm"), [(False, True), (True, True), (False, False)])
def test_steps_are_jaxs_and_leave_their_input_alone(freeze_backbone, batch_norm, x64):
    """Two steps of SGD in float64; `preprocess` depends on the step. 1e-9 of an array's largest entry is for rounding.
    A frozen backbone runs in evaluation mode, and only the dense layer changes."""
    images, labels = batch()
    of_numpy, of_jax = (dataclasses.replace(config, batch_norm=batch_norm) for config in (CONFIG, JAX_CONFIG))
    params, batch_stats = resnet.init(of_numpy, np.random.default_rng(1), np.float64)
    before = copy.deepcopy((params, batch_stats))
    results = []
    for train, config, optimizer, array in (
        (numpy_ref.train, of_numpy, optim.sgd(0.1, 0.9), np.asarray),
        (jax_resnet.train, of_jax, optax.sgd(0.1, 0.9), jnp.array),
    ):
        options = dict(label_smoothing=0.1, preprocess=lambda images, step: images * (1 + step))
        step = train.make_train_step(config, optimizer, freeze_backbone=freeze_backbone, **options)
        trees = jax.tree.map(array, (params, batch_stats))
        state = train.create_train_state(*trees, optimizer, freeze_backbone=freeze_backbone)
        for _ in range(2):
            state, metrics = step(state, images, labels)
        results.append((state, metrics))
    (ours, our_metrics), (theirs, their_metrics) = results
    assert int(ours.step) == int(theirs.step) == 2
    assert set(their_metrics) - set(our_metrics) == {"finite", "grad_norm"}
    assert float(our_metrics["loss"]) == pytest.approx(float(their_metrics["loss"]), rel=1e-9)
    assert float(our_metrics["top1"]) == float(their_metrics["top1"])
    np.testing.assert_array_equal(our_metrics["prediction"], their_metrics["prediction"])
    close((ours.params, ours.batch_stats), (theirs.params, theirs.batch_stats), 1e-9)
    same((params, batch_stats), before)
    if freeze_backbone:
        for state, trace in ((ours, ours.opt_state.trace), (theirs, theirs.opt_state[0].trace)):
            assert [leaf.shape for leaf in jax.tree.leaves(trace)] == [(7,), (512, 7)]
            same((state.params | {"fc": {}}, state.batch_stats), (params | {"fc": {}}, batch_stats))
            for name, array in params["fc"].items():
                assert not np.array_equal(state.params["fc"][name], array), name


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_jaxs(label_smoothing, x64):
    """Losses and gradients in float64, of logits as large as 700; 1e-12 is for rounding."""
    rng = np.random.default_rng(0)
    logits, labels = 300 * rng.standard_normal((6, 5)), np.array([0, 4, 2, 2, 1, 3])
    weights = rng.standard_normal(6)

    def theirs(logits):
        def apply(*arguments, **options):
            return jax_resnet.resnet.Output(logits, {}, {})

        return jax_resnet.train.loss_and_logits(
            None, {}, {}, None, labels, label_smoothing=label_smoothing, apply=apply
        )[0]

    losses, vjp = smoothed_cross_entropy(logits, labels, label_smoothing)
    assert losses.mean() == pytest.approx(float(theirs(logits)), rel=1e-12)
    (gradient,) = vjp(np.full(6, 1 / 6))
    np.testing.assert_allclose(gradient, jax.grad(theirs)(jnp.asarray(logits)), rtol=0, atol=1e-12)
    (weighted,) = vjp(weights)
    np.testing.assert_allclose(weighted, 6 * weights[:, None] * gradient, rtol=0, atol=1e-12)


def test_eval_step_is_jaxs(x64):
    """The eighth picture is black and the head's bias is 0, so all its logits are equal and the first classes win."""
    images, labels = batch()
    images[7] = 0
    params, batch_stats = resnet.init(CONFIG, np.random.default_rng(1), np.float64)
    params["fc"]["bias"][:] = 0
    ours = make_eval_step(CONFIG, preprocess=lambda x: 2 * x)(params, batch_stats, images, labels)
    theirs = jax_resnet.train.make_eval_step(JAX_CONFIG, preprocess=lambda x: 2 * x)(
        *jax.tree.map(jnp.asarray, (params, batch_stats)), images, labels
    )
    assert set(ours) == set(theirs)
    for name in ("loss", "confidence"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9)
    for name in ("prediction", "top5"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert ours["prediction"][7] == 0
    assert ours["confidence"][7] == pytest.approx(1 / 7)


def test_fewer_than_five_classes_have_a_top5():
    config = resnet.ResNetConfig("basic", (1, 1, 1, 1), num_classes=3, in_channels=1)
    images, _ = batch(n=3)
    params, batch_stats = resnet.init(config, np.random.default_rng(0))
    result = make_eval_step(config)(params, batch_stats, images.astype(np.float32), np.array([0, 1, 2]))
    assert result["top5"].all()


def test_an_overflow_shows_in_the_loss_alone(recwarn):
    """Even then, float32 stays float32."""
    images, labels = batch()
    optimizer = optim.sgd(1e30)
    state = create_train_state(*resnet.init(CONFIG, np.random.default_rng(0)), optimizer)
    step = make_train_step(CONFIG, optimizer)
    for _ in range(2):
        state, metrics = step(state, images.astype(np.float32), labels)
    assert not np.isfinite(metrics["loss"])
    assert not recwarn.list
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))} == {np.dtype(np.float32)}
