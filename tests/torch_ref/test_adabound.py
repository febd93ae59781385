"""torch_ref.adabound against jax_resnet.adabound and torch's Adam; groups, state and errors."""

import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.optim import lr_scheduler

import jax_resnet.adabound
from torch_ref.adabound import AdaBound, AMSBound

pytestmark = pytest.mark.usefixtures("one_thread")


def relative(actual, expected):
    """The largest difference over the largest entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == np.float64
    return np.abs(actual - expected).max() / np.abs(expected).max()


def differing(tensors, others):
    return [i for i, (a, b) in enumerate(zip(tensors, others, strict=True)) if not torch.equal(a, b)]


def random_parameters(seed=0, dtype=torch.float64):
    """Tensors of several ranks, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3, 2, 2), (4,), (3, 5), (), (0, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def set_gradients(params, number, scale=1.0):
    """Each step has its own gradients; the entries of a tensor spread over six orders of magnitude."""
    rng = np.random.default_rng(number)
    for param in params:
        grad = rng.standard_normal(param.shape) * 10.0 ** rng.uniform(-5, 1, param.shape) * scale
        param.grad = torch.as_tensor(grad).to(param.dtype)


# The rule.

SCHEDULES = {
    "constant": lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0),
    "cosine to 0": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=500),
    "steps": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=150, gamma=0.3),
    "warm-up": lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=200),
    "from 0": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda count: min(count / 100, 1.0)),
}
OPTIONS = [
    {},
    {"amsbound": True},
    {"weight_decay": 0.1, "betas": (0.8, 0.99), "gamma": 1e-2, "final_lr": 0.5, "eps": 1e-4},
    {"betas": (0.95, 0.0)},
]
RULES = [  # schedule, class, options
    *[(schedule, AdaBound, {}) for schedule in SCHEDULES],
    *[("cosine to 0", AdaBound, options) for options in OPTIONS[1:]],
    ("cosine to 0", AMSBound, {}),
    ("steps", AMSBound, {"weight_decay": 0.1}),
    ("steps", AdaBound, {"betas": (0.0, 0.99), "final_lr": 0.02}),
    ("constant", AdaBound, {"eps": 0.0, "gamma": 1e-12}),  # Adam
    ("constant", AdaBound, {"gamma": 1e18}),  # SGD
]


@pytest.mark.parametrize(("schedule", "optimizer_class", "options"), RULES, ids=str)
def test_same_as_jax_resnet(schedule, optimizer_class, options, x64):
    """500 float64 steps on the same gradients; 1e-12 is for 500 roundings. JAX's tests have the rule written out."""
    steps, base_lr = 500, 2e-3
    params = random_parameters()
    start = [p.detach().numpy().copy() for p in params]
    optimizer = optimizer_class(params, base_lr, **options)
    scheduler = SCHEDULES[schedule](optimizer)
    grads, rates = [], []
    for number in range(steps):
        set_gradients(params, number)
        grads.append([p.grad.numpy() for p in params])
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()

    b1, b2 = options.get("betas", (0.9, 0.999))
    options = {name: value for name, value in options.items() if name != "betas"}
    alias = getattr(jax_resnet.adabound, optimizer_class.__name__.lower())
    jax_optimizer = alias(lambda count: jnp.asarray(rates)[count], base_lr=base_lr, b1=b1, b2=b2, **options)

    def step(carry, grads):
        params, state = carry
        updates, state = jax_optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    each_step = [jnp.stack(of_one) for of_one in zip(*grads, strict=True)]
    (jax_params, state), _ = jax.lax.scan(step, (start, jax_optimizer.init(start)), each_step)
    for ours, theirs in zip(params, jax_params, strict=True):
        if ours.numel():
            assert relative(ours.detach(), theirs) <= 1e-12
    ours, theirs = optimizer.state[params[0]], optax.tree.get(state, "AdaBoundState")
    names = {"exp_avg": "mu", "exp_avg_sq": "nu"} | ({"max_exp_avg_sq": "nu_max"} if theirs.nu_max else {})
    assert set(ours) == {"step", *names}
    assert ours["step"] == steps
    for name, field in names.items():
        assert relative(ours[name], getattr(theirs, field)[0]) <= 1e-12


@pytest.mark.parametrize("foreach", [False, True])
def test_bounds_beyond_float32(foreach):
    """With this gamma the bounds do not fit into float32: AdaBound is Adam, up to the rounding of 20 steps."""
    params, others = random_parameters(dtype=torch.float32), random_parameters(dtype=torch.float32)
    optimizer = AdaBound(params, 0.01, eps=0.0, gamma=1e-45, foreach=foreach)
    other = torch.optim.Adam(others, 0.01, eps=0.0)
    for number in range(20):
        set_gradients(params, number)
        set_gradients(others, number)
        optimizer.step()
        other.step()
    assert max((p - q).abs().max() for p, q in zip(params, others, strict=True) if p.numel()) <= 20 * 2.0**-23


# One kernel for many parameters.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_foreach_is_the_same(options, dtype):
    """On a CPU results agree bit for bit, with parameters of two dtypes and without some gradients at some steps."""
    runs = []
    for foreach in (False, True):
        params = random_parameters(dtype=dtype) + random_parameters(seed=1)
        optimizer = AdaBound(params, lr=2e-3, foreach=foreach, **options)
        for number in range(20):
            set_gradients(params, number)
            params[number % 7].grad = None
            optimizer.step()
        runs.append(params)
    assert differing(*runs) == []


# Parameters of 16 bits.


@pytest.mark.parametrize("amsbound", [False, True], ids=["adabound", "amsbound"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_step_in_float32(dtype, amsbound):
    """Each step is that of float32 parameters with the same gradients, rounded once.

    The gradients reach 5e4, near float16's largest number; their squares would be infinite in it.
    """
    params = random_parameters(dtype=dtype)
    wide = [p.detach().float().requires_grad_() for p in params]
    optimizer, other = (AdaBound(p, lr=1e-2, weight_decay=0.1, amsbound=amsbound) for p in (params, wide))
    for number in range(50):
        set_gradients(params, number, scale=1500.0)
        for p, q in zip(params, wide, strict=True):
            with torch.no_grad():
                q.copy_(p)
            q.grad = p.grad.float()
        optimizer.step()
        other.step()
        assert differing(params, [q.to(dtype) for q in wide]) == []
        assert all(p.dtype == dtype and torch.isfinite(p).all() for p in params)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert {moment.dtype for moment in moments} == {torch.float32}


def test_second_moment_decays_in_bfloat16():
    """0.999 is 1 in bfloat16: a moment kept in bfloat16 would never forget the first gradient."""
    param = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    optimizer = AdaBound([param])
    for number in range(1001):
        param.grad = torch.full_like(param, 1.0 if number == 0 else 0.0)
        optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].item() == pytest.approx(1e-3 * 0.999**1000, rel=1e-4)  # float32


# Groups, schedules, closures.


def alone(index, steps, **options):
    """One parameter after these steps, alone in its optimizer."""
    params = random_parameters()
    optimizer = AdaBound([params[index]], **options)
    for number in steps:
        set_gradients(params, number)
        optimizer.step()
    return params[index]


def test_groups_have_their_own_options():
    """Each parameter moves as in an optimizer of its own: learning rates, bounds, and the count of a late group."""
    params = random_parameters()
    groups = [{"params": [params[0]], "lr": 1e-2, "final_lr": 0.5}, {"params": [params[1]], "amsbound": True}]
    optimizer = AdaBound(groups, lr=2e-3, gamma=1e-2)
    for number in range(20):
        if number == 10:
            optimizer.add_param_group({"params": params[2], "lr": 0.1, "weight_decay": 0.1})
        set_gradients(params, number)
        optimizer.step()
    assert [group["base_lr"] for group in optimizer.param_groups] == [1e-2, 2e-3, 0.1]
    first = alone(0, range(20), lr=1e-2, final_lr=0.5, gamma=1e-2)
    second = alone(1, range(20), lr=2e-3, gamma=1e-2, amsbound=True)
    third = alone(2, range(10, 20), lr=0.1, gamma=1e-2, weight_decay=0.1)
    assert differing(params[:3], [first, second, third]) == []
    assert differing(params[3:], random_parameters()[3:]) == []


def test_options_of_a_group_are_copied():
    """The caller's dict stays as it was, so it can be used again with another learning rate."""
    group = {"params": random_parameters()}
    assert AdaBound([group], lr=1e-2).param_groups[0]["base_lr"] == 1e-2
    assert AdaBound([group], lr=1e-3).param_groups[0]["base_lr"] == 1e-3
    assert set(group) == {"params"}


def test_named_parameters():
    model = torch.nn.Linear(2, 3)
    optimizer = AdaBound(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_learning_rate_in_a_tensor():
    """Schedulers write into the tensor, and base_lr must not follow."""
    runs = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        params = random_parameters()
        optimizer = AdaBound(params, lr=lr)
        scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        for number in range(10):
            set_gradients(params, number)
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["base_lr"] == 0.01
        runs.append(params)
    assert differing(*runs) == []


def test_learning_rate_that_starts_at_0_with_base_lr():
    """At a rate of 0 nothing moves; all steps are those of an optimizer that was made with lr = base_lr."""
    runs = []
    for options in ({"lr": 0.0, "base_lr": 1e-2}, {"lr": 1e-2}):
        params = random_parameters()
        optimizer = AdaBound([{"params": params, **options}])
        for number, lr in enumerate((0.0, 5e-3, 1e-2)):
            optimizer.param_groups[0]["lr"] = lr
            set_gradients(params, number)
            optimizer.step()
            assert (differing(params, random_parameters()) == []) == (lr == 0.0)
        runs.append(params)
    assert differing(*runs) == []


def test_closure():
    """The closure runs with gradients enabled, and step returns its loss."""
    weight, other = (torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer, other_optimizer = AdaBound([weight], lr=0.1), AdaBound([other], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        other_loss = other.square().sum()
        other_optimizer.zero_grad()
        other_loss.backward()
        assert optimizer.step(closure) == other_loss
        assert other_optimizer.step() is None
        assert torch.equal(weight, other)


# State.


def optimizer_in_mid_run(dtype, schedule, steps=range(7)):
    """It has groups with their own options, one added later, a parameter without a gradient so far, and a schedule."""
    params = random_parameters(dtype=dtype)
    optimizer = AdaBound([{"params": params[:2], "lr": 1e-2, "final_lr": 0.5}, {"params": params[2:3]}], lr=2e-3)
    optimizer.add_param_group({"params": params[3:], "lr": 5e-2, "amsbound": True})
    scheduler = SCHEDULES[schedule](optimizer)
    run(params, optimizer, scheduler, steps)
    return params, optimizer, scheduler


def run(params, optimizer, scheduler, steps):
    for number in steps:
        set_gradients(params, number)
        params[1].grad = None if number < 10 else params[1].grad
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["constant", "cosine to 0", "warm-up"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_state_dict_continues_bit_for_bit(dtype, schedule):
    """A file's state goes into an optimizer that was made with other options; the file's options win.

    torch's own load_state_dict would round the float32 moments of bfloat16 parameters to bfloat16.
    """
    params, optimizer, scheduler = optimizer_in_mid_run(dtype, schedule)
    file = io.BytesIO()
    torch.save([[p.detach() for p in params], optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    values, state_dict, scheduler_state_dict = torch.load(file, weights_only=True)
    new_params = [value.requires_grad_() for value in values]
    new_optimizer = AdaBound([{"params": new_params[:2]}, {"params": new_params[2:3]}], lr=0.3, gamma=0.5)
    new_optimizer.add_param_group({"params": new_params[3:]})
    new_scheduler = SCHEDULES[schedule](new_optimizer)
    new_scheduler.load_state_dict(scheduler_state_dict)
    new_optimizer.load_state_dict(state_dict)
    assert [group["base_lr"] for group in new_optimizer.param_groups] == [1e-2, 2e-3, 5e-2]
    for number in range(7, 27):
        run(params, optimizer, scheduler, [number])
        run(new_params, new_optimizer, new_scheduler, [number])
        assert differing(params, new_params) == []


def test_loaded_state_is_a_copy():
    """Two optimizers from one state_dict do not disturb one another; torch's optimizers share their moments."""
    params, optimizer, scheduler = optimizer_in_mid_run(torch.float64, "constant")
    new_params, new_optimizer, new_scheduler = optimizer_in_mid_run(torch.float64, "constant", steps=[])
    new_optimizer.load_state_dict(optimizer.state_dict())
    undisturbed_params, undisturbed, undisturbed_scheduler = optimizer_in_mid_run(torch.float64, "constant")
    run(new_params, new_optimizer, new_scheduler, range(7, 12))
    run(params, optimizer, scheduler, range(7, 12))
    run(undisturbed_params, undisturbed, undisturbed_scheduler, range(7, 12))
    assert differing(params, undisturbed_params) == []


def test_state_dict_without_base_lr_is_an_error():
    """The authors' optimizer and torch's Adam write such a state_dict."""
    params = random_parameters()
    state_dict = AdaBound(params).state_dict()
    del state_dict["param_groups"][0]["base_lr"]
    with pytest.raises(ValueError, match=r"param_groups\[0\] .* but lacks base_lr: .* add base_lr, the initial lr"):
        AdaBound(params).load_state_dict(state_dict)
    with pytest.raises(ValueError, match=r"lacks base_lr, final_lr, gamma, amsbound: .* of another optimizer"):
        AdaBound(params).load_state_dict(torch.optim.Adam(params).state_dict())


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be >= 0, got -1\.0"),
        ({"lr": math.nan}, "lr must be >= 0, got nan"),
        ({"lr": 0.0}, r"base_lr, by default lr, must be > 0, got 0\.0: .* in a group"),
        ({"betas": (1.0, 0.999)}, r"betas\[0\] must be in \[0, 1\), got 1\.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in \[0, 1\), got -0\.1"),
        ({"final_lr": 0.0}, r"final_lr must be > 0, got 0\.0"),
        ({"gamma": 0.0}, r"gamma must be > 0, got 0\.0"),
        ({"gamma": -1e-3}, r"gamma must be > 0, got -0\.001"),
        ({"eps": -1e-8}, "eps must be >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, r"weight_decay must be >= 0, got -0\.1"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    """The whole optimizer is refused, or the group, which is then not added."""
    params = random_parameters()
    with pytest.raises(ValueError, match=message):
        AdaBound(params, **options)
    optimizer = AdaBound(params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **options})
    assert len(optimizer.param_groups) == 1


def sparse_gradient():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    return embedding.weight


def complex_gradient():
    param = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    param.abs().sum().backward()
    return param


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (sparse_gradient, r"dense gradients, got torch.sparse_coo for a parameter \(5, 2\): use sparse=False"),
        (complex_gradient, r"real gradients, got torch.complex64 for a parameter \(3,\)"),
    ],
)
def test_gradients_that_are_refused(make, message):
    """Then nothing changes, not even the parameters before the refused one."""
    params = random_parameters()
    set_gradients(params, 0)
    optimizer = AdaBound([*params, make()])
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert differing(params, random_parameters()) == []
    assert not optimizer.state
