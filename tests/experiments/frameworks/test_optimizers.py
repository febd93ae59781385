"""The optimizers and schedules by name, against formulas and against optax."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from experiments.frameworks.common import Recipe, adapter, adapter_for
from experiments.frameworks.experiment import LEARNING_RATES, CommonOptimizerName, Experiment
from experiments.frameworks.schedules import as_numbers, make_schedule
from numpy_ref import optim


def recipe(name, schedule, **options):
    return Recipe(Experiment(opt=name, learning_rate=0.1, **options), schedule, 20, None, None)


def make_optimizer(name, **options):
    return adapter("jax").make_optimizer(recipe(name, optax.constant_schedule(0.1), **options))


def updating(optimizer, params, apply_updates=optax.apply_updates):
    """(grads, params) -> the params after the next step."""
    state = optimizer.init(params)

    def update(grads, params):
        nonlocal state
        updates, state = optimizer.update(grads, state, params)
        return apply_updates(params, updates)

    return update


def descend(update, params, steps=5):
    """Takes steps down 0.5·|w - 1|²."""
    for _ in range(steps):
        params = update(jax.tree.map(lambda w: w - 1.0, params), params)
    return params


START = {"kernel": np.array([[3.0, -2.0]]), "bias": np.array([0.5])}


def path(name, steps=5, **options):
    """The weights after some steps of an optimizer by its name."""
    params = jax.tree.map(jnp.asarray, START)
    return descend(updating(make_optimizer(name, **options), params), params, steps)


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_every_optimizer_moves_downhill_and_decays_kernels_alone(name):
    assert float(jnp.abs(path(name, steps=20)["kernel"] - 1).sum()) < 5
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


def test_a_scaled_loss_is_a_scaled_rate_for_sgd():
    """A power of two is exact. Adam ignores the scale."""
    rate = optax.constant_schedule(0.4)
    plain, scaled = recipe("sgd", rate), recipe("sgd", optax.constant_schedule(0.1), loss_scale=4.0)
    params = jax.tree.map(jnp.asarray, START)
    ends = [descend(updating(adapter("jax").make_optimizer(r), params), params) for r in (plain, scaled)]
    np.testing.assert_array_equal(*(end["kernel"] for end in ends))
    np.testing.assert_allclose(path("adam", loss_scale=4.0)["kernel"], path("adam")["kernel"], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("adam", optax.adam(0.1)), ("adamw", optax.adamw(0.1, weight_decay=0.0)), ("amsgrad", optax.amsgrad(0.1))],
)
def test_adams_are_optaxs(name, theirs):
    params = jnp.array([[3.0, -2.0]])
    np.testing.assert_allclose(path(name)["kernel"], descend(updating(theirs, params), params), rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", get_args(CommonOptimizerName))
def test_the_frameworks_optimizers_are_one(name, weight_decay, x64):
    """The optimizers agree in twenty steps of a cosine in float64; 1e-12 is for the order of multiplications."""
    ours = recipe(name, make_schedule("cosine", 0.1, 20, 0), weight_decay=weight_decay, final_lr=0.5, gamma=0.01)
    start = jax.tree.map(jnp.asarray, START)
    jaxs = descend(updating(adapter("jax").make_optimizer(ours), start), start, 20)
    numpys = updating(adapter("numpy").make_optimizer(ours), START, optim.apply_updates)
    for leaf, array in descend(numpys, START, 20).items():
        np.testing.assert_allclose(array, jaxs[leaf], rtol=1e-12)

    model = torch.nn.Module()
    for leaf, array in START.items():
        model.register_parameter(leaf, torch.nn.Parameter(torch.tensor(array)))
    optimizer = adapter("torch").make_optimizer(ours, model)
    rate = as_numbers(ours.schedule, 20)
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        (0.5 * sum(((param - 1) ** 2).sum() for param in model.parameters())).backward()
        optimizer.step()
    for leaf, param in model.named_parameters():
        np.testing.assert_allclose(param.detach(), jaxs[leaf], rtol=1e-12)


def test_torchs_optimizer_leaves_frozen_parameters_out():
    model = torch.nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    groups = adapter("torch").make_optimizer(recipe("adam", None), model).param_groups
    assert [param for group in groups for param in group["params"]] == [model.weight]


@pytest.mark.parametrize(
    ("framework", "opt", "dampening", "message"),
    [
        ("numpy", "amsgrad", 0.0, "--opt amsgrad is only in JAX: --framework numpy has adam, adamw, sgd, adabound"),
        ("torch", "adaboundw", 0.0, "--opt adaboundw is only in JAX"),
        ("torch", "sgd", 0.5, "--dampening is not in torch"),
    ],
)
def test_what_a_framework_does_not_have_is_refused(framework, opt, dampening, message):
    with pytest.raises(ValueError, match=message):
        adapter_for(Experiment(framework=framework, opt=opt, dampening=dampening))
    assert adapter_for(Experiment(framework="numpy", opt="sgd", dampening=0.5)) is adapter("numpy")


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
    """Rates are as by hand; as plain numbers, with a warm-up, they equal jit's to the bit."""
    schedule = make_schedule(name, 1.0, 100, 0)
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-2, abs=1e-4)
    schedule = make_schedule(name, 0.1, 50, 0 if name == "onecycle" else 5)
    rates = as_numbers(schedule, 50)
    for step in (0, 1, 4, 5, 6, 25, 49):
        assert type(rates(step)) is float
        assert rates(step) == float(jax.jit(schedule)(jnp.int32(step)))


def test_warmup_is_linear_and_then_the_schedule():
    schedule = make_schedule("cosine", 1.0, 100, 20)
    np.testing.assert_allclose([schedule(s) for s in (0, 10, 20, 60, 100)], [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_adabounds_bounds_refer_to_the_peak_though_the_warmup_starts_at_0():
    optimizer = adapter("jax").make_optimizer(recipe("adabound", make_schedule("cosine", 0.1, 100, 10)))
    optimizer.init(jnp.ones(2))


@pytest.mark.parametrize(
    ("name", "warmup", "message"), [("onecycle", 5, "leave --warmup-epochs at 0"), ("cosine", 100, "must be shorter")]
)
def test_schedules_that_make_no_sense(name, warmup, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, 1.0, 100, warmup)
