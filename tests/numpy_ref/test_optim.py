"""numpy_ref.optim: every optimizer against optax and jax_resnet; trainings are compared in tests/experiments/parity."""

import copy
import math

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import close

from jax_resnet import adabound as jax_adabound
from numpy_ref import optim


def jax_sgd(learning_rate, momentum=0.0, nesterov=False, dampening=0.0):
    """optax's SGD with dampening, which optax lacks."""
    if nesterov:
        return optax.sgd(learning_rate, momentum, nesterov=True)
    trace = optax.chain(optax.scale(1 - dampening), optax.trace(momentum))
    return optax.chain(trace, optax.scale_by_learning_rate(learning_rate))


ALIASES = {
    "sgd": (optim.sgd, jax_sgd),
    "adam": (optim.adam, optax.adam),
    "adamw": (optim.adamw, optax.adamw),
    "adabound": (optim.adabound, jax_adabound.adabound),
    "amsbound": (optim.amsbound, jax_adabound.amsbound),
}
STATES = {"sgd": "TraceState", "adam": "ScaleByAdamState", "adamw": "ScaleByAdamState"}

every_optimizer = pytest.mark.parametrize("name", ALIASES)


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def numpy_state(name, opt_state, count):
    """optax's state after `count` updates as a state of numpy_ref, field by field."""
    state = optax.tree.get(opt_state, STATES.get(name, "AdaBoundState"))
    fields = {field: as_numpy(value) for field, value in state._asdict().items()} | {"count": count}
    if "count" in state._fields:
        assert state.count == count
    cls = {"sgd": optim.SgdState, "adam": optim.AdamState, "adamw": optim.AdamState}.get(name, optim.AdaBoundState)
    return cls(**fields)


def small_tree(rng, scale=1.0, dtype=np.float64):
    """Several ranks, an empty array, an empty dict."""
    shapes = {"conv1": {"weight": (2, 3, 4)}, "layer1": {"0": {"bias": (3,), "gain": ()}, "1": {}}, "fc": (0, 2)}
    return jax.tree.map(
        lambda shape: np.asarray(rng.normal(size=shape) * scale, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


# Against optax and jax_resnet.


def falling(count):
    """A schedule for both libraries: plain arithmetic, which is float64 under x64."""
    return 0.05 / (1.0 + 0.2 * count)


def warm_up(count):
    return 0.01 * count


def only_kernels(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


# Squares of these keep all digits in float64; XLA would round the squares of numbers below 1e-154 to 0.
SCALES = {"zero": 0.0, "tiny": 1e-140, "small": 1e-6, "middle": 1.0, "huge": 1e140}
MASK = {"conv1": {"weight": True}, "layer1": {"0": {"bias": False, "gain": True}, "1": {}}, "fc": False}
MASK = dict.fromkeys(SCALES, MASK)

CASES = {
    "sgd": ("sgd", {}),
    "sgd, momentum": ("sgd", {"momentum": 0.9}),
    "sgd, dampening": ("sgd", {"momentum": 0.9, "dampening": 0.9}),
    "sgd, nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "sgd, schedule": ("sgd", {"momentum": 0.9, "learning_rate": falling}),
    "adam": ("adam", {}),
    "adam, b1 = 0": ("adam", {"b1": 0.0}),
    "adam, b1 = b2 = 0": ("adam", {"b1": 0.0, "b2": 0.0}),
    "adam, eps": ("adam", {"b1": 0.8, "b2": 0.95, "eps": 1e-3}),
    "adam, eps_root": ("adam", {"eps_root": 1e-6}),
    "adam, schedule": ("adam", {"learning_rate": falling}),
    "adam, schedule from 0": ("adam", {"learning_rate": warm_up}),
    "adamw": ("adamw", {}),
    "adamw, decay": ("adamw", {"weight_decay": 0.3, "learning_rate": falling}),
    "adamw, mask": ("adamw", {"weight_decay": 0.3, "mask": MASK}),
    "adamw, mask function": ("adamw", {"weight_decay": 0.3, "mask": only_kernels}),
    "adabound": ("adabound", {}),
    "adabound, hyperparameters": ("adabound", {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "gamma": 0.02, "final_lr": 0.3}),
    "adabound, b1 = b2 = 0": ("adabound", {"b1": 0.0, "b2": 0.0}),
    "adabound, eps = 0": ("adabound", {"eps": 0.0}),
    "adabound, eps_root": ("adabound", {"eps_root": 1e-6}),
    "adabound, shut": ("adabound", {"gamma": math.inf}),
    "adabound, wide open": ("adabound", {"gamma": 1e-12}),
    "adabound, final_lr = 0": ("adabound", {"final_lr": 0.0}),
    "adabound, schedule": ("adabound", {"learning_rate": falling}),
    "adabound, schedule from 0": ("adabound", {"learning_rate": warm_up, "base_lr": 0.05}),
    "adabound, decay": ("adabound", {"weight_decay": 0.3}),
    "adabound, mask": ("adabound", {"weight_decay": 0.3, "mask": MASK}),
    "adabound, mask function": ("adabound", {"weight_decay": 0.3, "mask": only_kernels}),
    "adabound, option": ("adabound", {"amsbound": True}),
    "amsbound": ("amsbound", {}),
    "amsbound, everything": (
        "amsbound",
        {"learning_rate": falling, "base_lr": 0.1, "weight_decay": 0.3, "mask": MASK, "eps_root": 1e-6, "gamma": 0.1},
    ),
}


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_updates_are_those_of_jax(name, options, x64):
    """Each of 60 updates in float64 starts from JAX's state, with gradients of all scales that shrink a thousandfold.
    Updates and moments are within 1e-12 of each array's largest entry; cancellation in optax's 1 - 0.999**t alone costs
    1e-13 at t = 1."""
    options = {"learning_rate": 0.05} | options
    ours, theirs = (alias(**options) for alias in ALIASES[name])
    rng = np.random.default_rng(0)
    params = {scale: small_tree(rng) for scale in SCALES}
    opt_state = theirs.init(params)
    close(ours.init(params), numpy_state(name, opt_state, 0), 0.0)
    jax_update = jax.jit(theirs.update)
    for count in range(60):
        grads = {name: small_tree(rng, scale * 10 ** (-count / 20)) for name, scale in SCALES.items()}
        updates, state = ours.update(grads, numpy_state(name, opt_state, count), params)
        jax_updates, opt_state = jax_update(grads, opt_state, params)
        close(updates, as_numpy(jax_updates), 1e-12)
        close(state, numpy_state(name, opt_state, count + 1), 1e-12)
        new_params = optim.apply_updates(params, as_numpy(jax_updates))
        close(new_params, as_numpy(optax.apply_updates(params, jax_updates)), 0.0)
        params = new_params


# Types, and what is left alone.


@every_optimizer
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(name, dtype):
    """Updates have the gradients' type, parameters keep theirs, and moments are at least float32."""
    optimizer = ALIASES[name][0](0.1)
    params = small_tree(np.random.default_rng(0), dtype=dtype)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params)
        params = optim.apply_updates(params, updates)
        assert {leaf.dtype for leaf in jax.tree.leaves((updates, params))} == {np.dtype(dtype)}
        assert {m.dtype for m in jax.tree.leaves(state[1:])} == {np.promote_types(dtype, np.float32)}
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((updates, params, state[1:])))


@every_optimizer
def test_a_float64_learning_rate_does_not_widen_float32(name):
    """A NumPy number makes NumPy compute in that number's type; a Python number must give the same bits."""
    grads = np.random.default_rng(0).normal(size=100).astype(np.float32)

    def update(learning_rate):
        optimizer = ALIASES[name][0](learning_rate)
        return optimizer.update(grads, optimizer.init(grads), grads)[0]

    for learning_rate in (np.float64(0.1), lambda count: np.float64(0.1)):
        np.testing.assert_array_equal(update(learning_rate), update(0.1))


def test_gradients_and_parameters_of_different_dtypes():
    optimizer = optim.adamw(0.1)
    params = {"a": np.ones(3, np.float32)}
    updates, state = optimizer.update({"a": np.ones(3, np.float16)}, optimizer.init(params), params)
    assert (updates["a"].dtype, state.nu["a"].dtype) == (np.float16, np.float32)
    assert optim.apply_updates(params, updates)["a"].dtype == np.float32


@pytest.mark.parametrize("name", ["adabound", "amsbound"])
def test_float16_does_not_overflow(name):
    """At t = 1 the upper bound is 1001 · final_lr / learning_rate = 1e5, more than float16 holds. The square of 6e4 is
    too large as well, and that of 6e-4 loses digits. The update equals float32's to within 2^-11."""
    grads = np.array([6e-4, -1.0, 6e4])
    optimizer = ALIASES[name][0](1e-3)
    updates = {}
    for dtype in (np.float16, np.float32):
        state = optimizer.init(grads.astype(dtype))
        updates[dtype], _ = optimizer.update(grads.astype(np.float16).astype(dtype), state)
    assert np.isfinite(updates[np.float16]).all()
    np.testing.assert_allclose(updates[np.float16], updates[np.float32], rtol=2**-11)


@every_optimizer
def test_nothing_is_changed_and_nothing_is_shared(name):
    options = {"weight_decay": 0.1} if name not in ("sgd", "adam") else {}
    optimizer = ALIASES[name][0](0.1, **options)
    params = small_tree(np.random.default_rng(0))
    grads = small_tree(np.random.default_rng(1))
    state = optimizer.init(params)
    _, state = optimizer.update(grads, state, params)
    before = copy.deepcopy((grads, state, params))
    results = optimizer.update(grads, state, params)
    new_params = optim.apply_updates(params, results[0])
    close((grads, state, params), before, 0.0)
    for result in jax.tree.leaves((results, new_params)):
        assert not any(np.shares_memory(result, given) for given in jax.tree.leaves((grads, state, params)))


@every_optimizer
def test_memory_order_does_not_matter(name):
    optimizer = ALIASES[name][0](0.1)
    params = {"a": np.random.default_rng(0).normal(size=(3, 4, 5))}
    turned = {"a": np.asfortranarray(params["a"])}
    expected, _ = optimizer.update(params, optimizer.init(params), params)
    close(optimizer.update(turned, optimizer.init(params), params)[0], expected, 0.0)


@pytest.mark.parametrize("b2", [0.999, 1 - 1e-10])
def test_the_bias_correction_keeps_its_digits(b2):
    """With a constant gradient, v / (1 - b2^t) is its square and Adam's update is the learning rate. 2e-15 is for ten
    roundings of v; 1 - b2**t would cost 1e-14 and 1e-7 with these b2."""
    optimizer = optim.adam(1.0, b1=0.0, b2=b2, eps=0.0)
    grads = np.array([-2.0, 0.3])
    state = optimizer.init(grads)
    for _ in range(10):
        updates, state = optimizer.update(grads, state)
        np.testing.assert_allclose(updates, [1.0, -1.0], rtol=2e-15)


# AdaBound's bounds.


@settings(deadline=None)  # the machine may be busy
@given(
    gradients=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8),
    learning_rate=st.floats(1e-6, 1e3),
    final_lr=st.floats(0, 1e3),
    base_lr=st.none() | st.floats(1e-6, 1e3),
    b1=st.floats(0, 0.99),
    b2=st.floats(0, 0.9999),
    eps=st.sampled_from([0.0, 1e-8, 1.0]),
    gamma=st.floats(1e-6, 1e6),
    amsbound=st.booleans(),
)
def test_the_step_is_within_its_bounds(gradients, learning_rate, final_lr, base_lr, gamma, amsbound, **options):
    """The step goes against the moment, and its size is within learning_rate · [lower, upper] · |m|. 1e-14 is for the
    rounding of products, 1e-300 for products that are too small to keep all digits."""
    optimizer = optim.adabound(learning_rate, final_lr, base_lr=base_lr, amsbound=amsbound, gamma=gamma, **options)
    state = optimizer.init(np.zeros(()))
    ratio = final_lr / (learning_rate if base_lr is None else base_lr)
    for t, g in enumerate(gradients, start=1):
        update, state = optimizer.update(np.array(g), state)
        lower, upper = ratio * gamma * t / (gamma * t + 1), ratio * (gamma * t + 1) / (gamma * t)
        size = learning_rate * np.array([lower, upper]) * abs(state.mu)
        assert size[0] * (1 - 1e-14) - 1e-300 <= abs(update) <= size[1] * (1 + 1e-14) + 1e-300
        assert np.sign(update) in (0, -np.sign(state.mu))


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.sgd(0.1, momentum=-0.1), "momentum must be >= 0, got -0.1"),
        (lambda: optim.sgd(0.1, nesterov=True), "nesterov needs a momentum > 0 and no dampening, got momentum 0.0"),
        (lambda: optim.sgd(0.1, 0.9, nesterov=True, dampening=0.5), "no dampening, got momentum 0.9 and dampening 0.5"),
        (lambda: optim.adam(0.1, b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
        (lambda: optim.adamw(0.1, b2=-0.1), r"b2 must be in \[0, 1\), got -0.1"),
        (lambda: optim.adam(0.1, b2=math.nan), r"b2 must be in \[0, 1\), got nan"),
        (lambda: optim.adam(0.1, eps=-1e-8), "eps must be >= 0, got -1e-08"),
        (lambda: optim.adamw(0.1, eps_root=-1.0), "eps_root must be >= 0, got -1.0"),
        (lambda: optim.adabound(0.1, b1=1), r"b1 must be in \[0, 1\), got 1"),
        (lambda: optim.amsbound(0.1, b2=1.5), r"b2 must be in \[0, 1\), got 1.5"),
        (lambda: optim.adabound(0.1, gamma=0.0), "gamma must be > 0, got 0.0"),
        (lambda: optim.amsbound(0.1, gamma=-1e-3), "gamma must be > 0, got -0.001"),
        (lambda: optim.adabound(0.1, final_lr=-0.1), "final_lr must be >= 0, got -0.1"),
        (lambda: optim.adabound(0.1, eps=-1.0), "eps must be >= 0, got -1.0"),
        (lambda: optim.adabound(0.0), "got 0.0 from learning_rate: pass base_lr"),
        (lambda: optim.adabound(warm_up), "got 0.0 from learning_rate: pass base_lr"),
        (lambda: optim.amsbound(np.array(0.1)), r"got array\(0.1\) from learning_rate: pass base_lr"),
        (lambda: optim.adabound(0.1, base_lr=0.0), "base_lr must be a number > 0, got 0.0"),
        (lambda: optim.adabound(0.1, base_lr=-1.0), "base_lr must be a number > 0, got -1.0"),
        (lambda: optim.adabound(0.1, base_lr=falling), "base_lr must be a number > 0, got <function falling"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_array_as_learning_rate_needs_base_lr():
    given = optim.adabound(np.array(0.1), base_lr=0.1)
    number = optim.adabound(0.1)
    grads = np.array([1e-4, 1.0])
    close(given.update(grads, given.init(grads))[0], number.update(grads, number.init(grads))[0], 0.0)


@every_optimizer
def test_complex_numbers_are_refused(name):
    optimizer = ALIASES[name][0](0.1)
    params = {"a": np.ones(2)}
    for call in (
        lambda: optimizer.init({"a": np.ones(2, np.complex64)}),
        lambda: optimizer.update({"a": np.ones(2, np.complex64)}, optimizer.init(params), params),
    ):
        with pytest.raises(TypeError, match="parameters and gradients must be real, got complex64"):
            call()


@pytest.mark.parametrize("name", ["adamw", "adabound", "amsbound"])
def test_weight_decay_needs_the_parameters(name):
    optimizer = ALIASES[name][0](0.1, weight_decay=0.1)
    grads = {"a": np.ones(2)}
    with pytest.raises(ValueError, match=r"weight_decay is 0\.1: pass the parameters"):
        optimizer.update(grads, optimizer.init(grads))


def test_trees_that_do_not_fit_are_refused():
    params = {"fc": {"bias": np.ones(2)}}
    optimizer = optim.adamw(0.1, mask={"fc": True})
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"the same names, but at fc they have \['weight'\] and \['bias'\]"):
        optim.apply_updates({"fc": {"weight": np.ones(2)}}, params)
    with pytest.raises(ValueError, match=r"at layer1\.0\.fc they have \['weight'\] and \['bias'\]"):
        optim.apply_updates({"layer1": {"0": {"fc": {"weight": np.ones(2)}}}}, {"layer1": {"0": params}})
    with pytest.raises(ValueError, match=r"at the root they have \['fc'\] and \['bias'\]"):
        optim.apply_updates(params, params["fc"])
    with pytest.raises(ValueError, match=r"at fc they have \['bias'\] and an array"):
        optimizer.update(params, state, params)
    with pytest.raises(ValueError, match=r"must have the same shape, got \[\(1, 2\), \(2,\), \(2,\), \(2,\)\]"):
        optim.adamw(0.1).update({"fc": {"bias": np.ones((1, 2))}}, state, params)
