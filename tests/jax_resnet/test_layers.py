"""jax_resnet.layers against formulas and cases worked by hand; tests/numpy_ref/test_layers.py compares gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_resnet import cpu as forms
from jax_resnet import layers, resnet


def random(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


CONVOLUTIONS = [  # N, H, W, C, K, kernel height, kernel width, stride, padding
    (2, 8, 8, 3, 4, 1, 1, 1, 0),
    (2, 8, 7, 3, 4, 1, 1, 2, 0),
    (2, 8, 8, 3, 4, 3, 3, 1, 1),
    (2, 8, 8, 3, 4, 3, 3, 2, 1),
    (2, 9, 7, 3, 4, 3, 3, 2, 1),
    (1, 5, 6, 1, 2, 3, 3, 1, 0),
    (1, 3, 5, 4, 2, 3, 3, 1, 3),
    (2, 15, 12, 3, 5, 7, 7, 2, 3),
    (2, 6, 6, 2, 3, 2, 3, 3, 1),
    (1, 4, 4, 2, 1, 3, 3, 2, 0),
    (2, 5, 6, 16, 3, 3, 3, 1, 1),
    (2, 7, 4, 17, 3, 3, 3, 2, 1),
    (1, 6, 5, 16, 2, 2, 3, 2, 0),
    (1, 2, 3, 16, 2, 1, 2, 1, 4),
    (2, 1, 1, 16, 3, 3, 3, 1, 1),
    (1, 1, 4, 16, 2, 1, 2, 2, 1),
    (6, 9, 11, 16, 17, 3, 3, 1, 1),
    (6, 17, 21, 16, 3, 3, 3, 2, 1),
    (8, 17, 17, 17, 4, 1, 1, 2, 0),
    (2, 5, 6, 16, 20, 1, 1, 1, 0),
    (3, 8, 14, 17, 16, 3, 3, 1, 1),
]


def convolution(case, rng, dtype="float64"):
    n, h, w, c, k, kh, kw, stride, padding = case
    x, weight, bias = random(rng, n, h, w, c), random(rng, kh, kw, c, k), random(rng, k)
    return functools.partial(layers.conv2d, stride=stride, padding=padding), (x, weight, bias)


def without_forms(monkeypatch, function):
    """Runs function() as on a GPU or TPU, without the forms that `jax_resnet.cpu` has for a CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(forms, "ENABLED", False)
        return function()


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d_is_its_formula(case, x64, monkeypatch):
    """Cross-correlation with equal padding on all sides, in inference and in training. The forms for a CPU have the
    plain form's outputs and gradients. 1e-13 and 1e-12 leave room for the order of summation only."""
    rng = np.random.default_rng(0)
    conv, (x, weight, bias) = convolution(case, rng)
    *_, kh, kw, s, p = case
    padded = np.pad(np.asarray(x), ((0, 0), (p, p), (p, p), (0, 0)))
    h, w = (padded.shape[1] - kh) // s + 1, (padded.shape[2] - kw) // s + 1
    expected = np.zeros((len(x), h, w, weight.shape[3]))
    for i in range(h):
        for j in range(w):
            patch = padded[:, s * i : s * i + kh, s * j : s * j + kw]
            expected[:, i, j] = np.tensordot(patch, np.asarray(weight), 3) + np.asarray(bias)
    dy = random(rng, *expected.shape)

    def both_passes():
        y, vjp = jax.vjp(conv, x, weight, bias)
        return conv(x, weight, bias), y, *vjp(dy)

    plain = without_forms(monkeypatch, both_passes)
    for ours, theirs, tolerance in zip(both_passes(), plain, (1e-13, 1e-13, 1e-12, 1e-12, 1e-12), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    for y in plain[:2]:
        np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-13)


FLOAT32_CONVOLUTIONS = [  # in inference all but the last take XLA's own convolution; each is a special case
    (8, 8, 8, 8, 16, 3, 3, 1, 1),
    (8, 9, 7, 8, 4, 3, 3, 2, 1),
    (8, 8, 10, 8, 4, 3, 3, 2, 1),
    (4, 16, 15, 3, 8, 7, 7, 2, 3),
    (8, 6, 7, 4, 8, 2, 3, 1, 0),
    (8, 6, 7, 4, 8, 2, 3, 3, 1),
    (8, 5, 4, 8, 8, 3, 3, 1, 3),
    (4, 5, 6, 127, 4, 3, 3, 1, 1),
    (6, 9, 11, 32, 17, 3, 3, 1, 1),
    (4, 5, 6, 130, 4, 3, 3, 1, 1),
]


@pytest.mark.parametrize("case", FLOAT32_CONVOLUTIONS, ids=str)
def test_float32_convolutions_are_those_of_float64(case, x64):
    """Outputs and gradients, in the library that XLA:CPU has for float32 only; 1e-5 of the largest is for rounding."""
    rng = np.random.default_rng(4)
    conv, (x, weight, _) = convolution(case, rng)
    dy = random(rng, *jax.eval_shape(conv, x, weight).shape)
    assert forms._direct_pays(x.astype(jnp.float32), weight) == (x.shape[3] <= 128)

    def both_passes(x, weight, dy):
        y, vjp = jax.vjp(conv, x, weight)
        return conv(x, weight), y, *vjp(dy)

    expected = jax.jit(both_passes)(x, weight, dy)
    found = jax.jit(both_passes)(*(array.astype(jnp.float32) for array in (x, weight, dy)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_float32_takes_the_forms_that_are_fastest():
    """Inference takes XLA's own convolution where picture and channels suit it; training takes products only."""

    def program(size, channels, dtype, train=False):
        x, weight = jnp.zeros((8, size, size, channels), dtype), jnp.zeros((3, 3, channels, channels), dtype)
        conv = functools.partial(layers.conv2d, padding=1)

        def both_passes(x, weight):
            y, vjp = jax.vjp(conv, x, weight)
            return vjp(y)

        return jax.jit(both_passes if train else conv).lower(x, weight).as_text()

    def count(*case, **how):
        text = program(*case, **how)
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    assert count(5, 32, "float32") == (1, 0)
    for other in ((2, 32, "float32"), (5, 512, "float32"), (5, 32, "bfloat16")):
        assert count(*other) == (0, 1)
    for case in ((5, 32, "float32"), (2, 32, "float32"), (5, 512, "float32"), (5, 32, "bfloat16")):
        assert count(*case, train=True) == (0, 5)  # the weight's gradient takes a product per row of the kernel
    assert count(5, 8, "float32", train=True) == (0, 3)
    for size, turned in ((8, True), (5, False)):  # 512 positions and 200
        assert ("optimization_barrier" in program(size, 32, "float32", train=True)) == turned


@pytest.mark.parametrize("late", [0.0, np.inf, -0.0, np.nan, []], ids=str)
def test_once_known_changes_no_value(late):
    """No late value changes x, except a nan: it may change x by up to 1e-37."""
    x = np.array([1.5, -np.inf, 0.0, np.nan, 1e30], np.float32)
    late = jnp.broadcast_to(jnp.float32(late).reshape(-1, 1), (2, 3) if np.size(late) else (0, 3))
    atol = 1e-37 if jnp.isnan(late).any() else 0
    np.testing.assert_allclose(jax.jit(forms.once_known)(late, x), x, rtol=0, atol=atol)


def test_a_nan_stays_in_its_channel():
    """A nan in one channel of dy leaves the gradients of other channels alone. An empty batch has a gradient of 0."""

    def dweight(x, dy):
        return jax.vjp(functools.partial(layers.conv2d, padding=1), x, jnp.ones((3, 3, 4, 8)))[1](dy)[1]

    dy = jnp.zeros((2, 6, 6, 8)).at[0, 0, 0, 0].set(jnp.nan)
    found = jnp.isnan(dweight(jnp.ones((2, 6, 6, 4)), dy)).any((0, 1, 2))
    np.testing.assert_array_equal(found, [True] + 7 * [False])
    np.testing.assert_array_equal(dweight(jnp.ones((0, 6, 6, 4)), dy[:0]), 0)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(3, 6, 6, 2), (8, 8, 8, 16)], ids=str)  # the second takes kernel rows, turned
def test_second_derivatives(shape, train, x64):
    """Forward over reverse equals reverse over reverse and central differences of the gradient.

    1e-12 of the largest is for rounding, 1e-6 for the differences' steps of 1e-6, in which no value crosses a kink.
    """
    rng = np.random.default_rng(5)
    gamma, beta, mean, var = norm_arguments(rng, 4)
    x, weight = random(rng, *shape), random(rng, 3, 3, shape[3], 4)

    def network(x, weight, gamma):
        y, *_ = layers.batch_norm(layers.conv2d(x, weight, padding=1), gamma, beta, mean, var, train=train)
        return (layers.max_pool(layers.relu(y)) ** 2).sum()

    point = (x, weight, gamma)
    direction = tuple(random(rng, *a.shape) for a in point)
    gradient = jax.jit(jax.grad(network, (0, 1, 2)))

    @jax.jit
    def products(point, direction):
        forward = jax.jvp(gradient, point, direction)[1]
        reverse = jax.vjp(gradient, *point)[1](direction)  # the Hessian is symmetric
        return forward, reverse

    forward, reverse = products(point, direction)
    ahead, behind = (gradient(*(a + s * v for a, v in zip(point, direction, strict=True))) for s in (1e-6, -1e-6))
    for ours, theirs, more, less in zip(forward, reverse, ahead, behind, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max()
        assert np.abs(ours - (more - less) / 2e-6).max() <= 1e-6 * np.abs(ours).max()
    hessian = jax.jit(jax.hessian(lambda gamma: network(x, weight, gamma)))(gamma)
    of_gamma = products(point, (jnp.zeros_like(x), jnp.zeros_like(weight), direction[2]))[0][2]
    np.testing.assert_allclose(hessian @ direction[2], of_gamma, rtol=1e-11, atol=1e-11)


def test_once_known_keeps_work_apart():
    """XLA merges equal computations, but not across once_known."""

    def twice(between):
        def function(x, y):
            first = jnp.sin(x @ x)
            return first, jnp.sin((z := between(first, x)) @ z) * y

        a = jnp.zeros((64, 64))
        return jax.jit(function).lower(a, a).compile().as_text().count(" dot(")

    assert twice(lambda late, x: x) == 1
    assert twice(forms.once_known) == 2


def test_winograd_is_among_the_cases():
    """Winograd's form is chosen for two cases only, and not in bfloat16, where it would lose digits."""
    rng = np.random.default_rng(0)
    chosen = []
    for case in CONVOLUTIONS:
        _, (x, weight, _) = convolution(case, rng)
        if forms._winograd_pays(x, weight, *case[7:]):
            chosen.append(case[1:3])
            assert not forms._winograd_pays(x.astype(jnp.bfloat16), weight, *case[7:])
    assert chosen == [(9, 11), (8, 14)]  # odd sides, and an even and an odd number of tiles


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d_in_bfloat16_is_summed_in_float32_and_rounded_once(case, x64):
    """Outputs and gradients are those of the same numbers in float64, up to half a unit in the last of 8 bits.

    float32's sums add up to 1e-6 of the largest entry. A gradient rounded at each tap of a patch is off by more.
    """
    rng = np.random.default_rng(7)
    n, h, w, c, k, kh, kw, stride, padding = case
    x, weight = (random(rng, *shape).astype(jnp.bfloat16) for shape in ((n, h, w, c), (kh, kw, c, k)))

    convolve = functools.partial(layers.conv2d, stride=stride, padding=padding)
    dy = random(rng, *jax.eval_shape(convolve, x, weight).shape).astype(jnp.bfloat16)

    @jax.jit
    def results(x, weight, dy):
        y, vjp = jax.vjp(convolve, x, weight)
        return y, *vjp(dy)

    in_float64 = results(*(a.astype(jnp.float64) for a in (x, weight, dy)))
    for half, exact in zip(results(x, weight, dy), in_float64, strict=True):
        assert half.dtype == jnp.bfloat16
        largest = float(jnp.abs(exact).max())
        np.testing.assert_allclose(half.astype(jnp.float64), exact, rtol=2.0**-8, atol=1e-6 * largest)


def norm_arguments(rng, channels):
    return random(rng, channels) + 1.5, random(rng, channels), random(rng, channels), jnp.abs(random(rng, channels)) + 1


def test_batch_norm_by_formula(x64):
    """The biased variance normalizes, the unbiased one enters the running variance, and the momentum is 0.1."""
    rng = np.random.default_rng(1)
    x = np.asarray(random(rng, 4, 3, 2, 5)) * 3 + 2
    weight, bias, running_mean, running_var = (np.asarray(a) for a in norm_arguments(rng, 5))
    y, new_mean, new_var = layers.batch_norm(x, weight, bias, running_mean, running_var, train=True)
    rows = x.reshape(-1, 5)
    expected = (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * weight + bias
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(new_mean, 0.9 * running_mean + 0.1 * rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(new_var, 0.9 * running_var + 0.1 * rows.var(0, ddof=1), rtol=1e-13)
    y, same_mean, same_var = layers.batch_norm(x, weight, bias, running_mean, running_var, train=False)
    np.testing.assert_allclose(y, (x - running_mean) / np.sqrt(running_var + 1e-5) * weight + bias, rtol=1e-12)
    np.testing.assert_array_equal(same_mean, running_mean)
    np.testing.assert_array_equal(same_var, running_var)


@pytest.mark.parametrize("first", ["typical", "outlier"])
def test_batch_norm_survives_a_large_mean(first):
    """float32 is within 1e-3 of float64 at mean 1e3 and deviation 1, even if the value that shifts the moments is
    itself ten deviations off. Unshifted one-pass moments would be off by percents."""
    rng = np.random.default_rng(2)
    x = (1e3 + rng.standard_normal((8, 12, 12, 16))).astype(np.float32)
    if first == "outlier":
        x[0, 0, 0] += 10
    dy = rng.standard_normal(x.shape)
    weight, bias = rng.uniform(0.5, 1.5, 16), rng.standard_normal(16)

    def run(dtype):
        arrays = [jnp.asarray(a, dtype) for a in (x, weight, bias)]
        zero, one = jnp.zeros(16, dtype), jnp.ones(16, dtype)

        def norm(x, weight, bias):
            return layers.batch_norm(x, weight, bias, zero, one, train=True, momentum=1.0)

        (y, mean, var), vjp = jax.vjp(norm, *arrays)
        return y, mean, var, *vjp((jnp.asarray(dy, dtype), jnp.zeros_like(mean), jnp.zeros_like(var)))

    single = run(jnp.float32)
    with jax.enable_x64(True):
        double = [np.asarray(a) for a in run(jnp.float64)]
    for name, ours, exact in zip(("y", "mean", "var", "dx", "dweight", "dbias"), single, double, strict=True):
        error = np.abs(ours - exact).max() / np.abs(exact).max()
        assert error < 1e-3, name


def test_batch_norm_statistics_carry_no_gradient():
    x = jnp.arange(6.0).reshape(3, 2)
    one, zero = jnp.ones(2), jnp.zeros(2)

    def running(x):
        _, mean, var = layers.batch_norm(x, one, zero, zero, one, train=True)
        return mean.sum() + var.sum()

    np.testing.assert_array_equal(jax.grad(running)(x), 0)


def test_batch_norm_takes_its_statistics_in_float32():
    """4,096 ones in bfloat16 (8 bits) would add up to 256; their mean must be 1 and their deviation 0."""
    x = jnp.ones((4096, 1), jnp.bfloat16)
    one, zero = jnp.ones(1), jnp.zeros(1)
    y, mean, var = layers.batch_norm(x, one, zero, zero, one, train=True, momentum=1.0)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_array_equal([y[0, 0], mean[0], var[0]], [0, 1, 0])


def test_forms_of_max_pool_and_batch_norm_are_one_function(x64, monkeypatch):
    """The input is small whole numbers, so most windows have ties. 1e-13 is for the order of summation."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.integers(-2, 3, (2, 9, 8, 3)).astype(float))
    arguments = norm_arguments(rng, 3)
    dy = random(rng, 2, 5, 4, 3)

    def results():
        y, vjp = jax.vjp(layers.max_pool, x)
        norm, norm_vjp = jax.vjp(lambda x: layers.batch_norm(x, *arguments, train=True), x)
        return y, *vjp(dy), *norm, *norm_vjp((x, *arguments[2:]))

    for ours, theirs in zip(results(), without_forms(monkeypatch, results), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_tie_belongs_to_the_first_position():
    """In a 2x2 window of equal values, the first in row-major order gets dy. A maximum of slices would split it."""
    gradient = jax.grad(lambda x: layers.max_pool(x, window=2, stride=2, padding=0).sum())(jnp.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(gradient[0, :, :, 0], np.kron(np.ones((2, 2)), [[1, 0], [0, 0]]))


def test_relu_by_hand():
    """The gradient at 0 is 0, as in torch; jnp.maximum has 1/2 there."""
    x = jnp.array([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(layers.relu(x), [0, 0, 2])
    np.testing.assert_array_equal(jax.grad(lambda x: layers.relu(x).sum())(x), [0, 0, 1])


def test_sigmoid_by_hand():
    np.testing.assert_allclose(layers.sigmoid(jnp.array([-1e4, 0.0, np.log(3.0), 1e4])), [0, 0.5, 0.75, 1], rtol=1e-6)


def test_global_avg_pool_and_flatten_by_hand():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    np.testing.assert_array_equal(layers.global_avg_pool(x), [[3, 4]])
    np.testing.assert_array_equal(layers.flatten(x), [[0, 1, 2, 3, 4, 5, 6, 7]])


def test_softmax_cross_entropy(x64):
    """Logits log 1, log 2, log 5 are probabilities 1/8, 1/4, 5/8."""
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [5.0, 2.0, 1.0]]))
    losses = layers.softmax_cross_entropy(logits, jnp.array([1, 0]))
    np.testing.assert_allclose(losses, [np.log(4), np.log(8 / 5)], rtol=1e-14)


def test_softmax_cross_entropy_is_stable():
    """At logits of ±1e4 in float32, a wrong answer costs their difference, a right one 0; gradients are exact."""
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
    labels = jnp.array([1, 1])
    np.testing.assert_array_equal(layers.softmax_cross_entropy(logits, labels), [2e4, 0])
    gradient = jax.grad(lambda x: layers.softmax_cross_entropy(x, labels).sum())(logits)
    np.testing.assert_array_equal(gradient, [[1, -1], [0, 0]])


def test_nan_survives_a_network():
    """A training that diverges must show. At this size, some of XLA's fusions of jnp.maximum would lose the nan."""
    config = resnet.resnet18()
    params, batch_stats = resnet.init(config, jax.random.key(0))
    batch_stats["bn1"]["running_var"] = jnp.full(64, -1.0)
    logits = jax.jit(lambda x: resnet.apply(config, params, batch_stats, x, train=False).logits)
    assert jnp.isnan(logits(jnp.ones((1, 224, 224, 3)))).all()
    assert jnp.isnan(layers.relu(jnp.array([jnp.nan]))).all()
