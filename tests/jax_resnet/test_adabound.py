"""jax_resnet.adabound: the recurrence of the paper and its authors, and all that optax asks of an optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from trees import close

from jax_resnet.adabound import AdaBoundState, adabound, adaboundw, amsbound, scale_by_adabound
from jax_resnet.step_sizes import step_sizes

# final_lr is so close to the learning rate, and gamma so large, that both bounds act within a few steps.
OPTIMIZERS = {
    "amsbound": lambda **kwargs: amsbound(0.05, **kwargs),
    "adaboundw": lambda **kwargs: adaboundw(0.05, **kwargs),
    "adabound, every option": lambda **kwargs: adabound(
        **{
            "learning_rate": optax.linear_schedule(0.0, 0.05, 3),
            "base_lr": 0.05,
            "gamma": 0.1,
            "weight_decay": 1e-3,
            "eps_root": 1e-10,
            "mu_dtype": "float32",
            "amsbound": True,
            **kwargs,
        }
    ),
}
ALIASES = {"adabound": adabound, "amsbound": amsbound, "adaboundw": adaboundw}

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
every_alias = pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)


def params_and_grads(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    params = {"a": rng.normal(size=(2, 3)), "b": [rng.normal(size=4), rng.normal(size=())]}
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape) * 3, params)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, grads))


def dtype_of(x):
    return x.dtype


def stack(*trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def jitted(optimizer):
    return optax.GradientTransformation(jax.jit(optimizer.init), jax.jit(optimizer.update))


def find_state(opt_state):
    return optax.tree.get(opt_state, "AdaBoundState")


def run(optimizer, params, grads, steps=5):
    """All updates, one tree per step, and the last state; gradients change from step to step."""
    state, updates = optimizer.init(params), []
    for step in range(steps):
        scaled = jax.tree.map(lambda g, factor=1.0 - 0.3 * step: g * jnp.asarray(factor, g.dtype), grads)
        update, state = optimizer.update(scaled, state, params)
        params = optax.apply_updates(params, update)
        updates.append(update)
    return updates, state


# The recurrence.


def recurrence(
    param, grads, learning_rates, final_lr, base_lr, b1, b2, eps, gamma, eps_root, l2, decoupled, is_amsbound
):
    """The paper's Algorithm 2 with the authors' bias correction and bounds, in NumPy, for one array. Returns a list
    with one (update, where it was clipped: -1, 0 or 1) per step."""
    m, v, v_max, history = np.zeros_like(param), np.zeros_like(param), np.zeros_like(param), []
    for t, (grad, learning_rate) in enumerate(zip(grads, learning_rates, strict=True), start=1):
        g = grad + l2 * param
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        v_max = np.maximum(v_max, v)
        denominator = np.sqrt((v_max if is_amsbound else v) + eps_root) + eps
        step_size = learning_rate * np.sqrt(1 - b2**t) / (1 - b1**t) / denominator
        final = final_lr * learning_rate / base_lr
        lower, upper = final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t))
        clipped = np.clip(step_size, lower, upper)
        update = -clipped * m - learning_rate * decoupled * param
        param = param + update
        history.append((update, np.where(step_size < lower, -1, np.where(step_size > upper, 1, 0))))
    return history


def through_zero(t):
    """The rate falls from 2e-3 to 0 at t = 80, stays 0 until t = 120, and rises again."""
    return 2e-3 * np.maximum(0.0, np.abs(t - 100.0) - 20.0) / 80.0


def warm_up(t):
    return 1e-3 * np.minimum(1.0, t / 50.0)


def as_schedule(function):
    """The same function of t for JAX, in float64."""

    def schedule(count):
        t = jnp.asarray(count, jnp.float64)
        if function is warm_up:
            return 1e-3 * jnp.minimum(1.0, t / 50.0)
        return 2e-3 * jnp.maximum(0.0, jnp.abs(t - 100.0) - 20.0) / 80.0

    return schedule


CASES = {
    "adabound": (adabound, {}),
    "adabound, other hyperparameters": (adabound, {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "gamma": 0.02, "final_lr": 0.3}),
    "b1 = 0": (adabound, {"b1": 0.0}),
    "b1 = b2 = 0": (adabound, {"b1": 0.0, "b2": 0.0}),
    "integer b1": (adabound, {"b1": 0}),
    "eps_root": (adabound, {"eps_root": 1e-10}),
    "base_lr": (adabound, {"base_lr": 5e-3}),
    "amsbound": (amsbound, {}),
    "amsbound, option": (adabound, {"amsbound": True}),
    "L2": (adabound, {"weight_decay": 0.3}),
    "amsbound, L2": (amsbound, {"weight_decay": 0.3}),
    "adaboundw": (adaboundw, {"weight_decay": 0.3}),
    "adaboundw, its default decay": (adaboundw, {}),
    "adaboundw, amsbound": (adaboundw, {"weight_decay": 0.3, "amsbound": True}),
    "schedule through 0": (adabound, {"learning_rate": through_zero}),
    "schedule through 0, adaboundw": (adaboundw, {"learning_rate": through_zero, "weight_decay": 0.3}),
    "schedule from 0": (adabound, {"learning_rate": warm_up, "base_lr": 1e-3}),
    "schedule from 0, amsbound": (amsbound, {"learning_rate": warm_up, "base_lr": 1e-3, "weight_decay": 0.1}),
}


@pytest.mark.parametrize(("alias", "options"), CASES.values(), ids=CASES)
def test_updates_follow_the_recurrence(alias, options, x64):
    """In float64, 200 updates are within 1e-12 of the largest entry; the recurrence's 1 - 0.999 alone costs 1e-13. The
    arrays' gradients differ in scale by up to 1e8, so that each bound acts somewhere and neither does elsewhere."""
    steps, rng = 200, np.random.default_rng(0)
    scales = {"small": 1e-5, "middle": 0.1, "large": 1e3}
    params = {name: rng.normal(size=6) * min(scale, 10.0) for name, scale in scales.items()}
    grads = {name: rng.normal(size=(steps, 6)) * scale for name, scale in scales.items()}
    grads = {name: g * (1 + 5 * (np.arange(steps)[:, None] < 20)) for name, g in grads.items()}  # large, then smaller

    options = {"learning_rate": 1e-3, **options}
    rate = options["learning_rate"]
    hyper = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "gamma": 1e-3, "final_lr": 0.1, "eps_root": 0.0}
    hyper.update({name: value for name, value in options.items() if name in hyper})
    decay = options.get("weight_decay", 1e-4 if alias is adaboundw else 0.0)
    hyper.update(l2=0.0 if alias is adaboundw else decay, decoupled=decay if alias is adaboundw else 0.0)
    rates = [rate(t) if callable(rate) else rate for t in range(steps)]
    hyper["base_lr"] = options.get("base_lr", rates[0])
    hyper["is_amsbound"] = alias is amsbound or options.get("amsbound", False)
    expected = {name: recurrence(params[name], grads[name], rates, **hyper) for name in scales}

    optimizer = alias(**{**options, "learning_rate": as_schedule(rate) if callable(rate) else rate})

    def step(carry, grads):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    params = jax.tree.map(jnp.asarray, params)
    _, updates = jax.lax.scan(step, (params, optimizer.init(params)), jax.tree.map(jnp.asarray, grads))

    seen = set()
    for name in scales:
        wanted = np.stack([update for update, _ in expected[name]])
        error = np.abs(np.asarray(updates[name]) - wanted).max(1)
        assert updates[name].dtype == np.float64
        assert (error <= 1e-12 * np.abs(wanted).max(1)).all(), f"{name}: step {error.argmax() + 1}, {error.max()}"
        seen |= set(np.unique([where for _, where in expected[name]]))
    assert seen == {-1, 0, 1}


# Two ways to the same updates.


def averaging_sgd():
    return optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.5))


def arrays_of(options):
    return {name: jnp.array(value) for name, value in options.items()}


def injected(alias, **options):
    return optax.inject_hyperparams(alias)(**options)


def ways(alias):
    """Rows of SAME for every alias."""
    from_0, number = optax.linear_schedule(0.0, 2e-2, 4), {"learning_rate": 1e-2, "gamma": 0.1}
    constants, schedule = {**number, "final_lr": 0.5, "base_lr": 1e-2}, {"learning_rate": from_0, "base_lr": 1e-3}
    return {
        # In a float32 array, b2 = 0.999 is rounded, so 1 - b2 is wrong by 1e-5.
        "injected constants": ("float32", lambda: injected(alias, **constants), lambda: alias(**constants), 1e-4),
        # The bounds follow the schedule through base_lr.
        "an injected schedule": ("float64", lambda: injected(alias, **schedule), lambda: alias(**schedule), 1e-13),
        "final_lr_ratio": (
            "float64", lambda: alias(from_0, final_lr_ratio=50.0), lambda: alias(from_0, 0.5, base_lr=1e-2), 0,
        ),
        "injected final_lr_ratio": (
            "float64", lambda: injected(alias, **number, final_lr_ratio=50.0), lambda: alias(**number, final_lr=0.5),
            1e-12,
        ),
        "final_lr is 0.1": ("float64", lambda: alias(1e-2), lambda: alias(1e-2, 0.1), 0),
    }  # fmt: skip


OPTIONS = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "gamma": 0.1, "final_lr_ratio": 2.0, "eps_root": 1e-8}
ZERO = {**OPTIONS, "b1": 0.0, "b2": 0.0}
bound = functools.partial(scale_by_adabound, amsbound=True)
SAME = {  # dtype, two optimizers, tolerance; 1e-14 and 1e-13 are for rounding, 1e-12 for JAX's log(b) of an array
    # eps is 0, since AdaBound's authors do not correct it for bias. 1e-12 is for cancellation in optax's 1 - b**t.
    "gamma 1e-12 is Adam": (
        "float64", lambda: adabound(0.02, eps=0.0, gamma=1e-12), lambda: optax.adam(0.02, eps=0.0), 1e-12,
    ),
    # gamma · t fits into float64, but not into float32, which ends at 3.4e38.
    "gamma 1e20 is SGD": ("float64", lambda: adabound(0.02, 0.5, gamma=1e20), averaging_sgd, 1e-14),
    "gamma 1e300 is SGD": ("float64", lambda: adabound(0.02, 0.5, gamma=1e300), averaging_sgd, 1e-14),
    "gamma 3e38 is SGD": ("float32", lambda: adabound(0.02, 0.5, gamma=3e38), averaging_sgd, 1e-6),
    "injected hyperparameters": ("float64", lambda: injected(bound, **OPTIONS), lambda: bound(**OPTIONS), 1e-12),
    "arrays": ("float64", lambda: bound(**arrays_of(OPTIONS)), lambda: bound(**OPTIONS), 1e-12),
    "arrays of 0": ("float64", lambda: bound(**arrays_of(ZERO)), lambda: bound(**ZERO), 0),
    **{f"{name}, {way}": row for name, alias in ALIASES.items() for way, row in ways(alias).items()},
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "make", "make_other", "tolerance"), SAME.values(), ids=SAME)
def test_two_optimizers_are_the_same(dtype, make, make_other, tolerance):
    """Updates of 30 steps, and AdaBound's state where both have it."""
    with jax.enable_x64(dtype == "float64"):
        params, grads = params_and_grads(dtype)
        (updates, state), (expected, expected_state) = (
            run(jitted(optimizer), params, grads, steps=30) for optimizer in (make(), make_other())
        )
        close(updates, expected, tolerance)
        if (expected_state := find_state(expected_state)) is not None:
            close(find_state(state), expected_state, tolerance)


# What optax asks of its optimizers, beyond its own tests (test_optax_battery.py).


@every_optimizer
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_of_updates_and_state(make, dtype):
    """Updates have the gradients' dtype, nu at least float32, and mu the parameters' dtype unless mu_dtype is given.
    Shapes and dtypes of the state never change, or scan would raise."""
    with jax.enable_x64(dtype == "float64"):
        optimizer = make()
        params, grads = params_and_grads(dtype)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), updates

        (new_params, state), updates = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
        for tree in (updates, new_params):
            assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
        state = find_state(state)
        assert (state.count.dtype, state.count.shape, int(state.count)) == (jnp.int32, (), 3)
        wide = jnp.promote_types(dtype, jnp.float32)
        mu_dtype = jnp.float32 if make is OPTIMIZERS["adabound, every option"] else jnp.dtype(dtype)
        assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype(mu_dtype)}
        assert {x.dtype for x in jax.tree.leaves((state.nu, state.nu_max))} == {jnp.dtype(wide)}
        shapes = jax.tree.map(jnp.shape, params)
        assert jax.tree.map(jnp.shape, state.mu) == jax.tree.map(jnp.shape, state.nu) == shapes
        assert (new_params["a"] != params["a"]).any()


@pytest.mark.parametrize("mu_dtype", [jnp.bfloat16, "bfloat16", np.dtype("float32")])
def test_mu_dtype(mu_dtype):
    params, grads = params_and_grads(jnp.bfloat16)
    optimizer = adabound(1e-3, mu_dtype=mu_dtype)
    state = optimizer.init(params)
    _, new_state = optimizer.update(grads, state, params)
    for mu in jax.tree.leaves((find_state(state).mu, find_state(new_state).mu)):
        assert mu.dtype == jnp.dtype(mu_dtype)


def test_arrays_of_different_dtypes_in_one_tree(x64):
    """Each array is updated as if it were alone: a float32 array is computed in float32."""
    params = {"single": jnp.array([1.0, 2.0], jnp.float32), "double": jnp.array([3.0, 4.0], jnp.float64)}
    optimizer = adaboundw(0.1, amsbound=True)
    state = optimizer.init(params)
    updates, new_state = jax.jit(optimizer.update)(params, state, params)
    assert (updates["single"].dtype, updates["double"].dtype) == (jnp.float32, jnp.float64)
    assert jax.tree.map(dtype_of, state) == jax.tree.map(dtype_of, new_state)
    for name, dtype in (("single", jnp.float32), ("double", jnp.float64)):
        alone, _ = optimizer.update(params[name], optimizer.init(params[name]), params[name])
        np.testing.assert_allclose(updates[name], alone, rtol=4 * jnp.finfo(dtype).eps)
        assert step_sizes(find_state(new_state)).step[name].dtype == dtype


def test_weakly_typed_parameters_get_a_state_that_does_not_change_its_type():
    optimizer = amsbound(1e-3)
    params = jnp.asarray(1.0)
    assert params.weak_type
    state = optimizer.init(params)
    _, new_state = optimizer.update(params, state)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)


@every_optimizer
def test_jit_changes_nothing(make):
    """1e-5 of each array's largest entry is for float32 and XLA's fusion."""
    optimizer = make()
    params, grads = params_and_grads()
    close(run(jitted(optimizer), params, grads), run(optimizer, params, grads), 1e-5)


@every_optimizer
def test_vmap_is_a_loop(make):
    """The whole state has a leading axis, including the count. 1e-5 is for float32."""
    optimizer = make()
    models = [params_and_grads(seed=seed) for seed in range(3)]
    params, grads = stack(*models)
    batched = optax.GradientTransformation(jax.vmap(optimizer.init), jax.vmap(optimizer.update))
    expected = [run(jitted(optimizer), *model) for model in models]
    close(run(jitted(batched), params, grads), stack(*expected), 1e-5)


def test_compiles_once_whatever_the_schedule_says():
    traces = []
    optimizer = adabound(optax.cosine_decay_schedule(0.1, 4))

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    params, grads = params_and_grads()
    state, sizes = optimizer.init(params), []
    for _ in range(5):
        params, state, updates = step(params, state, grads)
        sizes.append(float(optax.tree.norm(updates)))
    assert len(traces) == 1
    assert step._cache_size() == 1
    assert sizes[-1] == 0  # the schedule was followed to its end
    assert len(set(sizes)) == 5


@every_alias
def test_a_step_may_donate_its_state(alias):
    """A buffer with two names, such as nu_max = nu at the start, would be donated twice, which raises."""
    optimizer = alias(1e-3)
    params, grads = params_and_grads()
    state = optimizer.init(params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    _, state = jax.jit(optimizer.update, donate_argnums=1)(grads, state, params)
    assert int(find_state(state).count) == 1


@every_optimizer
def test_abstract_parameters_and_explicit_sharding(make):
    """init accepts bare shapes; an update keeps the types of the state, including their sharding."""
    optimizer = make()
    state = optimizer.init(jax.ShapeDtypeStruct((2, 4), jnp.float16))
    assert find_state(state).mu.shape == (2, 4)

    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))
        params = jnp.ones((2, 4), jnp.float16, out_sharding=sharding)
        state = optimizer.init(params)
        _, new_state = optimizer.update(params, state, params)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, new_state)
        assert jax.typeof(find_state(state).nu).sharding.spec == jax.P(None, "x")


@every_optimizer
def test_tree_map_params_sees_the_moments_and_not_the_count(make):
    optimizer = make()
    params, _ = params_and_grads()
    state = find_state(optax.tree.map_params(optimizer, lambda x: x + 1, optimizer.init(params)))
    assert int(state.count) == 0
    assert all((x == 1).all() for x in jax.tree.leaves((state.mu, state.nu, state.nu_max)))


@every_optimizer
def test_masked(make):
    """Masked gradients pass through and have no moments; the others are updated as if alone."""
    params, grads = params_and_grads()
    optimizer = optax.masked(make(), {"a": True, "b": False})
    updates, state = run(optimizer, params, grads)
    close(updates[0]["b"], grads["b"], 0)
    assert jax.tree.leaves(find_state(state).mu["b"]) == []
    expected, expected_state = run(make(), params["a"], grads["a"])
    close([update["a"] for update in updates], expected, 0)
    close(find_state(state).nu["a"], find_state(expected_state).nu, 0)


@every_optimizer
def test_none_is_no_parameter(make):
    params, grads = params_and_grads()
    updates, state = run(make(), {**params, "none": None}, {**grads, "none": None})
    expected, _ = run(make(), params, grads)
    assert [update.pop("none") for update in updates] == [None] * 5
    close(updates, expected, 0)
    assert find_state(state).mu["none"] is None


@every_optimizer
def test_a_missing_gradient_has_no_update_and_leaves_its_moments(make):
    params, grads = params_and_grads()
    optimizer = make()
    _, state = optimizer.update(grads, optimizer.init(params), params)
    updates, new_state = optimizer.update({"a": grads["a"], "b": [None, grads["b"][1]]}, state, params)
    assert updates["b"][0] is None
    assert jax.tree.structure(state) == jax.tree.structure(new_state)
    old, new = find_state(state), find_state(new_state)
    for before, after in ((old.mu, new.mu), (old.nu, new.nu)):
        assert (before["b"][0] == after["b"][0]).all()
        assert (before["a"] != after["a"]).all()


@every_optimizer
@pytest.mark.parametrize("empty", [{}, (), {"a": [], "b": None}], ids=repr)
def test_an_empty_tree(make, empty):
    optimizer = make()
    state = optimizer.init(empty)
    updates, state = jax.jit(optimizer.update)(empty, state, empty)
    assert updates == empty
    assert int(find_state(state).count) == 1


@every_alias
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
def test_complex_is_refused(alias, dtype, x64):
    optimizer = alias(1e-3)
    real = {"w": jnp.ones(2)}
    imaginary = {"w": jnp.ones(2, dtype)}
    with pytest.raises(TypeError, match=f"real parameters and gradients, got {jnp.dtype(dtype)}"):
        optimizer.init(imaginary)
    state = optimizer.init(real)
    for update in (optimizer.update, jax.jit(optimizer.update)):
        with pytest.raises(TypeError, match=f"real parameters and gradients, got {jnp.dtype(dtype)}"):
            update(imaginary, state, real)


# Hyperparameters.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("b1", 1.0),
        ("b1", -0.1),
        ("b2", 1),
        ("b2", -1e-9),
        ("b2", float("nan")),
        ("gamma", 0.0),
        ("gamma", 0),
        ("gamma", -1e-3),
        ("eps", -1e-8),
        ("eps_root", -1e-8),
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    for optimizer in (scale_by_adabound, *(lambda alias=alias, **kw: alias(1e-3, **kw) for alias in ALIASES.values())):
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value}$"):
            optimizer(**{name: value})
    with pytest.raises(ValueError, match=r"final_lr_ratio must be >= 0, got -1\.0"):
        scale_by_adabound(final_lr_ratio=-1.0)


@every_alias
@pytest.mark.parametrize(
    "learning_rate",
    [
        0.0,
        -1e-3,
        np.array(1e-3),
        np.float32(1e-3),
        jnp.array(1e-3),
        optax.linear_schedule(0.0, 1e-3, 10),
        lambda count: -1e-3,
    ],
    ids=["0", "negative", "numpy", "scalar", "jax", "schedule from 0", "negative schedule"],
)
def test_base_lr_is_asked_for_where_it_cannot_be_inferred(alias, learning_rate):
    with pytest.raises(ValueError, match=r"base_lr must be a number > 0, .*pass base_lr, .*base_lr=1e-3"):
        alias(learning_rate)
    with pytest.raises(ValueError, match=r"or instead of final_lr pass final_lr_ratio, .*final_lr_ratio=100"):
        alias(learning_rate)
    assert alias(learning_rate, base_lr=1e-3).init(jnp.ones(2))
    assert alias(learning_rate, final_lr_ratio=100.0).init(jnp.ones(2))


@every_alias
@pytest.mark.parametrize("base_lr", [0.0, -1e-3, float("nan")])
def test_a_base_lr_that_is_no_rate_is_refused(alias, base_lr):
    with pytest.raises(ValueError, match=f"base_lr must be a number > 0, got {base_lr}"):
        alias(1e-3, base_lr=base_lr)


@every_alias
def test_a_traced_learning_rate_is_not_inferred_from(alias):
    """A traced rate, or a schedule with one inside, needs base_lr. A schedule of constants does not, even in jit."""
    params = jnp.ones(2, jnp.float32)

    def first_update(learning_rate, **kwargs):
        optimizer = alias(learning_rate, final_lr=1e-4, **kwargs)
        return optimizer.update(params, optimizer.init(params), params)[0]

    for make_rate in (lambda x: x, lambda x: lambda count: x):
        with pytest.raises(ValueError, match="pass base_lr"):
            jax.jit(lambda x, make_rate=make_rate: first_update(make_rate(x)))(1e-3)
        assert jax.jit(lambda x, make_rate=make_rate: first_update(make_rate(x), base_lr=1e-3))(1e-3).all()

    schedule = optax.exponential_decay(1e-3, 10, 0.5)
    np.testing.assert_allclose(jax.jit(lambda: first_update(schedule))(), first_update(schedule), rtol=1e-6)


@every_alias
@pytest.mark.parametrize("other", [{"final_lr": 0.1}, {"base_lr": 1e-3}])
def test_a_final_lr_that_was_given_is_never_ignored(alias, other):
    for make in (alias, lambda **options: optax.inject_hyperparams(alias)(**options).init(jnp.ones(2))):
        with pytest.raises(ValueError, match="final_lr_ratio is final_lr / base_lr: pass it instead of both"):
            make(learning_rate=1e-3, final_lr_ratio=100.0, **other)


@every_alias
def test_an_injected_learning_rate_needs_base_lr_and_scales_the_update(alias):
    params, grads = params_and_grads()
    with pytest.raises(ValueError, match="pass base_lr"):
        optax.inject_hyperparams(alias)(learning_rate=1e-3).init(params)

    optimizer = optax.inject_hyperparams(alias)(learning_rate=1e-3, final_lr=1e-3, gamma=10.0, base_lr=1e-3)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    before, _ = update(grads, state, params)
    state.hyperparams["learning_rate"] = jnp.float32(5e-4)
    after, _ = update(grads, state, params)
    close(after, jax.tree.map(lambda u: u / 2, before), 1e-6)  # clipped at the bounds: final_lr halves as well
    assert update._cache_size() == 1


@every_alias
def test_arrays_of_another_dtype_do_not_change_that_of_the_updates(alias, x64):
    options = {"learning_rate": 1e-3, "b1": 0.9, "weight_decay": 0.1, "base_lr": 1e-3}
    params, grads = params_and_grads(jnp.bfloat16)
    optimizer = optax.inject_hyperparams(alias, hyperparam_dtype=jnp.float64)(**options)
    updates, state = run(optimizer, params, grads)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(dtype_of, find_state(state)) == jax.tree.map(dtype_of, find_state(optimizer.init(params)))


@every_alias
def test_decay_needs_parameters_and_no_decay_does_not(alias):
    params, grads = params_and_grads()
    optimizer = alias(1e-3, weight_decay=0.0)
    updates, _ = optimizer.update(grads, optimizer.init(params))
    close(updates, optimizer.update(grads, optimizer.init(params), params)[0], 0)
    optimizer = alias(1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(grads, optimizer.init(params))


@every_alias
@pytest.mark.parametrize("mask", [{"a": True, "b": False}, lambda p: {"a": True, "b": False}], ids=["tree", "function"])
def test_decay_is_where_the_mask_says(alias, mask):
    params, grads = params_and_grads()
    updates, _ = run(alias(1e-2, weight_decay=0.5, mask=mask), params, grads)
    with_decay, _ = run(alias(1e-2, weight_decay=0.5), params, grads)
    without, _ = run(alias(1e-2, weight_decay=0.0), params, grads)
    close(
        [(u["a"], u["b"]) for u in updates], [(w["a"], n["b"]) for w, n in zip(with_decay, without, strict=True)], 1e-7
    )
    assert not np.allclose(with_decay[1]["a"], without[1]["a"], rtol=1e-4)
    assert not np.allclose(with_decay[1]["b"][0], without[1]["b"][0], rtol=1e-4)


# Precision.


@pytest.mark.parametrize("traced", [False, True])
def test_bias_correction_keeps_float32s_digits(traced):
    """1e-6 is a few units in the last place; 1 - 0.9999**t in float32 is wrong by 2e-4 at t = 1, as it rounds 0.9999.
    So arrays b1 and b2 are a power of two away from 1. nu is that of gradients of 1: steps are 1 / (1 - b1**t)."""
    b1, b2 = 1 - 2.0**-6, 1 - 2.0**-12
    convert = (lambda x: jnp.float32(x)) if traced else (lambda x: x)
    for t in (1, 2, 10, 1000, 100_000):
        state = AdaBoundState(jnp.int32(t), jnp.zeros(1), jnp.array([1 - b2**t], jnp.float32), None)
        step = step_sizes(state, b1=convert(b1), b2=convert(b2), eps=0.0).step
        np.testing.assert_allclose(step, 1 / (1 - b1**t), rtol=1e-6)
    if not traced:
        state = AdaBoundState(jnp.int32(1), jnp.zeros(1), jnp.array([1e-4], jnp.float32), None)
        np.testing.assert_allclose(step_sizes(state, b1=0.0, b2=0.9999, eps=0.0).step, 1.0, rtol=1e-6)


def test_the_count_keeps_float64(x64):
    """Errors are below 1e-13 at a count that float32 would round by 6e-8."""
    t = 16_777_217
    b2 = 1 - 1e-8
    state = AdaBoundState(jnp.int32(t), jnp.zeros(1), jnp.ones(1), None)
    sizes = step_sizes(state, b1=0.0, b2=b2, eps=0.0, gamma=1e-8, final_lr_ratio=1.0)
    np.testing.assert_allclose(sizes.step, np.sqrt(-np.expm1(t * np.log(b2))), rtol=1e-13)
    np.testing.assert_allclose(sizes.lower, 1e-8 * t / (1e-8 * t + 1), rtol=1e-13)
    np.testing.assert_allclose(sizes.upper, (1e-8 * t + 1) / (1e-8 * t), rtol=1e-13)


def test_the_count_stops_at_its_largest_value():
    params, grads = params_and_grads()
    optimizer = adabound(1e-3)
    state = optax.tree.set(optimizer.init(params), count=jnp.int32(2**31 - 1))
    updates, state = optimizer.update(grads, state, params)
    assert find_state(state).count == 2**31 - 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


@every_alias
@pytest.mark.parametrize("count", [0, 1_000_000], ids=["first", "late"])
def test_float16_neither_overflows_nor_loses_the_step(alias, count):
    """Updates are those of float32, rounded, for gradients from float16's smallest number to nearly its largest. At the
    first step the upper bound is 1e5 and the square of a gradient 4e9; late, 100 times a gradient is 6e6."""
    grads = jnp.array([0.0, 6e-8, 1e-4, -1.0, 300.0, 6e4, -6e4], jnp.float16)
    optimizer = alias(1e-3, mu_dtype=jnp.float32)

    def update(grads):
        state = optimizer.init(grads)
        if count:
            state = optax.tree.set(state, count=jnp.int32(count))
        return optimizer.update(grads, state, grads * 0)[0]

    updates, expected = update(grads), update(grads.astype(jnp.float32))
    assert np.isfinite(updates).all()
    assert expected[-1] > 1e-4
    np.testing.assert_array_equal(updates, expected.astype(jnp.float16))


@every_alias
def test_bfloat16_second_moment_decays_and_parameters_stay_bfloat16(alias):
    """1e-4 is for 300 roundings of float32. In bfloat16 0.999 is 1, and nu would not decay."""
    optimizer = alias(1e-3)
    params = jnp.ones(3, jnp.bfloat16)
    _, state = optimizer.update(jnp.ones(3, jnp.bfloat16), optimizer.init(params), params)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jnp.zeros(3, jnp.bfloat16), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), length=300)
    assert params.dtype == jnp.bfloat16
    np.testing.assert_allclose(find_state(state).nu, 1e-3 * 0.999**300, rtol=1e-4)


@every_alias
def test_low_precision_is_rounded_once(alias):
    """A bfloat16 update is the float32 one, rounded: decay and learning rate come before the rounding."""
    params, grads = params_and_grads(jnp.bfloat16)
    optimizer = alias(3e-3, weight_decay=0.3, mu_dtype=jnp.float32)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    grads, params = jax.tree.map(lambda x: x.astype(jnp.float32), (grads, params))
    expected, _ = optimizer.update(grads, optimizer.init(params), params)
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))


def test_a_moment_kept_in_bfloat16_is_computed_in_float32():
    """mu_dtype rounds only the stored moment, neither its decay nor the update. 1e-6 is for float32."""
    optimizer = scale_by_adabound(mu_dtype=jnp.bfloat16, gamma=1e10, final_lr_ratio=1.0)  # both bounds at 1
    grads = jnp.linspace(-1.0, 1.0, 100, dtype=jnp.float32)
    _, state = optimizer.update(grads, optimizer.init(grads))
    assert state.mu.dtype == jnp.bfloat16
    updates, _ = optimizer.update(grads, state)
    np.testing.assert_allclose(updates, 0.9 * np.asarray(state.mu, np.float64) + 0.1 * grads, rtol=1e-6)


def test_eps_root_lets_gradients_through_the_update():
    """Without eps_root, the root has an infinite derivative at a gradient of 0."""

    def updated(gradient, eps_root):
        optimizer = adabound(0.1, eps_root=eps_root)
        return optimizer.update(gradient, optimizer.init(gradient))[0]

    derivative = jax.grad(updated)
    assert np.isnan(derivative(0.0, 0.0))
    assert -np.inf < derivative(0.0, 1e-8) < 0


# Step sizes, and the state in wrappers and checkpoints.


@every_alias
def test_step_sizes_explain_the_update(alias):
    """update = -learning_rate · clip(step, lower, upper) · mu of the new state, to 1e-6 (float32). Shares are exact."""
    options = {"b1": 0.8, "b2": 0.99, "eps": 1e-6, "gamma": 1.0, "eps_root": 1e-10}
    optimizer = alias(0.1, final_lr=0.2, weight_decay=0.0, **options)
    params = {"w": jnp.array([1e-3, 0.5, 2.0, 80.0], jnp.float32), "b": jnp.array([1e3, 1e3], jnp.float32)}
    updates, state = optimizer.update(params, optimizer.init(params))
    state = find_state(state)
    sizes = step_sizes(state, final_lr_ratio=2.0, **options)
    np.testing.assert_allclose((sizes.lower, sizes.upper), (1.0, 4.0), rtol=1e-6)  # r · 1/2 and r · 2 at t = 1
    for name in params:
        np.testing.assert_allclose(
            updates[name], -0.1 * np.clip(sizes.step[name], sizes.lower, sizes.upper) * state.mu[name], rtol=1e-6
        )
    # At t = 1 the correction turns the root of v into |g|, and 5 = 1 / (1 - b1); eps and eps_root cost up to 2%.
    np.testing.assert_allclose(sizes.step["w"], 5 / params["w"], rtol=2e-2)
    assert jax.tree.map(float, sizes.at_upper) == {"w": 0.5, "b": 0.0}
    assert jax.tree.map(float, sizes.at_lower) == {"w": 0.25, "b": 1.0}


def test_step_sizes_use_the_maximum_of_amsbound():
    nu, nu_max = {"w": jnp.array([1.0, 4.0])}, {"w": jnp.array([4.0, 4.0])}
    state = AdaBoundState(jnp.int32(100_000), nu, nu, nu_max)
    np.testing.assert_allclose(step_sizes(state).step["w"], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(step_sizes(state._replace(nu_max=None)).step["w"], [1.0, 0.5], rtol=1e-6)


@every_optimizer
def test_the_state_is_found_in_every_wrapper(make):
    params, grads = params_and_grads()
    for optimizer in (
        make(),
        optax.chain(optax.clip(1.0), make()),
        optax.masked(make(), {"a": True, "b": False}),
        optax.MultiSteps(make(), 1),
        optax.inject_hyperparams(adabound)(1e-3, base_lr=1e-3),
    ):
        _, state = optimizer.update(grads, optimizer.init(params), params)
        found = find_state(state)
        assert isinstance(found, AdaBoundState)
        assert np.isfinite(jax.jit(step_sizes)(found).step["a"]).all()


@every_optimizer
def test_the_state_survives_orbax(make, tmp_path):
    """Structure, dtypes and every bit survive, and the next update is the same."""
    params, grads = params_and_grads(jnp.bfloat16)
    optimizer = make()
    _, state = run(optimizer, params, grads, steps=3)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", optimizer.init(params))
    close(restored, state, 0)
    assert (find_state(restored).nu_max is None) == (find_state(state).nu_max is None)
    updates, restored_updates = (optimizer.update(grads, s, params)[0] for s in (state, restored))
    close(restored_updates, updates, 0)
