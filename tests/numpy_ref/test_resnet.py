"""numpy_ref.resnet against jax_resnet.resnet: outputs, statistics and every gradient, whole and block by block.

BatchNorm's parameters and running statistics are random here: with 1 and 0 half of the possible bugs would not show.
Errors are the largest difference over the largest entry, array by array: gradients of what feeds a BatchNorm are tiny
in the directions that it removes.
"""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from flax.traverse_util import flatten_dict

from jax_resnet import layers as jax_layers
from jax_resnet import resnet as jax_resnet
from numpy_ref import layers, resnet, threads


def randomized(rng, tree):
    """The same tree with other values in its vectors, variances positive."""
    if isinstance(tree, dict):
        return {name: randomized(rng, value) for name, value in tree.items()}
    return tree if tree.ndim > 1 else tree + 0.5 * rng.random(tree.shape) - 0.2


def network(name, **options):
    """The same architecture in both, and random parameters in float64."""
    config = getattr(resnet, name)(num_classes=7, in_channels=2, **options)
    rng = np.random.default_rng(0)
    params, batch_stats = resnet.init(config, rng, np.float64)
    jax_config = getattr(jax_resnet, name)(num_classes=7, in_channels=2, **options)
    return config, jax_config, randomized(rng, params), randomized(rng, batch_stats)


def batch(shape):
    rng = np.random.default_rng(1)
    return rng.standard_normal((*shape, 2)), rng.integers(0, 7, shape[0])


def relative(ours, theirs):
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def errors(ours, theirs):
    """{path: relative error} over two nested dicts with the same names."""
    ours, theirs = flatten_dict(ours, sep="."), flatten_dict(theirs, sep=".")
    assert set(ours) == set(theirs)
    return {name: relative(value, theirs[name]) for name, value in ours.items()}


def run_numpy(config, params, batch_stats, images, labels, train):
    """loss, the gradient of its mean, and what else there is to compare."""
    out, vjp = resnet.apply(config, params, batch_stats, images, train=train, return_activations=True)
    losses, vjp_loss = layers.softmax_cross_entropy(out.logits, labels)
    (dlogits,) = vjp_loss(np.full(len(labels), 1 / len(labels)))
    dparams, dimages = vjp(dlogits)
    return dict(
        loss=losses.mean(),
        logits=out.logits,
        activations=out.activations,
        batch_stats=out.batch_stats,
        dparams=dparams,
        dimages=dimages,
    )


def run_jax(config, params, batch_stats, images, labels, train):
    def loss_fn(params, images):
        out = jax_resnet.apply(config, params, batch_stats, images, train=train, return_activations=True)
        return jax_layers.softmax_cross_entropy(out.logits, labels).mean(), out

    step = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
    (loss, out), (dparams, dimages) = step(params, images)
    return dict(
        loss=loss,
        logits=out.logits,
        activations=out.activations,
        batch_stats=out.batch_stats,
        dparams=dparams,
        dimages=dimages,
    )


NETWORKS = [  # name, options, (N, H, W); 8 of 64x64 leave 32 values per channel in the last stage
    ("resnet18", {}, (8, 64, 64)),
    ("resnet50", {}, (8, 64, 64)),
    ("resnet101", {}, (8, 64, 64)),
    pytest.param("resnet34", {}, (8, 64, 64), marks=pytest.mark.slow),
    pytest.param("resnet152", {}, (8, 64, 64), marks=pytest.mark.slow),
    ("resnet50", dict(stride_in="conv1"), (8, 64, 64)),
    ("resnet18", {}, (8, 65, 83)),
    ("resnet50", {}, (8, 83, 65)),
    ("resnet18", dict(batch_norm=False), (2, 32, 45)),
    ("resnet50", dict(batch_norm=False, stride_in="conv1"), (2, 33, 32)),
]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "options", "shape"), NETWORKS, ids=str)
def test_network_is_jax_network(name, options, shape, train, x64):
    """Loss, logits, activations by name, running statistics, every gradient: 1e-10, the target of the design."""
    config, jax_config, params, batch_stats = network(name, **options)
    images, labels = batch(shape)
    ours = run_numpy(config, params, batch_stats, images, labels, train)
    theirs = run_jax(jax_config, params, batch_stats, images, labels, train)
    assert ours["activations"].keys() == {"stem", "pool"} | {f"{s}.{n}" for s, n, _ in resnet.blocks(config)}
    for name in ours:
        found = errors({name: ours[name]}, {name: theirs[name]})
        assert max(found.values(), default=0) < 1e-10, (name, max(found, key=found.get))


BLOCKS = [  # network, options, stage, number
    ("resnet18", {}, "layer1", "1"),
    ("resnet18", {}, "layer2", "0"),
    ("resnet50", {}, "layer1", "0"),
    ("resnet50", {}, "layer1", "1"),
    ("resnet50", {}, "layer2", "0"),
    ("resnet50", dict(stride_in="conv1"), "layer2", "0"),
    ("resnet50", dict(batch_norm=False), "layer2", "0"),
]


def jax_block(config, params, batch_stats, x, stride, train):
    """A residual block put together from jax_resnet.layers: the definition, once more."""

    def conv_norm(x, params, batch_stats, conv, norm, stride):
        kernel = params[conv]["weight"]
        bias = params[conv].get("bias")
        x = jax_layers.conv2d(x, kernel, bias, stride=stride, padding=kernel.shape[0] // 2)
        if norm in params:
            affine = params[norm]["weight"], params[norm]["bias"]
            running = batch_stats[norm]["running_mean"], batch_stats[norm]["running_var"]
            x, _, _ = jax_layers.batch_norm(x, *affine, *running, train=train)
        return x

    shortcut = x
    if "downsample" in params:
        shortcut = conv_norm(x, params["downsample"], batch_stats.get("downsample"), "0", "1", stride)
    strided = "conv1" if config.block == "basic" else config.stride_in
    convs = [name for name in sorted(params) if name.startswith("conv")]
    for name in convs:
        x = conv_norm(x, params, batch_stats, name, name.replace("conv", "bn"), stride if name == strided else 1)
        x = jax_layers.relu(x if name != convs[-1] else x + shortcut)
    return x


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "options", "stage", "number"), BLOCKS, ids=str)
def test_block_is_jax_block(name, options, stage, number, train, x64):
    """Output and all gradients of one block, at least 32 values per channel; 1e-11: little depth amplifies rounding."""
    config, _, params, batch_stats = network(name, **options)
    params, batch_stats = params[stage][number], batch_stats.get(stage, {}).get(number, {})
    stride = next(s for *name, s in resnet.blocks(config) if name == [stage, number])
    rng = np.random.default_rng(2)
    channels = params["conv1"]["weight"].shape[2]
    x = rng.standard_normal((8, 4, 4, channels))
    (y, _), vjp = resnet.residual_block(config, params, batch_stats, x, stride, train=train)
    expected, jax_vjp = jax.vjp(
        lambda p, x: jax_block(config, p, batch_stats, x, stride, train), params, jnp.asarray(x)
    )
    assert relative(y, expected) < 1e-11
    dy = rng.standard_normal(y.shape)
    dparams, dx = vjp(dy.copy())
    expected_dparams, expected_dx = jax_vjp(jnp.asarray(dy))
    assert max(errors(dparams, expected_dparams).values()) < 1e-11
    assert relative(dx, expected_dx) < 1e-11


def plain_bottleneck(params, batch_stats, x, momentum, batch_norm=layers.batch_norm):
    """A bottleneck without projection from the plain layers, for the two tests below: (y, new statistics, vjp)."""
    steps, statistics, y = [], {}, x
    for i in (1, 2, 3):
        kernel, affine, running = params[f"conv{i}"]["weight"], params[f"bn{i}"], batch_stats[f"bn{i}"]
        y, vjp_conv = layers.conv2d(y, kernel, padding=len(kernel) // 2)
        arrays = affine["weight"], affine["bias"], running["running_mean"], running["running_var"]
        (y, *statistics[f"bn{i}"]), vjp_norm = batch_norm(y, *arrays, train=True, momentum=momentum)
        y, vjp_relu = layers.relu(y if i < 3 else y + x)
        steps.append((i, vjp_conv, vjp_norm, vjp_relu))

    def vjp(dy):
        dparams, dshortcut = {}, None
        for i, vjp_conv, vjp_norm, vjp_relu in reversed(steps):
            (dy,) = vjp_relu(dy)
            dshortcut = dy if i == 3 else dshortcut
            dy, dgamma, dbeta = vjp_norm(dy)
            dy, dkernel, _ = vjp_conv(dy)
            dparams |= {f"conv{i}": {"weight": dkernel}, f"bn{i}": {"weight": dgamma, "bias": dbeta}}
        return dparams, dy + dshortcut

    return y, statistics, vjp


def bottleneck_case(shape=(8, 4, 4)):
    config, _, params, batch_stats = network("resnet50")
    rng = np.random.default_rng(3)
    x = rng.standard_normal((*shape, 256))
    return config, params["layer1"]["1"], batch_stats["layer1"]["1"], x, rng.standard_normal(x.shape)


def test_momentum_does_not_touch_training_gradients():
    """The running statistics move by momentum; output and gradients of training never see them: equal to the bit."""
    _, params, batch_stats, x, dy = bottleneck_case()
    results = {}
    for momentum in (0.0, 0.1, 1.0):
        y, statistics, vjp = plain_bottleneck(params, batch_stats, x, momentum)
        results[momentum] = flatten_dict({"y": y, "x": vjp(dy)[1], **vjp(dy)[0]}, sep="."), statistics
    for momentum in (0.1, 1.0):
        for name, value in results[momentum][0].items():
            np.testing.assert_array_equal(value, results[0.0][0][name])
        assert np.abs(results[momentum][1]["bn2"][0] - results[0.0][1]["bn2"][0]).max() > 0.01
    np.testing.assert_array_equal(results[0.0][1]["bn2"][0], batch_stats["bn2"]["running_mean"])


def statistics_as_constants(x, weight, bias, running_mean, running_var, *, train, momentum):
    """The classic mistake: a BatchNorm whose backward pass forgets that mean and deviation depend on x."""
    outputs, vjp = layers.batch_norm(x, weight, bias, running_mean, running_var, train=train, momentum=momentum)
    rows = x.reshape(-1, x.shape[-1])
    scale = weight / np.sqrt(rows.var(0) + 1e-5)
    return outputs, lambda dy: (dy * scale, *vjp(dy)[1:])


def test_what_breaks_gradients_through_batch_norm():
    """The docstring of numpy_ref names it; here the network's own block, the plain one, and the mistake, side by side.

    The plain block agrees with the network's to 1e-12. With the batch's statistics taken for constants the last
    BatchNorm's own gradients are still right, and everything before it is wrong by a good part of its size.
    """
    config, params, batch_stats, x, dy = bottleneck_case()
    right = flatten_dict(resnet.residual_block(config, params, batch_stats, x, 1, train=True)[1](dy.copy())[0], sep=".")
    plain = flatten_dict(plain_bottleneck(params, batch_stats, x, 0.1)[2](dy)[0], sep=".")
    wrong = flatten_dict(plain_bottleneck(params, batch_stats, x, 0.1, statistics_as_constants)[2](dy)[0], sep=".")
    assert max(relative(plain[name], right[name]) for name in right) < 1e-12
    assert relative(wrong["bn3.weight"], right["bn3.weight"]) < 1e-12
    assert min(relative(wrong[name], right[name]) for name in right if not name.startswith("bn3")) > 0.05


def test_few_values_per_channel_magnify_rounding():
    """Weights moved by one unit in the last place move ResNet-101's gradients by more than 1e-8 with two values per
    channel in the last stage, by less than 1e-10 with 32. So the tests here, and anyone's, need enough values."""
    config, _, params, batch_stats = network("resnet101")
    moved = params | {"conv1": {"weight": np.nextafter(params["conv1"]["weight"], np.inf)}}
    change = {}
    for shape in ((2, 32, 32), (8, 64, 64)):
        here, there = (run_numpy(config, p, batch_stats, *batch(shape), True)["dparams"] for p in (params, moved))
        change[shape] = max(errors(there, here).values())
    assert change[8, 64, 64] < 1e-10
    assert change[2, 32, 32] > 1e-8


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_apply_is_pure(train, batch_norm):
    """Nothing that goes in or comes out changes, and a second vjp gives the first one's gradients."""
    config, _, params, batch_stats = network("resnet50", batch_norm=batch_norm)
    images, _ = batch((4, 32, 32))
    copies = [flatten_dict(tree) for tree in (params, batch_stats)]
    copies = [{name: value.copy() for name, value in tree.items()} for tree in copies] + [images.copy()]
    out, vjp = resnet.apply(config, params, batch_stats, images, train=train, return_activations=True)
    activations = {name: value.copy() for name, value in out.activations.items()}
    dlogits = np.ones(out.logits.shape)
    first, second = vjp(dlogits), vjp(dlogits)
    for name, value in flatten_dict(first[0]).items():
        np.testing.assert_array_equal(value, flatten_dict(second[0])[name])
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(dlogits, 1)
    np.testing.assert_array_equal(images, copies[2])
    for tree, copy in zip((params, batch_stats), copies, strict=False):
        for name, value in flatten_dict(tree).items():
            np.testing.assert_array_equal(value, copy[name])
    for name, value in out.activations.items():
        np.testing.assert_array_equal(value, activations[name])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, dict(batch_norm=False)], ids=str)
def test_threads_change_nothing(train, options):
    """One thread or several, equal shares or not: one BatchNorm over the whole batch; 1e-11 is for rounding."""
    config, _, params, batch_stats = network("resnet50", **options)
    images, _ = batch((11, 48, 48))
    results = {}
    for count in (1, 2, 4, 100):  # at most one for two images: 5
        out, vjp = resnet.apply(
            config, params, batch_stats, images, train=train, return_activations=True, threads=count
        )
        dparams, dimages = vjp(np.random.default_rng(2).standard_normal(out.logits.shape))
        results[count] = {"out": dict(out._asdict()), "dparams": dparams, "dimages": dimages}
    for count in (2, 4, 100):
        assert max(errors(results[count], results[1]).values()) < 1e-11


def test_an_error_in_one_thread_ends_all():
    """The others would wait for it forever."""
    team = threads.Team(2)

    def fails():
        team.gathers[0]("a")
        raise FloatingPointError("here")

    def waits():
        return team.gathers[1]("b"), team.gathers[1]("b")

    with pytest.raises(FloatingPointError, match="here"):
        team.run([fails, waits])
    assert team.run([lambda: team.gathers[0](0), lambda: team.gathers[1](1)]) == [[0, 1], [0, 1]]  # and then go on


def test_blas_gets_its_threads_back():
    """Also when several threads of a program run networks at once: the setting is the whole process's."""

    def blas_threads():
        return [library["num_threads"] for library in threadpoolctl.threadpool_info() if "numpy" in library["filepath"]]

    config = resnet.resnet18(num_classes=2, in_channels=1)
    params, batch_stats = resnet.init(config, np.random.default_rng(0))
    images, inside, before = np.zeros((4, 32, 32, 1), np.float32), [], blas_threads()

    def run(_):
        resnet.apply(config, params, batch_stats, images, train=True, threads=2)
        threads.Team(2).run([lambda: inside.append(blas_threads())] * 2)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(6)))
    assert blas_threads() == before
    assert {count for counts in inside for count in counts} == {1}


def test_gather_hands_over_the_values_of_all_threads_in_their_order():
    team = threads.Team(3)
    runs = [lambda i=i: [team.gathers[i]((i, turn)) for turn in range(200)] for i in range(3)]
    expected = [[(i, turn) for i in range(3)] for turn in range(200)]
    assert team.run(runs) == [expected] * 3


def test_float32_stays_float32():
    config = resnet.resnet18(num_classes=5, in_channels=1)
    params, batch_stats = resnet.init(config, np.random.default_rng(0))
    images = np.random.default_rng(1).standard_normal((4, 32, 32, 1)).astype(np.float32)
    for train in (True, False):
        out, vjp = resnet.apply(config, params, batch_stats, images, train=train, return_activations=True)
        dparams, dimages = vjp(np.ones_like(out.logits))
        for tree in (out.batch_stats, out.activations, dparams, {"logits": out.logits, "images": dimages}):
            assert {str(a.dtype) for a in flatten_dict(tree).values()} == {"float32"}


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
    """Same names and shapes; the same constants where they are constant; deviations within 5% of JAX's where drawn
    (6 standard errors of the smallest array, the 9,408 numbers of the stem), 20% for the biases."""
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


def test_bad_input_is_named():
    config = resnet.resnet18(num_classes=5, in_channels=1)
    params, batch_stats = resnet.init(config, np.random.default_rng(0))
    images = np.zeros((2, 32, 32, 1), np.float32)
    for bad, message in [
        (images[0], "must be .N, H, W, C. with N >= 1 and C = 1"),
        (images.transpose(0, 3, 1, 2), "NCHW"),
        (images[:, :31], "at least 32x32, got 31x32"),
        (images.astype(np.uint8), "float, got uint8"),
        (images[:0], "N >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            resnet.apply(config, params, batch_stats, bad, train=False)
    without = {name: value for name, value in params.items() if name != "layer3"}
    for bad, message in [
        (without, "layer3"),
        (params | {"fc": params["fc"] | {"weight": np.zeros((512, 4))}}, r"fc.weight must be \(512, 5\)"),
        (params | {"fc": {"weight": params["fc"]["weight"]}}, "params.fc must have .'bias', 'weight'."),
    ]:
        with pytest.raises(ValueError, match=message):
            resnet.apply(config, bad, batch_stats, images, train=False)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        resnet.apply(config, params, batch_stats, images, train=False, threads=0)
    with pytest.raises(ValueError, match="more than one value per channel"):
        resnet.apply(config, params, batch_stats, images[:1], train=True)
    for options, message in [
        (dict(num_classes=0), "num_classes"),
        (dict(stride_in="conv3"), "stride_in"),
    ]:
        with pytest.raises(ValueError, match=message):
            resnet.resnet50(**options)
