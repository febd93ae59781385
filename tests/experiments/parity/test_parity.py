"""`python -m experiments.parity`: its tables and its page are complete, and common mistakes break its bounds.

The networks have one block in each stage: tests/test_parity_grid.py has the deep ones. JAX's results are computed once
for all tests: compiling them is most of the time.
"""

import dataclasses
import functools
import importlib.util
import math
import re

import jax
import numpy as np
import pytest
import torch
from shallow import patch_shallow

import jax_resnet.layers
import numpy_ref.fast.resnet
import numpy_ref.optim
import torch_ref.resnet
from experiments.frameworks.common import ResNet
from experiments.parity import __main__ as parity
from experiments.parity import cases, in_jax
from experiments.parity import checks as compare
from experiments.parity.comparison import Report
from experiments.parity.errors import Results, Row, largest, length_of_difference, relative_error, relative_errors
from experiments.parity.html_report import write_page

FAST = ["--arch", "resnet50", "--trajectory-arch", "resnet18", "--dtype", "float64"]
PARTS = ["logits", "loss", "activations", "running statistics", "parameter gradients", "image gradient"]


@pytest.fixture(scope="module", autouse=True)
def jax_once():
    """Makes networks shallow and computes each layer and pass in JAX once: one seed always gives the same arrays."""

    def remembered(run, key_of):
        results = {}

        @functools.wraps(run)
        def run_once(*arguments):
            key = key_of(*arguments)
            if key not in results:
                results[key] = run(*arguments)
            return results[key]

        return run_once

    def layer_key(case):
        return case.title, *(value.dtype for value in case.arrays.values())

    def network_key(network, state_dict, images, labels, train):
        return network, images.shape, images.dtype, train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_jax, "run_layer", remembered(in_jax.run_layer, layer_key))
        patch.setattr(in_jax, "run_network", remembered(in_jax.run_network, network_key))
        patch_shallow(patch, "resnet18", "resnet50")
        in_jax._gradients.cache_clear()
        yield
        in_jax._gradients.cache_clear()


def verdicts(printed):
    """{row: "ok", "BROKEN" or "-"} of the printed tables."""
    lines = (re.split(r" {3,}", line) for line in printed.splitlines())
    return {columns[0]: columns[3] for columns in lines if len(columns) == 5 and columns[0]}


# The whole program.


def test_every_row_is_there_and_holds(tmp_path, capsys):
    page = tmp_path / "parity.html"
    assert parity.main([*FAST, "--steps", "2", "--optimizers", "sgd", "adabound", "--html", str(page)]) == 0
    output = capsys.readouterr()
    frameworks = ["numpy", "torch_ref", "torchvision"]
    expected = {f"{case.title}, float64, {name}" for case in cases.layer_cases(0) for name in ("numpy", "torch")}
    for mode in ("train", "eval"):
        expected |= {f"{part}, {mode}, float64, {name}" for part in PARTS for name in frameworks}
    rows = [f"{name}, {row}" for name in ("sgd", "adabound") for row in ("each step", "free, over one ulp's")]
    expected |= {f"{row}, {name}" for row in rows for name in ("numpy", "torch_ref")}
    assert verdicts(output.out) == dict.fromkeys(expected, "ok")
    assert output.out.splitlines()[-2] == f"all {len(expected)} bounds hold"
    for piece in ("layers", "resnet50, train", "resnet18, sgd"):
        assert f"{piece}: 100%" in output.err  # the bars, at their ends
    text = page.read_text()
    assert len(re.findall(r'<img alt="(Errors along|Trainings from)', text)) == 2
    assert text.count("data:image/png;base64,") == 2
    assert text.count("<td>ok</td>") == len(expected)
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # the page needs no other file


def test_float32_layers(capsys):
    assert parity.main(["--sections", "layers", "--dtype", "float32", "--frameworks", "numpy"]) == 0
    assert len(verdicts(capsys.readouterr().out)) == len(cases.layer_cases(0))


def test_what_is_compared_is_not_alike(x64):
    """Constant results, or results equal to an argument, would agree for no good reason."""
    for case in cases.layer_cases(0):
        results = in_jax.run_layer(case)
        for name, value in results.items():
            assert np.ptp(value) > 0, (case.title, name)
            for argument in case.arrays.values():
                if argument.shape == value.shape and case.layer not in ("relu", "flatten"):
                    assert relative_error(value, argument) > 1e-3, (case.title, name)


NETWORKS = [  # network, (N, H, W), mode, dtypes; 64x64 in colour is above, other depths in tests/test_parity_grid.py
    (ResNet("resnet18", in_channels=1), (8, 64, 96), "train", ("float64", "float32")),
    (ResNet("resnet18"), (1, 224, 224), "eval", ("float64",)),
    (ResNet("resnet50", in_channels=1, stride_in="conv1"), (8, 45, 33), "train", ("float64",)),
    (ResNet("resnet50", stride_in="conv1", batch_norm=False), (2, 33, 32), "train", ("float64",)),
]


@pytest.mark.parametrize(("network", "shape", "mode", "dtypes"), NETWORKS, ids=str)
def test_a_network_of_every_kind(network, shape, mode, dtypes, x64):
    """The program's bounds hold in grey, for v1, without BatchNorm, on large, odd or oblong pictures, and in float32.

    Names and shapes are compared as well: an array that only one framework has is an infinite error.
    """
    weights = cases.draw_weights(network, seed=0)
    batch = cases.draw_batch(network, shape, np.random.default_rng(1))
    frameworks = ["numpy", "torch_ref", *([] if network.why_not_torchvision else ["torchvision"])]
    with compare.module_of("torch").exact_on_one_thread():
        compared = list(compare.compare_network(network, weights, batch, dtypes, mode, frameworks))
    rows = [row for rows, _ in compared for row in rows]
    bounds = {"float64": 5 + network.batch_norm, "float32": 8}  # by framework
    assert sum(row.bound is not None for row in rows) == sum(bounds[dtype] for dtype in dtypes) * len(frameworks)
    assert [row for row in rows if row.verdict == "BROKEN"] == []
    unbound = {row.what for row in rows if row.bound is None and row.framework != compare.OWN_ERROR}
    assert all("gradient" in what and "float32" in what for what in unbound)


def test_a_broken_bound_stands_out(tmp_path):
    report = Report("Parity", "here", [], {"Layers": [Row("relu", "numpy", error, 1e-10, "x") for error in (0.0, 1.0)]})
    assert report.conclusions == ["1 of 2 bounds are BROKEN"]
    write_page(tmp_path / "a.html", report)
    assert "<td><strong>BROKEN</strong></td>" in (tmp_path / "a.html").read_text()


def test_float32_bounds_follow_jaxs_own_error():
    """A bound is ten times JAX's error and at least a layer's bound; gradients have none."""
    own = {"logits": {"logits": 1e-5}, "loss": {"loss": 0.0}, "parameter_gradients": {"fc.bias": 0.3}}
    assert compare.bounds_float32(own) == pytest.approx({"logits": 1e-4, "loss": 1e-5})


@pytest.mark.parametrize(
    ("ours", "expected"),
    [({"a": [3.0, 4.0], "b": [0.0]}, 0.0), ({"a": [3.0, 4.0], "b": [5.0]}, 1.0), ({"a": [3.0, 4.0]}, math.inf)],
)
def test_length_of_difference(ours, expected):
    ours = {name: np.array(value) for name, value in ours.items()}
    assert length_of_difference(ours, {"a": np.array([3.0, 4.0]), "b": np.zeros(1)}) == pytest.approx(expected)


# Mistakes.


def padded_as_same(conv2d, x, weight, bias=None, *, stride=1, padding=0):
    """Pads as much as the output needs, with the odd pixel at the end."""
    y = jax.lax.conv_general_dilated(x, weight, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y if bias is None else y + bias


def unbiased(batch_norm, x, weight, *arrays, train, eps=1e-5):
    """Normalizes with the unbiased variance: w / sqrt(n/(n-1) · var + eps) = w · s / sqrt(var + eps · s²)."""
    s = math.sqrt(1 - x.shape[-1] / x.size) if train else 1.0
    return batch_norm(x, weight * s, *arrays, train=train, eps=eps * s**2)


def stride_in_conv1(residual_block, config, *arguments, **settings):
    return residual_block(dataclasses.replace(config, stride_in="conv1"), *arguments, **settings)


def network_with_stride_in_conv1(make, **options):
    return make(**options | {"stride_in": "conv1"})


def with_momentum(batch_norm, *arrays, **settings):
    return batch_norm(*arrays, **settings | {"momentum": 0.9})


def mistaken(monkeypatch, module, name, mistake):
    """Replaces a function by one that makes a mistake."""
    monkeypatch.setattr(module, name, functools.partial(mistake, getattr(module, name)))


EVERYWHERE, STATISTICS = set(PARTS), {"running statistics"}
AT_STRIDE_2 = {"conv2d 3x3, stride 2, padding 1", "conv2d 7x7, stride 2, padding 3"}
JAX, NUMPY, TORCH = jax_resnet.layers, numpy_ref.fast.resnet, torch_ref.resnet
MISTAKES = {  # where it is made, what makes it, the section and framework that show it, the broken parts of the table
    "padding SAME, jax": (JAX, "conv2d", padded_as_same, "layers", "numpy", AT_STRIDE_2),
    "unbiased variance, jax": (JAX, "batch_norm", unbiased, "layers", "numpy", {"batch_norm"}),
    "momentum 0.9, numpy": (NUMPY, "batch_norm_relu", with_momentum, "network", "numpy", STATISTICS),
    "momentum 0.9, torch_ref": (torch.nn, "BatchNorm2d", with_momentum, "network", "torch_ref", STATISTICS),
    "stride in conv1, numpy": (NUMPY, "residual_block", stride_in_conv1, "network", "numpy", EVERYWHERE),
    "stride in conv1, torch_ref": (TORCH, "resnet50", network_with_stride_in_conv1, "network", "torch_ref", EVERYWHERE),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake, monkeypatch, capsys):
    """The exit code is 1, and in training exactly the rows that the mistake concerns are BROKEN."""
    *made, section, framework, broken = MISTAKES[mistake]
    mistaken(monkeypatch, *made)
    monkeypatch.setattr(in_jax, "run_layer", in_jax.run_layer.__wrapped__)  # JAX's layers may be the mistaken ones
    assert parity.main([*FAST, "--sections", section, "--frameworks", framework]) == 1
    printed = capsys.readouterr().out
    rows = verdicts(printed)
    found = {row for row, verdict in rows.items() if verdict == "BROKEN" and ", eval" not in row}
    assert found == {row for row in rows if row.startswith(tuple(broken)) and ", eval" not in row}
    assert re.search(r"\d+ of \d+ bounds are BROKEN", printed)


def other_rule(adabound, *arguments, gamma, **settings):
    return adabound(*arguments, gamma=2 * gamma, **settings)


@pytest.mark.slow
def test_a_mistake_in_an_optimizer_is_caught(monkeypatch, capsys):
    """AdaBound's bounds close twice as fast: both its rows are BROKEN, Adam's hold."""
    mistaken(monkeypatch, numpy_ref.optim, "adabound", other_rule)
    arguments = ["--sections", "trajectories", "--frameworks", "numpy", "--steps", "2"]
    assert parity.main([*arguments, "--optimizers", "adam", "adabound"]) == 1
    broken = [row for row, verdict in verdicts(capsys.readouterr().out).items() if verdict == "BROKEN"]
    assert broken == ["adabound, each step, numpy", "adabound, free, over one ulp's, numpy"]


# What is left out, and what is refused.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--no-batch-norm"], "torchvision: its networks have BatchNorm"),
        (["--stride-in", "conv1"], "torchvision: its networks have the stride in conv2"),
    ],
    ids=str,
)
def test_torchvision_is_left_out(options, reason, capsys):
    assert parity.main(["--sections", "layers", "--dtype", "float64", *options]) == 0
    assert f"left out: {reason}" in capsys.readouterr().out.splitlines()


def test_frameworks_that_are_not_installed_are_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert parity.main(["--sections", "layers", "--dtype", "float64"]) == 0
    printed = capsys.readouterr().out
    assert "left out: torch_ref: torch not installed" in printed
    assert "left out: torchvision: torch and torchvision not installed" in printed
    assert all(row.endswith(", numpy") for row in verdicts(printed))


# Errors and verdicts.


@pytest.mark.parametrize(
    ("ours", "reference", "expected"),
    [
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-300], [0.0, 0.0], math.inf),
        ([1.0, 2.0], [[1.0, 2.0]], math.inf),
        ([1.0, math.nan], [1.0, 2.0], math.nan),
    ],
)
def test_relative_error(ours, reference, expected):
    assert relative_error(np.array(ours), np.array(reference)) == pytest.approx(expected, nan_ok=True)


def test_missing_and_superfluous_names_are_errors():
    one = np.ones(1)
    assert relative_errors({"a": one, "c": one}, {"a": one, "b": one}) == {"a": 0.0, "b": math.inf, "c": math.inf}


def test_nan_is_the_largest_error_and_broken():
    assert largest({"a": math.inf, "b": 1.0}) == (math.inf, "a")
    assert largest({"a": 1.0, "b": math.nan})[1] == "b"
    bounds = [(math.nan, 1.0), (1.0, 1.0), (1.1, 1.0), (1.0, None)]
    assert [Row("", "", error, bound, "").verdict for error, bound in bounds] == ["BROKEN", "ok", "BROKEN", ""]


@pytest.mark.parametrize(
    ("shift", "logits", "top5"), [(0.0, "ok", "ok"), (2e-4, "BROKEN", "ok"), (0.3, "BROKEN", "BROKEN")]
)
def test_float32_logits_have_an_absolute_bound(shift, logits, top5):
    """One of ten logits, 0.2 apart, is moved; moved too far, it changes the second image's top-5."""
    reference = np.tile(0.2 * np.arange(10.0), (2, 1))
    ours = reference.copy()
    ours[1, 8] += shift
    one = {"conv1.weight": np.ones(1)}
    make = functools.partial(
        Results, loss=1.0, activations={"stem": np.ones(1)}, running_statistics={}, parameter_gradients=one
    )
    results, expected = (make(logits=values, image_gradient=np.ones(1)) for values in (ours, reference))
    found = {row.what: row for row in compare.rows_of_float32(results, expected, "eval, float32", "numpy")}
    assert found["logits, absolute, eval, float32"].verdict == logits
    assert found["images with another top-5, eval, float32"].verdict == top5


# Weights.


def test_weights_hide_nothing():
    """No array is constant, and another seed changes them all."""
    weights = cases.draw_weights(ResNet("resnet18"), seed=0)
    for name, value in weights.items():
        assert np.ptp(value) > 0.05, name
        if name.endswith("running_var"):
            assert value.min() > 0.4
    moved = cases.draw_weights(ResNet("resnet18"), seed=1)
    assert not any(np.array_equal(value, moved[name]) for name, value in weights.items())


def test_moved_by_one_unit():
    """Every weight moves to a neighbouring float, half of them up; running values stay."""
    weights = cases.draw_weights(ResNet("resnet18"), seed=0)
    moved = compare.moved_by_one_unit(weights, np.random.default_rng(0))
    for name, value in weights.items():
        if "running" in name:
            assert moved[name] is value
        else:
            steps = np.abs(moved[name] - value) / np.spacing(np.abs(value))
            assert set(np.unique(steps)) <= {0.5, 1.0}, name  # half a spacing below a power of 2
    kernel = "layer4.0.conv2.weight"
    assert np.mean(moved[kernel] > weights[kernel]) == pytest.approx(0.5, abs=0.01)


def test_jax_stays_as_it_was():
    """The program turns 64-bit types on for itself alone."""
    assert parity.main(["--sections", "layers", "--dtype", "float64", "--frameworks", "numpy"]) == 0
    assert jax.numpy.zeros(1).dtype == np.float32
