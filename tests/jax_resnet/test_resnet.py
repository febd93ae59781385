"""jax_resnet.resnet: the published sizes, the order of blocks, the options, and the errors for bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_networks
from flax.traverse_util import flatten_dict
from trees import close

import numpy_ref.resnet
from jax_resnet import cpu, layers, resnet

SMALL = dict(stage_sizes=[1, 1, 1, 1], num_classes=3)  # a list, as people pass it


apply = jax.jit(resnet.apply, static_argnums=0, static_argnames=("train", "dtype", "remat", "return_activations"))


def drawn(config, dtype=np.float64):
    """Parameters and statistics with no 0 or 1 among them, because initial 0s and 1s hide many mistakes."""
    return random_networks.randomized(np.random.default_rng(0), resnet.init(config, jax.random.key(0), dtype))


@pytest.mark.parametrize("stride_in", ["conv2", "conv1"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet101"])
def test_network_is_that_of_numpy_ref(arch, stride_in, x64):
    """jit sorts the keys as "0", "1", "10", "11", ..., "2": ResNet-101, with 23 blocks in a stage, shows a wrong order.

    1e-12 of the largest entry is for the order of operations in 101 layers of float64.
    """
    config, *arrays = random_networks.network(arch, stride_in=stride_in)
    arguments = *arrays, random_networks.images_of((2, 33, 40))
    options = dict(train=False, return_activations=True)
    expected, _ = numpy_ref.resnet.apply(config, *arguments, **options)
    ours = apply(resnet.ResNetConfig(**dataclasses.asdict(config)), *arguments, **options)
    close(ours._asdict(), expected._asdict(), 1e-12)


def test_gradient_of_images_is_that_of_numpy_ref(x64):
    config, *arrays = random_networks.network("resnet18")
    images = random_networks.images_of((2, 33, 40))
    out, vjp = numpy_ref.resnet.apply(config, *arrays, images, train=False)
    run = functools.partial(resnet.apply, resnet.ResNetConfig(**dataclasses.asdict(config)), *arrays, train=False)
    ours = jax.jit(jax.grad(lambda images: run(images).logits.sum()))(images)
    close(ours, vjp(np.ones_like(out.logits))[1], 1e-12)


def small_loss(block, **options):
    """A small network's loss as a function of its parameters, with the parameters."""
    config = resnet.ResNetConfig(block, **SMALL)
    params, batch_stats = drawn(config)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32, 33, 3)))

    def function(params):
        out = resnet.apply(config, params, batch_stats, images, **options)
        return layers.softmax_cross_entropy(out.logits, jnp.array([0, 1, 2, 1])).mean()

    return function, params


@pytest.mark.parametrize(("block", "train", "remat"), [("basic", True, True), ("bottleneck", False, False)])
def test_hessian_vector_products(block, train, remat, x64):
    """Forward over reverse equals reverse over reverse, within 1e-10 of an array's largest entry."""
    loss, params = small_loss(block, train=train, remat=remat)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), params)

    @jax.jit
    def products(params, direction):
        gradient = jax.grad(loss)
        return jax.jvp(gradient, (params,), (direction,))[1], jax.vjp(gradient, params)[1](direction)[0]

    for ours, theirs in zip(*map(jax.tree.leaves, products(params, direction)), strict=True):
        assert 0 < np.abs(ours - theirs).max() + np.abs(theirs).max()
        assert np.abs(ours - theirs).max() <= 1e-10 * np.abs(theirs).max()


def test_remat_and_the_forms_for_a_cpu_change_nothing(x64, monkeypatch):
    """Loss and gradients are the same with and without remat, and without the forms for a CPU. 1e-12 of an array's
    largest entry is for rounding."""

    def gradients(remat):
        jax.clear_caches()  # a trace is reused even if cpu.ENABLED changes
        function, params = small_loss("basic", train=True, remat=remat)
        return jax.tree.leaves(jax.jit(jax.value_and_grad(function))(params))

    ours = [gradients(remat=True), gradients(remat=False)]
    monkeypatch.setattr(cpu, "ENABLED", False)
    theirs = gradients(remat=True)
    monkeypatch.undo()
    jax.clear_caches()
    for a, b, c in zip(*ours, theirs, strict=True):
        assert max(np.abs(a - c).max(), np.abs(b - c).max()) <= 1e-12 * np.abs(c).max()


def test_no_classes_gives_the_pooled_vector():
    """All parameters but fc are drawn as with classes. The vector is float32 even with bfloat16 activations."""
    headless, whole = (resnet.ResNetConfig("basic", **SMALL | dict(num_classes=n)) for n in (0, 3))
    params, batch_stats = resnet.init(headless, jax.random.key(0))
    others, _ = resnet.init(whole, jax.random.key(0))
    fc = others.pop("fc")
    jax.tree.map(np.testing.assert_array_equal, params, others)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    out = apply(headless, params, batch_stats, images, train=False, dtype=jnp.bfloat16, return_activations=True)
    assert (out.logits.shape, out.logits.dtype) == ((2, resnet.feature_channels(headless)), jnp.float32)
    np.testing.assert_array_equal(out.logits, out.activations["pool"])
    out = apply(whole, {**params, "fc": fc}, batch_stats, images, train=False, return_activations=True)
    np.testing.assert_array_equal(
        out.activations["pool"], apply(headless, params, batch_stats, images, train=False).logits
    )


def test_eps_and_momentum_of_batch_norm():
    """The stem's statistics move by the momentum; a large eps makes activations small."""
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    found = {}
    for eps, momentum in [(1e-5, 1.0), (1e4, 0.0)]:
        config = resnet.ResNetConfig("basic", **SMALL, batch_norm_eps=eps, batch_norm_momentum=momentum)
        params, batch_stats = resnet.init(config, jax.random.key(0))
        found[eps] = apply(config, params, batch_stats, images, train=True, return_activations=True)
    np.testing.assert_array_equal(found[1e4].batch_stats["bn1"]["running_mean"], 0)
    x = layers.conv2d(images, params["conv1"]["weight"], stride=2, padding=3)
    np.testing.assert_allclose(found[1e-5].batch_stats["bn1"]["running_mean"], x.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    assert found[1e4].activations["stem"].max() < 0.1 < found[1e-5].activations["stem"].max()


def test_bfloat16_activations():
    """Activations are bfloat16; logits, pooled vector and statistics are float32. The logits stay near float32's."""
    config = resnet.resnet18(num_classes=10)
    params, batch_stats = drawn(config, dtype=np.float32)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((8, 64, 64, 3)), jnp.float32)
    run = functools.partial(apply, config, params, batch_stats, images, train=True, return_activations=True)
    half, single = run(dtype=jnp.bfloat16), run()
    assert {half.activations[name].dtype for name in ("stem", "layer4.1")} == {jnp.dtype(jnp.bfloat16)}
    assert {half.logits.dtype, half.activations["pool"].dtype} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(half.batch_stats)} == {jnp.dtype(jnp.float32)}
    # Significands have 8 bits. Independent errors of some 20 layers give a few percent of the largest logit.
    assert np.abs(half.logits - single.logits).max() < 0.1 * np.abs(single.logits).max()


def test_initial_weights():
    """A key fixes all draws. Kernels have the published deviation, dense weights reach 1/sqrt(in), BatchNorm is 1."""
    config = resnet.resnet18()
    params, batch_stats = resnet.init(config, jax.random.key(0))
    kernel = params["layer3"]["0"]["conv2"]["weight"]
    assert float(kernel.std()) == pytest.approx(np.sqrt(2 / (9 * 256)), rel=0.01)
    assert float(jnp.abs(params["fc"]["weight"]).max()) == pytest.approx(1 / np.sqrt(512), rel=1e-3)
    assert float(params["layer1"]["0"]["bn2"]["weight"].min()) == 1
    np.testing.assert_array_equal(batch_stats["bn1"]["running_var"], 1)
    again, _ = resnet.init(config, jax.random.key(0))
    other, _ = resnet.init(config, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert not np.array_equal(other["conv1"]["weight"], params["conv1"]["weight"])


def test_weights_are_at_least_float32():
    params, batch_stats = resnet.init(resnet.resnet18(), jax.random.key(0), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, batch_stats))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("shape", [(1,), (3, 5), (3, 3, 16, 32)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_draws_are_those_of_their_shape(shape, dtype, x64):
    """Draws are cut from longer ones, yet equal JAX's draws of their own shape."""
    key = jax.random.key(1)
    drawn = resnet._draw(jax.random.normal, 0.5, key, shape, dtype)
    assert drawn.dtype == dtype
    np.testing.assert_array_equal(drawn, 0.5 * jax.random.normal(key, shape, dtype))


def test_equal_blocks_are_traced_once(monkeypatch):
    """Of ResNet-101's 104 convolutions, 29 are traced: the stem, and 28 in the 8 kinds of blocks."""
    traced = []
    conv2d = layers.conv2d
    monkeypatch.setattr(layers, "conv2d", lambda *args, **kwargs: traced.append(args) or conv2d(*args, **kwargs))
    jax.clear_caches()
    config = resnet.resnet101()
    arrays = jax.eval_shape(lambda key: resnet.init(config, key), jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    jax.eval_shape(lambda params, stats, x: resnet.apply(config, params, stats, x, train=True), *arrays, images)
    assert len(traced) == 1 + 4 * 4 + 4 * 3
    jax.clear_caches()  # what was traced here has the counting function in it


def test_zero_gamma_makes_each_block_its_shortcut():
    config = resnet.ResNetConfig("bottleneck", (1, 1, 3, 1), zero_gamma=True)
    params, batch_stats = resnet.init(config, jax.random.key(0))
    assert float(jnp.abs(params["layer3"]["2"]["bn3"]["weight"]).max()) == 0
    assert float(params["layer3"]["2"]["bn2"]["weight"].min()) == 1
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    out = apply(config, params, batch_stats, images, train=True, return_activations=True)
    np.testing.assert_array_equal(out.activations["layer3.2"], out.activations["layer3.0"])


def test_no_batch_norm_keeps_its_scale():
    """This ablation has biased convolutions, no statistics, and activations that stay in range over 34 layers."""
    config = resnet.resnet34(num_classes=5, in_channels=1, batch_norm=False)
    params, batch_stats = resnet.init(config, jax.random.key(0))
    flat = flatten_dict(params, sep=".")
    assert batch_stats == {}
    assert not [name for name in flat if "bn" in name or "downsample.1" in name]
    assert flat["layer2.0.downsample.0.bias"].shape == (128,)
    images = jax.random.normal(jax.random.key(1), (4, 64, 64, 1))
    out = apply(config, params, batch_stats, images, train=True, return_activations=True)
    assert out.batch_stats == {}
    assert 1e-2 < float(out.activations["layer4.2"].std()) < 1e2


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_any_size_from_32_works(block):
    config = resnet.ResNetConfig(block, **SMALL, in_channels=1)
    params, batch_stats = resnet.init(config, jax.random.key(0))
    for size in [(32, 32), (33, 47), (64, 96)]:
        out = apply(config, params, batch_stats, jnp.ones((2, *size, 1)), train=False)
        assert out.logits.shape == (2, 3)
        assert out.activations == {}
        assert bool(jnp.isfinite(out.logits).all())


MISTAKES = {
    "NCHW": ((8, 3, 96, 96), jnp.float32, r"C = 3 \(config.in_channels\), got \(8, 3, 96, 96\): is this NCHW\?"),
    "rank": ((96, 96, 3), jnp.float32, r"images must be \(N, H, W, C\)"),
    "channels": ((8, 96, 96, 1), jnp.float32, r"C = 3 .* got \(8, 96, 96, 1\)$"),
    "small": ((8, 96, 31, 3), jnp.float32, "at least 32x32, got 96x31"),
    "integer": ((8, 96, 96, 3), jnp.uint8, "images must be float, got uint8"),
}


@pytest.mark.parametrize(("shape", "dtype", "message"), MISTAKES.values(), ids=MISTAKES)
def test_bad_images_are_named(shape, dtype, message):
    config = resnet.resnet18()
    with pytest.raises(ValueError, match=message):
        resnet.apply(config, {}, {}, jnp.ones(shape, dtype), train=True)


def test_weights_of_another_network_are_named():
    small, large = resnet.resnet18(), resnet.resnet34()
    params, batch_stats = resnet.init(small, jax.random.key(0))
    with pytest.raises(ValueError, match=r"there is no 'layer1.2.conv1.weight'"):
        resnet.apply(large, params, batch_stats, jnp.ones((1, 32, 32, 3)), train=False)


@pytest.mark.parametrize(
    "options",
    [
        dict(stride_in="conv3"),
        dict(num_classes=-1),
        dict(in_channels=0),
        dict(stage_sizes=(1, 2, 3)),
        dict(batch_norm_eps=0.0),
        dict(batch_norm_momentum=1.5),
    ],
    ids=str,
)
def test_bad_configs_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        resnet.ResNetConfig(**{"block": "basic", "stage_sizes": (2, 2, 2, 2), **options})


@pytest.mark.slow
def test_hessian_of_a_network(x64):
    """jax.hessian (forward over reverse) is symmetric and equals reverse over reverse to 1e-10 of its largest entry."""
    config = resnet.ResNetConfig("basic", (1, 1, 1, 1), num_classes=3, in_channels=1)
    params, batch_stats = resnet.init(config, jax.random.key(0), jnp.float64)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 1))

    def loss(weight):
        changed = params | {"bn1": params["bn1"] | {"weight": weight}}
        out = resnet.apply(config, changed, batch_stats, images, train=True)
        return layers.softmax_cross_entropy(out.logits, jnp.array([0, 2])).mean()

    at = params["bn1"]["weight"]
    found, expected = jax.jit(jax.hessian(loss))(at), jax.jit(jax.jacrev(jax.grad(loss)))(at)
    bound = 1e-10 * np.abs(expected).max()
    assert bound > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
    np.testing.assert_allclose(found, found.T, rtol=0, atol=bound)
