"""numpy_ref.resnet: its parts against central differences, its initial weights against JAX's, what is refused.

`test_fast` compares it with numpy_ref.fast; tests/experiments/parity compares numpy_ref.fast with jax_resnet.
Parameters and statistics are random and errors relative, see `random_networks`.
"""

import functools
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from random_networks import CHANNELS, images_of, network, passes
from trees import relative_errors

from jax_resnet import resnet as jax_resnet
from numpy_ref import fast, layers, resnet
from numpy_ref.check import check_vjp

both = pytest.mark.parametrize("module", [resnet, fast], ids=["plain", "fast"])
in_training_and_evaluation = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


PARTS = [  # network, options, stage, number, stride; the stem has no stage
    ("resnet18", {}, None, None, 2),
    ("resnet18", {}, "layer1", "1", 1),
    ("resnet18", {}, "layer2", "0", 2),
    ("resnet50", {}, "layer1", "0", 1),
    ("resnet50", {}, "layer1", "1", 1),
    ("resnet50", {}, "layer2", "0", 2),
    ("resnet50", dict(stride_in="conv1"), "layer2", "0", 2),
    ("resnet50", dict(batch_norm=False), "layer2", "0", 2),
]


@in_training_and_evaluation
@pytest.mark.parametrize(("name", "options", "stage", "number", "stride"), PARTS, ids=str)
def test_vjp_of_a_part_against_central_differences(name, options, stage, number, stride, train, monkeypatch):
    """Gradients of all parameters of a part and of its input, returned as (dparams, dx).

    Sigmoids replace ReLUs: a step takes one of thousands of values across ReLU's kink, which is an error of a percent.
    """
    monkeypatch.setattr(layers, "relu", layers.sigmoid)
    config, params, batch_stats = network(name, **options)
    if stage is None:
        part, shape = functools.partial(resnet.stem, train=train), (3, 16, 15, CHANNELS)
        params = {key: params[key] for key in ("conv1", "bn1")}
    else:
        params, batch_stats = params[stage][number], batch_stats.get(stage, {}).get(number, {})
        shape = (4, 4, 3, params["conv1"]["weight"].shape[2])
        part = functools.partial(resnet.residual_block, config, stride=stride, train=train)
    names = list(flatten_dict(params))

    def function(x, *arrays):
        arguments = unflatten_dict(dict(zip(names, arrays, strict=True))), batch_stats, x
        (y, _), vjp = part(*arguments)

        def flat_vjp(dy):
            dparams, dx = vjp(dy)
            dparams = flatten_dict(dparams)
            assert set(dparams) == set(names)
            return dx, *[dparams[name] for name in names]

        return y, flat_vjp

    check_vjp(function, np.random.default_rng(4).standard_normal(shape), *flatten_dict(params).values())


def block_case():
    """A bottleneck without projection and 128 values per channel: arguments of residual_block, and dy."""
    config, params, batch_stats = network("resnet50")
    rng = np.random.default_rng(3)
    x = rng.standard_normal((8, 4, 4, 256))
    return (config, params["layer1"]["1"], batch_stats["layer1"]["1"], x, 1), rng.standard_normal(x.shape)


def test_momentum_does_not_touch_training_gradients(monkeypatch):
    """Momentum moves the running statistics; output and gradients of training are equal to the bit whatever it is."""
    arguments, dy = block_case()
    batch_norm, results, means = layers.batch_norm, {}, {}
    for momentum in (0.0, 0.1, 1.0):
        monkeypatch.setattr(layers, "batch_norm", functools.partial(batch_norm, momentum=momentum))
        (y, statistics), vjp = resnet.residual_block(*arguments, train=True)
        dparams, dx = vjp(dy)
        results[momentum] = flatten_dict({"y": y, "x": dx, **dparams}, sep=".")
        for name, value in results[momentum].items():
            np.testing.assert_array_equal(value, results[0.0][name])
        means[momentum] = statistics["bn2"]["running_mean"]
    np.testing.assert_array_equal(means[0.0], arguments[2]["bn2"]["running_mean"])
    assert min(np.abs(means[0.1] - means[0.0]).max(), np.abs(means[1.0] - means[0.1]).max()) > 0.01


def test_few_values_per_channel_magnify_rounding(narrow):
    """One unit in the last place of conv1's weights moves ResNet-101's gradients at least 50 times as far with two
    values per channel in the last stage as with 32. So all such tests need enough values."""
    config, params, batch_stats = network("resnet101")
    moved = params | {"conv1": {"weight": np.nextafter(params["conv1"]["weight"], np.inf)}}
    change = {}
    for shape in ((2, 32, 32), (8, 33, 45)):
        here, there = (passes(fast, config, p, batch_stats, images_of(shape), True) for p in (params, moved))
        change[shape] = max(relative_errors(there["dparams"], here["dparams"]).values())
    assert change[2, 32, 32] > 50 * change[8, 33, 45]


@both
@in_training_and_evaluation
@pytest.mark.parametrize("batch_norm", [True, False])
def test_apply_is_pure_and_keeps_float32(module, train, batch_norm):
    """Nothing that goes in or comes out changes, and a second vjp gives the first one's gradients."""
    config = resnet.resnet18(num_classes=5, in_channels=1, batch_norm=batch_norm)
    params, batch_stats = resnet.init(config, np.random.default_rng(0))
    images = np.random.default_rng(1).standard_normal((4, 32, 32, 1)).astype(np.float32)

    def arrays_of(trees):
        return flatten_dict(dict(enumerate(trees)))

    given = params, batch_stats, {"images": images}
    before = {name: value.copy() for name, value in arrays_of(given).items()}
    out, vjp = module.apply(config, params, batch_stats, images, train=train, return_activations=True)
    results = {"logits": out.logits}, out.batch_stats, out.activations
    kept = {name: value.copy() for name, value in arrays_of(results).items()}
    dlogits = np.ones_like(out.logits)
    first, second = (arrays_of((dparams, {"images": dx})) for dparams, dx in (vjp(dlogits), vjp(dlogits)))
    np.testing.assert_array_equal(dlogits, 1)
    for ours, copies in ((arrays_of(given), before), (arrays_of(results), kept), (first, second)):
        assert {value.dtype for value in ours.values()} == {np.dtype(np.float32)}
        for name, value in ours.items():
            np.testing.assert_array_equal(value, copies[name])


@both
def test_without_classes_there_is_no_dense_layer(module):
    """The logits are the pooled vector, and gradients go through it."""
    config, params, batch_stats = network("resnet18", num_classes=0)
    with_head, head_params, _ = network("resnet18")
    assert set(head_params) - set(params) == {"fc"}
    params = {name: head_params[name] for name in params}
    images, weights = images_of((2, 32, 33)), head_params["fc"]
    out, vjp = module.apply(config, params, batch_stats, images, train=False)
    expected, expected_vjp = module.apply(
        with_head, head_params, batch_stats, images, train=False, return_activations=True
    )
    np.testing.assert_array_equal(out.logits, expected.activations["pool"])
    dlogits = np.ones(expected.logits.shape)
    dparams, dimages = vjp(dlogits @ weights["weight"].T)
    assert set(dparams) == set(params)
    np.testing.assert_array_equal(dimages, expected_vjp(dlogits)[1])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet101", dict(zero_gamma=True)),
        ("resnet50", dict(batch_norm=False)),
        ("resnet34", dict(zero_gamma=True)),
        ("resnet152", dict(num_classes=3, in_channels=4)),
    ],
    ids=str,
)
def test_init_has_jax_shapes_and_spread(name, options):
    """Names, shapes and constants are JAX's. Deviations of drawn kernels are within 5% of JAX's (5 standard errors for
    the smallest, the 9,408 numbers of the stem). In other arrays the largest entry is at most 26% larger."""
    config, jax_config = getattr(resnet, name)(**options), getattr(jax_resnet, name)(**options)
    ours = resnet.init(config, np.random.default_rng(0))
    theirs = jax_resnet.init(jax_config, jax.random.key(0))
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = flatten_dict(mine, sep="."), flatten_dict(other, sep=".")
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in other.items()}
        for key, value in mine.items():
            assert value.dtype == np.float32
            if np.ptp(other[key]) == 0:
                np.testing.assert_array_equal(value, other[key])
            elif value.ndim > 1 and value.size > 9000:
                assert value.std() == pytest.approx(float(other[key].std()), rel=0.05)
                assert abs(value.mean()) < 0.05 * value.std()
            else:
                assert 0 < np.abs(value).max() <= 1.05 * float(np.abs(other[key]).max()) * 1.2


def test_init_follows_its_generator():
    config = resnet.resnet18(num_classes=2)
    first, again, other = (resnet.init(config, np.random.default_rng(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["conv1"]["weight"], again["conv1"]["weight"])
    assert (first["conv1"]["weight"] != other["conv1"]["weight"]).any()


@both
def test_bad_input_is_named(module):
    config = resnet.resnet18(num_classes=5, in_channels=1)
    params, batch_stats = resnet.init(config, np.random.default_rng(0))
    images = np.zeros((2, 32, 32, 1), np.float32)
    apply = functools.partial(module.apply, config, train=False)
    for bad, message in [
        (images[0], "must be .N, H, W, C. with N >= 1 and C = 1"),
        (images.transpose(0, 3, 1, 2), "NCHW"),
        (images[:, :31], "at least 32x32, got 31x32"),
        (images.astype(np.uint8), "float, got uint8"),
        (images[:0], "N >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply(params, batch_stats, bad)
    without = {name: value for name, value in params.items() if name != "layer3"}
    for bad, message in [
        (without, "layer3"),
        (params | {"fc": params["fc"] | {"weight": np.zeros((512, 4))}}, r"fc.weight must have the shape \(512, 5\)"),
        (
            params | {"fc": {"weight": params["fc"]["weight"]}},
            "params.fc must have the keys .'bias', 'weight'. for .*, got .'weight'.",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            apply(bad, batch_stats, images)
    with pytest.raises(ValueError, match="more than one value per channel"):
        module.apply(config, params, batch_stats, images[:1], train=True)


@pytest.mark.parametrize("options", [dict(num_classes=-1), dict(stride_in="conv3"), dict(in_channels=0)], ids=str)
def test_bad_settings_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        resnet.resnet50(**options)


def test_the_network_needs_numpy_alone():
    """It needs neither threadpoolctl, which numpy_ref.fast needs, nor safetensors, which weight files need."""
    program = "import sys; before = set(sys.modules); import numpy_ref.resnet, numpy_ref.train, numpy_ref.check"
    program += "; print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) == {"numpy", "numpy_ref"}
