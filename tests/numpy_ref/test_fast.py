"""numpy_ref.fast: the numbers of numpy_ref.resnet, whatever the threads and blocks."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import images_of, network, norm_arrays, passes
from trees import close, same

from numpy_ref import fast, layers, resnet
from numpy_ref.fast import fused, threads

NORMALIZATIONS = [{}, dict(batch_norm=False)]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [*NORMALIZATIONS, dict(stride_in="conv1")], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_fast_is_plain(name, options, train, narrow):
    """Outputs, running statistics and every gradient in float64, odd sizes: 1e-12 is for the order of summation."""
    config, params, batch_stats = network(name, **options)
    images = images_of((7, 65, 83))
    plain, ours = (passes(module, config, params, batch_stats, images, train) for module in (resnet, fast))
    close(ours, plain, 1e-12)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", NORMALIZATIONS, ids=str)
def test_threads_change_nothing(train, options, narrow):
    """Any number of threads, with equal shares or not, normalizes over the whole batch; 1e-12 is for rounding."""
    network_and_images = *network("resnet50", **options), images_of((11, 48, 48))
    results = {  # 100 become 5, since each gets at least two images
        count: passes(fast, *network_and_images, train, threads=count) for count in (1, 2, 4, 100)
    }
    for count in (2, 4, 100):
        close(results[count], results[1], 1e-12)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        passes(fast, *network_and_images, train, threads=0)


@pytest.mark.parametrize("options", NORMALIZATIONS, ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_without_the_gradient_of_images_the_others_are_the_same_to_the_bit(options, count, narrow):
    config, params, batch_stats = network("resnet18", **options)
    run = functools.partial(passes, fast, config, params, batch_stats, images_of((5, 33, 64)), True, threads=count)
    with_it, without = run(), run(image_gradient=False)
    assert without.pop("dimages") is None
    assert with_it.pop("dimages").shape == (5, 33, 64, 2)
    same(without, with_it)


def test_an_error_in_one_thread_ends_all():
    """Otherwise the other threads would wait for the failed one forever."""
    team = threads.Team(2)

    def fails():
        team.gathers[0]("a")
        raise FloatingPointError("here")

    def waits():
        return team.gathers[1]("b"), team.gathers[1]("b")

    with pytest.raises(FloatingPointError, match="here"):
        team.run([fails, waits])
    assert team.run([lambda: team.gathers[0](0), lambda: team.gathers[1](1)]) == [[0, 1], [0, 1]]  # it works again


def test_blas_gets_its_threads_back():
    """This holds even if several threads run networks at once, since the setting belongs to the whole process."""

    def blas_threads():
        return [library["num_threads"] for library in threadpoolctl.threadpool_info() if "numpy" in library["filepath"]]

    config = resnet.resnet18(num_classes=2, in_channels=1)
    params, batch_stats = resnet.init(config, np.random.default_rng(0))
    images, inside, before = np.zeros((4, 32, 32, 1), np.float32), [], blas_threads()

    def run(_):
        fast.apply(config, params, batch_stats, images, train=True, threads=2)
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


@given(
    st.tuples(st.integers(4, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6)),
    *[st.booleans()] * 3,
    st.sampled_from([0.0, 0.1, 1.0]),
    st.integers(1, 500),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=100)
def test_fused_is_the_plain_layers(shape, train, relu, has_shortcut, momentum, block_bytes, seed):
    """The fused form is batch_norm, sum and relu one by one, in both passes, for any shape and blocks of any size.

    The error is below 1e-9 of an array's largest entry, or of 1e-3 if that is larger: values of a channel may lie so
    close that their deviation has lost digits.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "BLOCK_BYTES", block_bytes)
        compare_fused(shape, train, relu, has_shortcut, momentum, np.random.default_rng(seed))


def compare_fused(shape, train, relu, has_shortcut, momentum, rng):
    x, weight, bias, *running = norm_arrays(rng, shape)
    shortcut, dy = rng.standard_normal(x.shape) if has_shortcut else None, rng.standard_normal(x.shape)

    (y, *statistics), vjp_norm = layers.batch_norm(x, weight, bias, *running, train=train, momentum=momentum)
    y = y + shortcut if has_shortcut else y
    y, vjp_relu = layers.relu(y) if relu else (y, lambda dy: (dy,))
    (dsum,) = vjp_relu(dy)
    expected = (y, *statistics, *vjp_norm(dsum), dsum if has_shortcut else None)

    (y, *statistics), vjp = fused.batch_norm_relu(
        x, weight, bias, *running, shortcut, train=train, relu=relu, momentum=momentum
    )
    y_before = y.copy()
    again = vjp(dy.copy())
    ours = (y, *statistics, *vjp(dy))
    np.testing.assert_array_equal(y, y_before)
    np.testing.assert_array_equal(again[0], ours[3])
    for mine, theirs in zip(ours, expected, strict=True):
        if theirs is None:
            assert mine is None
        else:
            assert mine.shape == theirs.shape
            assert np.abs(mine - theirs).max() < 1e-9 * max(np.abs(theirs).max(), 1e-3)


@pytest.mark.parametrize("function", [layers.batch_norm, fused.batch_norm_relu])
def test_moments_do_not_cancel_where_the_mean_is_large(function):
    """The float32 values have mean 1000 and deviation 1. x is rounded by up to 3e-5, and so are the results;
    E[x²] - E[x]² would be off by percents."""
    x = (1000 + np.random.default_rng(7).standard_normal((8, 24, 24, 4))).astype(np.float32)
    exact = x.astype(np.float64).reshape(-1, 4)
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    relu = {} if function is layers.batch_norm else {"relu": False}
    (y, _, var), _ = function(x.copy(), one, zero, zero, one, train=True, momentum=1.0, **relu)
    np.testing.assert_allclose(var, exact.var(0, ddof=1), rtol=1e-5)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(y.reshape(-1, 4), expected, atol=2e-4)


@pytest.mark.parametrize("function", [layers.relu, lambda x: fused.add_relu(x.copy())])
def test_relu_lets_nan_through(function):
    """A training that diverges must show it."""
    assert np.isnan(function(np.array([np.nan, -np.nan, 1.0]))[0]).tolist() == [True, True, False]


def test_fused_lets_nan_through():
    x = np.zeros((2, 1, 1, 1))
    x[0] = np.nan
    one = np.ones(1)
    for train in (True, False):
        (y, _, _), _ = fused.batch_norm_relu(x.copy(), one, one, one, one, train=train)
        assert np.isnan(y[0]).all()
