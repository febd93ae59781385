"""numpy_ref.layers against central differences, against jax_resnet.layers, and against one another, in float64."""

import functools
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import norm_arrays
from trees import close

from jax_resnet import layers as jax_layers
from numpy_ref import convolution, layers
from numpy_ref.check import check_vjp

CONVOLUTIONS = [  # N, H, W, C, K, kernel height, kernel width, stride, padding
    (2, 8, 8, 3, 4, 1, 1, 1, 0),
    (2, 8, 7, 3, 4, 1, 1, 2, 0),
    (2, 4, 5, 3, 4, 1, 1, 1, 2),
    (2, 8, 8, 3, 4, 3, 3, 1, 1),
    (2, 8, 8, 3, 4, 3, 3, 2, 1),
    (2, 9, 7, 3, 4, 3, 3, 2, 1),
    (1, 5, 6, 1, 2, 3, 3, 1, 0),
    (8, 3, 5, 4, 2, 3, 3, 1, 3),
    (2, 15, 12, 3, 5, 7, 7, 2, 3),
    (1, 15, 13, 1, 1, 7, 7, 1, 3),
    (2, 6, 6, 2, 3, 2, 3, 3, 1),
    (3, 6, 5, 2, 3, 3, 2, 1, 2),
    (1, 4, 4, 2, 1, 3, 3, 2, 0),
    (1, 3, 3, 1, 1, 3, 3, 1, 0),
]
POOLINGS = [  # N, H, W, C, window, stride, padding
    (2, 8, 8, 3, 3, 2, 1),
    (2, 9, 7, 2, 3, 2, 1),
    (1, 5, 6, 1, 2, 2, 0),
    (2, 5, 5, 2, 3, 1, 1),
    (1, 7, 6, 2, 2, 3, 1),
]
NORMS = [(2, 3, 1, 3), (4, 5, 3, 2), (8, 1, 1, 1), (3, 7), (1, 4, 4, 2)]  # x
DENSES = [(4, 3, 2), (1, 1, 1), (2, 5, 1)]  # N, C, K


def convolution_case(rng, case, bias):
    n, h, w, c, k, kh, kw, stride, padding = case
    arrays = [rng.standard_normal((n, h, w, c)), rng.standard_normal((kh, kw, c, k))]
    return arrays + [rng.standard_normal(k)] * bias, dict(stride=stride, padding=padding)


def cases():
    """id -> name of the layer, the arrays that it has gradients for, its other arrays, its options.

    One convolution is here in all three forms; `test_three_convolutions_are_one` has the others.
    """
    rng = np.random.default_rng(0)
    table = {}
    for case in CONVOLUTIONS:
        for bias in (True, False):
            arrays, options = convolution_case(rng, case, bias)
            for name in ("conv2d", "conv2d_unfolded", "conv2d_loops")[: 3 if case is CONVOLUTIONS[5] else 1]:
                table[f"{name} {case}{' bias' * bias}"] = name, arrays, (), options
    for shape in NORMS:
        *arrays, mean, var = norm_arrays(rng, shape)
        for train in (True, False):
            table[f"batch_norm {shape} train={train}"] = "batch_norm", arrays, (mean, var), dict(train=train)
    for case in POOLINGS:
        options = dict(zip(("window", "stride", "padding"), case[4:], strict=True))
        table[f"max_pool {case}"] = "max_pool", [rng.standard_normal(case[:4])], (), options
    for n, c, k in DENSES:
        arrays = [rng.standard_normal((n, c)), rng.standard_normal((c, k)), rng.standard_normal(k)]
        table[f"dense {n, c, k} bias"] = "dense", arrays, (), {}
        table[f"dense {n, c, k}"] = "dense", arrays[:2], (), {}
    image = rng.standard_normal((2, 3, 5, 4))
    for name in ("relu", "sigmoid", "global_avg_pool", "flatten"):
        table[name] = name, [image], (), {}
    for scale in (1, 30):
        logits, labels = scale * rng.standard_normal((5, 4)), np.array([0, 3, 1, 1, 2])
        table[f"softmax_cross_entropy x{scale}"] = "softmax_cross_entropy", [logits], (labels,), {}
    return table


CASES = cases()
over_cases = pytest.mark.parametrize("case", CASES)


@over_cases
def test_vjp_against_central_differences(case):
    """The tolerance is check_vjp's default, 1e-6 of the gradient's length."""
    name, arrays, others, options = CASES[case]
    check_vjp(lambda *arrays: getattr(layers, name)(*arrays, *others, **options), *arrays)


@over_cases
def test_layer_is_jax_layer(case, x64):
    """Outputs, statistics and gradients; 1e-12 leaves room for the order of summation only."""
    name, arrays, others, options = CASES[case]
    layer = getattr(jax_layers, name.removesuffix("_loops").removesuffix("_unfolded"))

    def function(*arrays):
        output = layer(*arrays, *others, **options)
        return (output[0], output[1:]) if name == "batch_norm" else (output, ())

    @jax.jit
    def run_jax(arrays, dy):
        y, vjp, statistics = jax.vjp(function, *arrays, has_aux=True)
        return y, statistics, vjp(dy)

    output, vjp = getattr(layers, name)(*arrays, *others, **options)
    y, *statistics = output if name == "batch_norm" else (output,)
    dy = np.random.default_rng(2).standard_normal(y.shape)
    gradients = vjp(dy)
    assert isinstance(gradients, tuple)
    close((y, tuple(statistics), gradients[: len(arrays)]), run_jax(arrays, dy), 1e-12)
    assert gradients[len(arrays) :] in ((), (None,))  # of an absent bias


@over_cases
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layers_are_pure_and_keep_the_type(case, dtype):
    name, arrays, others, options = CASES[case]
    arrays = [a.astype(dtype) for a in arrays]
    others = tuple(a.astype(dtype) if a.dtype.kind == "f" else a for a in others)
    before = [a.copy() for a in (*arrays, *others)]
    output, vjp = getattr(layers, name)(*arrays, *others, **options)
    outputs = output if name == "batch_norm" else (output,)
    dy = np.random.default_rng(3).standard_normal(outputs[0].shape).astype(dtype)
    kept, dy_before = [a.copy() for a in outputs], dy.copy()
    first, second = vjp(dy), vjp(dy)
    for a, b in zip((*arrays, *others, *outputs, dy), (*before, *kept, dy_before), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(first, second, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a, b)
            assert a.dtype == dtype
    assert all(a.dtype == dtype for a in outputs)


@st.composite
def convolutions(draw):
    """Any small convolution that has an output."""
    kh, kw, padding = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 4))
    h = draw(st.integers(max(1, kh - 2 * padding), 7))
    w = draw(st.integers(max(1, kw - 2 * padding), 7))
    n, c, k, stride = (draw(st.integers(1, 3)) for _ in range(4))
    return n, h, w, c, k, kh, kw, stride, padding


@given(convolutions(), st.booleans(), st.integers(0, 2**32 - 1), st.integers(1, 200))
@settings(deadline=None, max_examples=60)
def test_three_convolutions_are_one(case, bias, seed, block_rows):
    """Outputs and gradients, for any shape and for blocks of any size; 1e-12 is for the order of summation."""
    rng = np.random.default_rng(seed)
    arrays, options = convolution_case(rng, case, bias)
    expected, vjp_loops = layers.conv2d_loops(*arrays, **options)
    dy = rng.standard_normal(expected.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "BLOCK_ROWS", block_rows)
        patch.setattr(convolution, "BLOCK_BYTES", 1)
        results = [(expected, *vjp_loops(dy))]
        for layer in (layers.conv2d, layers.conv2d_unfolded):
            y, vjp = layer(*arrays, **options)
            results.append((y, *vjp(dy)))
    for ours in results[1:]:
        for mine, theirs in zip(ours, results[0], strict=True):
            if theirs is None:
                assert mine is None
            else:
                np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_max_pool_gives_each_gradient_to_the_first_maximum(n, h, w, c, window, stride):
    """Results equal the definition exactly, window by window, on whole numbers with many ties."""
    padding = window // 2
    rng = np.random.default_rng([n, h, w, c, window, stride])
    x = rng.integers(0, 3, (n, h, w, c)).astype(float)
    if min(h, w) + 2 * padding < window:
        return
    y, vjp = layers.max_pool(x, window=window, stride=stride, padding=padding)
    dy = rng.integers(1, 9, y.shape).astype(float)
    expected_y, expected_dx = np.full(y.shape, -np.inf), np.zeros(x.shape)
    for at in np.ndindex(y.shape):
        best = None
        for u, v in np.ndindex(window, window):
            row, column = at[1] * stride + u - padding, at[2] * stride + v - padding
            if 0 <= row < h and 0 <= column < w and x[at[0], row, column, at[3]] > expected_y[at]:
                best = (at[0], row, column, at[3])
                expected_y[at] = x[best]
        expected_dx[best] += dy[at]
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(vjp(dy)[0], expected_dx)


def test_relu_has_gradient_0_at_0():
    y, vjp = layers.relu(np.array([-1.0, 0.0, -0.0, 2.0]))
    np.testing.assert_array_equal(y, [0, 0, 0, 2])
    np.testing.assert_array_equal(vjp(np.ones(4))[0], [0, 0, 0, 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_cross_entropy_of_huge_logits(dtype):
    """A certain right answer costs 0, a certain wrong one the difference of the logits."""
    logits = np.array([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4]], dtype)
    losses, vjp = layers.softmax_cross_entropy(logits, np.array([0, 0, 1]))
    np.testing.assert_allclose(losses, [0, 2e4, np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(vjp(np.ones(3, dtype))[0], [[0, 0], [-1, 1], [0.5, -0.5]], atol=1e-6)


def test_sigmoid_of_huge_values():
    with np.errstate(all="raise", under="ignore"):
        y, vjp = layers.sigmoid(np.array([-1e4, -100.0, 0.0, 1e4]))
        np.testing.assert_allclose(y, [0, np.exp(-100.0), 0.5, 1], rtol=1e-15)
        np.testing.assert_allclose(vjp(np.ones(4))[0], [0, np.exp(-100.0), 0.25, 0], rtol=1e-15)


@pytest.mark.parametrize(("kernel", "stride", "copies"), [(3, 1, 9), (3, 2, 9 / 4), (1, 1, 1), (1, 2, 1 / 4)])
def test_conv2d_keeps_no_unfolded_input(kernel, stride, copies):
    """Between the passes conv2d keeps nothing but y; the plain form keeps patches, up to nine copies of x."""
    x, weight = np.ones((4, 32, 32, 16), np.float32), np.ones((kernel, kernel, 16, 16), np.float32)
    held = {}
    for layer in (layers.conv2d, layers.conv2d_unfolded):
        tracemalloc.start()
        y, vjp = layer(x, weight, stride=stride, padding=kernel // 2)
        held[layer] = tracemalloc.get_traced_memory()[0] - y.nbytes
        tracemalloc.stop()
        vjp(y)
    assert held[layers.conv2d] < 0.1 * x.nbytes
    assert copies * x.nbytes <= held[layers.conv2d_unfolded] < (copies + 0.1) * x.nbytes


def test_sequential_is_the_chain_rule():
    """The MNIST network: gradients of the input and of all weights, in the order of the layers."""
    rng = np.random.default_rng(5)
    x, w, b, w2 = (rng.standard_normal(s) for s in [(2, 6, 6, 1), (3, 3, 1, 4), (4,), (144, 3)])

    def network(x, w, b, w2):
        conv2d = functools.partial(layers.conv2d, padding=1)
        steps = (conv2d, w, b), (layers.relu,), (layers.flatten,), (layers.dense, w2)
        y, vjp = layers.sequential(x, *steps)

        def flat_vjp(dy):
            dx, (dw, db), of_relu, of_flatten, (dw2,) = vjp(dy)
            assert of_relu == of_flatten == ()
            return dx, dw, db, dw2

        return y, flat_vjp

    check_vjp(network, x, w, b, w2)


IMAGE = np.zeros((2, 4, 4, 3))
VECTOR = np.zeros(3)
LOGITS = np.zeros((2, 3))
BAD_CALLS = {
    "conv2d rank": ("conv2d", (IMAGE[0], IMAGE), {}, "must be .N, H, W, C. float"),
    "conv2d integers": ("conv2d", (IMAGE.astype(np.int32), IMAGE), {}, "int32"),
    "conv2d channels": ("conv2d", (IMAGE, np.zeros((1, 1, 2, 3))), {}, "C.* got .1, 1, 2, 3."),
    "conv2d stride": ("conv2d", (IMAGE, np.zeros((1, 1, 3, 3))), dict(stride=0), "stride must be >= 1"),
    "conv2d kernel": ("conv2d", (IMAGE, np.zeros((5, 5, 3, 3))), {}, "does not fit"),
    "conv2d bias": ("conv2d", (IMAGE, np.zeros((1, 1, 3, 2)), VECTOR), {}, r"bias must be \(2,\)"),
    "batch_norm vector": ("batch_norm", (IMAGE, *[np.zeros(2)] * 4), dict(train=True), r"weight must be \(3,\)"),
    "batch_norm one": ("batch_norm", (IMAGE[:1, :1, :1], *[VECTOR] * 4), dict(train=True), "more than one value"),
    "max_pool padding": ("max_pool", (IMAGE,), dict(padding=2), "between 0 and window // 2"),
    "max_pool window": ("max_pool", (IMAGE,), dict(window=9, padding=0), "does not fit"),
    "global_avg_pool": ("global_avg_pool", (VECTOR,), {}, "must be .N, H, W, C. float"),
    "dense": ("dense", (LOGITS, LOGITS), {}, "dense: x must be"),
    "dense bias": ("dense", (LOGITS, np.zeros((3, 2)), VECTOR), {}, r"bias must be \(2,\)"),
    "labels shape": ("softmax_cross_entropy", (LOGITS, np.zeros(3, int)), {}, "labels"),
    "labels type": ("softmax_cross_entropy", (LOGITS, np.zeros(2)), {}, "integer"),
}
BAD_CALLS_OF_NUMPY = {
    "loops kernel": ("conv2d_loops", (IMAGE, np.zeros((5, 5, 3, 3))), {}, "does not fit"),
    "unfolded kernel": ("conv2d_unfolded", (IMAGE, np.zeros((5, 5, 3, 3))), {}, "does not fit"),
    "max_pool nothing": ("max_pool", (IMAGE,), dict(window=0, padding=0), "must be >= 1"),
    "conv2d no images": ("conv2d", (IMAGE[:0], np.zeros((1, 1, 3, 3))), {}, "N >= 1"),
    "labels range": ("softmax_cross_entropy", (LOGITS, np.array([0, 3])), {}, "between 0 and 2"),
    "labels negative": ("softmax_cross_entropy", (LOGITS, np.array([0, -1])), {}, "between 0 and 2"),
}


CALLS = {f"jax, {call}": (jax_layers, *row) for call, row in BAD_CALLS.items()}
CALLS |= {f"numpy, {call}": (layers, *row) for call, row in (BAD_CALLS | BAD_CALLS_OF_NUMPY).items()}


@pytest.mark.parametrize(("module", "name", "arrays", "options", "message"), CALLS.values(), ids=CALLS)
def test_bad_arguments_are_named(module, name, arrays, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(module, name)(*arrays, **options)
