"""The optimizers and schedules by name, against formulas and against optax."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.optimizers import (
    LEARNING_RATES,
    NumpyOptimizerName,
    cosine_decay,
    make_numpy_optimizer,
    make_optimizer,
    make_schedule,
)
from numpy_ref import optim

OPTIONS = dict(base_lr=0.1, final_lr=0.1, gamma=1e-3, momentum=0.9, dampening=0.0, weight_decay=0.0)


def path(name, steps=5, **options):
    """The weights after some steps on 0.5·|w - 1|², from fixed starting points."""
    optimizer = make_optimizer(name, optax.constant_schedule(0.1), **(OPTIONS | options))
    params = {"kernel": jnp.array([[3.0, -2.0]]), "bias": jnp.array([0.5])}
    state = optimizer.init(params)
    for _ in range(steps):
        grads = jax.tree.map(lambda w: w - 1.0, params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_every_optimizer_moves_downhill(name):
    params = path(name, steps=20)
    assert float(jnp.abs(params["kernel"] - 1).sum()) < 5


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_weight_decay_leaves_biases_alone(name):
    plain, decayed = path(name), path(name, weight_decay=0.1)
    np.testing.assert_array_equal(plain["bias"], decayed["bias"])
    assert not np.array_equal(plain["kernel"], decayed["kernel"])


@pytest.mark.parametrize("dampening", [0.0, 0.9])
def test_sgd_by_hand(dampening):
    """m = 0.9·m + (1 - dampening)·g, w = w - 0.1·m."""
    w, m = np.array([3.0, -2.0]), 0.0
    for _ in range(5):
        m = 0.9 * m + (1 - dampening) * (w - 1)
        w = w - 0.1 * m
    np.testing.assert_allclose(path("sgd", dampening=dampening)["kernel"][0], w, rtol=1e-6)


def test_dampened_sgd_is_adabounds_limit():
    """With bounds that are shut from the start (gamma = 1e8) AdaBound is SGD with averaged gradients at final_lr."""
    limit = path("adabound", gamma=1e8)
    np.testing.assert_allclose(limit["kernel"], path("sgd", dampening=0.9)["kernel"], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("adam", optax.adam(0.1)), ("adamw", optax.adamw(0.1, weight_decay=0.0)), ("amsgrad", optax.amsgrad(0.1))],
)
def test_adams_are_optaxs(name, theirs):
    params = jnp.array([[3.0, -2.0]])
    state = theirs.init(params)
    for _ in range(5):
        updates, state = theirs.update(params - 1.0, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(path(name)["kernel"], params, rtol=1e-6)


@pytest.mark.parametrize("name", get_args(NumpyOptimizerName))
def test_numpys_optimizers_are_jaxs(name, x64):
    """Twenty steps along a cosine in float64; 1e-12 for the order in which factors are multiplied."""
    options = dict(base_lr=0.1, final_lr=0.1, gamma=1e-3, momentum=0.9, weight_decay=0.1 if name == "adamw" else 0.0)
    params = {"kernel": np.array([[3.0, -2.0]]), "bias": np.array([0.5])}
    ours = make_numpy_optimizer(name, cosine_decay(0.1, 20), **options)
    theirs = make_optimizer(name, make_schedule("cosine", 0.1, 20, 0), **options, dampening=0.0)
    expected = jax.tree.map(jnp.asarray, params)
    state, expected_state = ours.init(params), theirs.init(expected)
    for _ in range(20):
        updates, state = ours.update(jax.tree.map(lambda w: w - 1.0, params), state, params)
        params = optim.apply_updates(params, updates)
        updates, expected_state = theirs.update(jax.tree.map(lambda w: w - 1.0, expected), expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    for leaf in params:
        np.testing.assert_allclose(params[leaf], expected[leaf], rtol=1e-12)


def test_cosine_decay_is_the_cosine_schedule():
    """float32's rounding of the schedule, relative to its peak."""
    for step in (0, 1, 50, 99, 100, 150):
        assert cosine_decay(0.1, 100)(step) == pytest.approx(
            float(make_schedule("cosine", 0.1, 100, 0)(step)), abs=1e-8
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", {0: 1, 50: 1, 99: 1}),
        ("cosine", {0: 1, 50: 0.5, 100: 0}),
        ("step", {0: 1, 49: 1, 51: 0.1, 76: 0.01}),
        ("onecycle", {0: 1 / 25, 30: 1, 100: 1e-4 / 25}),
    ],
)
def test_schedules(name, expected):
    schedule = make_schedule(name, 1.0, 100, 0)
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-2, abs=1e-4)


def test_warmup_is_linear_and_then_the_schedule():
    schedule = make_schedule("cosine", 1.0, 100, 20)
    np.testing.assert_allclose([schedule(s) for s in (0, 10, 20, 60, 100)], [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_adabounds_bounds_refer_to_the_peak_though_the_warmup_starts_at_0():
    optimizer = make_optimizer("adabound", make_schedule("cosine", 0.1, 100, 10), **OPTIONS)
    optimizer.init(jnp.ones(2))


@pytest.mark.parametrize(
    ("name", "warmup", "message"), [("onecycle", 5, "leave --warmup-epochs at 0"), ("cosine", 100, "must be shorter")]
)
def test_schedules_that_make_no_sense(name, warmup, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, 1.0, 100, warmup)
