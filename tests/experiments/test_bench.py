"""The benchmarks run, print what they say, and compare like with like; what they measure is not tested."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import jax_resnet.resnet
import numpy_ref.resnet
from experiments.bench import contestants, conv2d, processes, step, tables
from experiments.bench.__main__ import main
from experiments.bench.processes import Result
from jax_resnet import weights

TORCH = all(importlib.util.find_spec(package) for package in ("torch", "torchvision"))
needs_torch = pytest.mark.skipif(not TORCH, reason="needs the extra torch")

STEP = ["step", "--arch", "resnet18", "--batch-size", "2", "--image-size", "32x40", "--rounds", "2", "--steps", "1"]
CONV2D = ["conv2d", "--rounds", "2", "--iterations", "1"]
TINY_CONV2D = conv2d.Case(6, 7, 3, 5, kernel=3, stride=2, padding=1, batch_size=2)
TINY_CASES = [
    TINY_CONV2D,
    conv2d.Case(5, 4, 2, 3, kernel=1, stride=1, padding=0, batch_size=2),
    conv2d.CLASSIC._replace(batch_size=2),
]


def rows(printed: str, name: str) -> list[list[str]]:
    """The columns of the printed rows of a contestant."""
    return [line.split()[1:] for line in printed.splitlines() if line.startswith(name + " ")]


def test_step_prints_its_tables(capsys):
    assert main([*STEP, "--contestants", "numpy"]) == 0
    printed = capsys.readouterr().out
    assert "resnet18, batch 2 of 32x40x3, float32, training step" in printed
    assert "resnet18, batch 2 of 32x40x3, float32, inference" in printed
    assert len(rows(printed, "numpy")) == 2
    for row in rows(printed, "numpy"):  # median, quartiles, first step, peak memory, above libraries
        assert re.fullmatch(r"\d+ \d+-\d+ \d+\.\d s \d+ \d+", " ".join(row))


def test_step_table(capsys):
    seconds = np.array([[0.2, 0.4], [0.2, 0.4]])
    results = {
        "numpy": Result(1.5, 1.25 * seconds, memory_before=40.0, peak_memory=540.0),
        "torch": Result(0.5, seconds, memory_before=300.0, peak_memory=900.0),
    }
    tables.print_table(step.table(results))
    assert capsys.readouterr().out.splitlines() == [
        "        ratio   median   quartiles   first step   peak memory   above libraries",
        "numpy    1.25      375     250-500        1.5 s           540               500",
        "torch    1.00      300     200-400        0.5 s           900               600",
    ]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["jax", "torch", "torch.compile"]),
        (["--framework", "numpy"], ["numpy", "torch", "torch.channels_last"]),
        (["--contestants", "numpy", "jax"], ["numpy", "jax"]),
    ],
)
def test_who_takes_part(options, names, monkeypatch, capsys):
    """Where nothing is installed, all that should take part are named as left out."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main([*STEP, *options]) == 2
    assert re.findall(r"^left out: ([\w.]+),", capsys.readouterr().out, re.MULTILINE) == names


@needs_torch
def test_conv2d_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(conv2d, "CLASSIC", TINY_CONV2D)
    monkeypatch.setattr(conv2d, "RESNET101", (TINY_CONV2D._replace(stride=1),))
    names = ["numpy.loops", "numpy", "numpy.unfolded", "torch"]
    assert main([*CONV2D, "--contestants", *names]) == 0
    classic, resnet101 = capsys.readouterr().out.split(str(conv2d.RESNET101[0]))
    assert f"{TINY_CONV2D}: 1,000 iterations, measured in 2 turns of 1" in classic
    for name in names:  # ratio, median, quartiles, GFLOP/s, and for NumPy's forms the memory kept
        (row,) = rows(classic, name)
        kept = r" [\d,]+ kB" if name.startswith("numpy") else ""
        assert re.fullmatch(r"\d+\.\d\d \d+ \d+-\d+ \d+\.\d\d" + kept, " ".join(row))
        assert len(rows(resnet101, name)) == (name != "numpy.loops")


def test_without_torch_its_rows_are_left_out(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "torch" in name else find_spec(name))
    monkeypatch.setattr(conv2d, "RESNET101", ())
    assert main([*CONV2D, "--contestants", "numpy", "torch", "torch.channels_last"]) == 0
    printed = capsys.readouterr().out
    assert "left out: torch, without torch and torchvision installed" in printed
    assert "left out: torch.channels_last, without torch and torchvision installed" in printed
    assert not re.search("^ +ratio", printed, re.MULTILINE)
    assert len(rows(printed, "numpy")) == 1
    assert rows(printed, "torch") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*STEP, "--rounds", "0"], "at least 1"),
        ([*STEP, "--batch-size", "0"], "at least 1"),
        ([*STEP, "--image-size", "8"], "--image-size"),
        ([*STEP, "--framework", "numpy", "--contestants", "jax"], "one of the two"),
        (["step", "--image-size", "64"], "go with --arch"),
        ([*CONV2D, "--rounds", "0"], "at least 1"),
        ([*CONV2D, "--iterations", "0"], "at least 1"),
    ],
)
def test_bad_settings_are_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_nobody_left_is_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for arguments in (STEP, CONV2D):
        assert main(arguments) == 2
        assert "nobody is left to measure" in capsys.readouterr().err


def test_a_contestant_that_fails_is_left_out(capsys):
    """A network that there is not: its process says so instead of hanging, and the others go on."""
    case = contestants.Case("resnet19", 2, 32, 32)
    make_steps = {
        "jax": functools.partial(contestants.jax_step, case),
        "numpy": functools.partial(conv2d.numpy_conv2d, "conv2d", TINY_CONV2D),
    }
    with processes.started(["jax", "numpy"]) as started:
        results = processes.compete(started, make_steps, rounds=2, steps=3)
    assert re.search(r"left out: jax: AttributeError: .*resnet19", capsys.readouterr().out)
    assert list(results) == ["numpy"]
    assert results["numpy"].seconds.shape == (2, 3)


def test_peak_memory_is_that_of_the_contestant_alone():
    """What is held here must not count there; a process starts with its parent's peak as getrusage counts it. 0.95: a
    little of what is allocated fits into memory that importing has freed.
    """
    ours, theirs = 2**28, 2**26  # bytes
    held = np.ones(ours // 8)
    with processes.started(["numpy"]) as (contestant,):
        contestant.build(functools.partial(functools.partial, np.ones, theirs // 8))
    assert contestant.memory_before < held.nbytes / 1e6
    assert 0.95 < (contestant.peak_memory - contestant.memory_before) / (theirs / 1e6) < 1.5


def test_ratios_are_to_the_best_torch():
    """The better form by its median; the ratio is taken within rounds, so that a slow round cancels."""
    slow_round = np.array([1, 1, 10])
    seconds = {"jax": 3 * slow_round, "torch": 4 * slow_round, "torch.channels_last": 2 * slow_round}
    assert tables.ratios_to_best_torch(seconds) == {"jax": 1.5, "torch": 2.0, "torch.channels_last": 1.0}
    assert tables.ratios_to_best_torch({"jax": slow_round}) == {}


CASE = contestants.Case("resnet18", 8, 32, 32)


def network_results(name: str, task: contestants.Task) -> dict[str, np.ndarray]:
    """What a contestant of `bench step` computes, by name, in this project's layouts."""
    result = contestants.CONTESTANTS[name](CASE._replace(task=task))()
    if task == "inference":
        return {"logits": np.asarray(result)}
    loss, batch_stats, grads = result
    if name.startswith("torch"):
        batch_stats = weights.from_torch(batch_stats)[1]
        grads = weights.from_torch(grads)[0]
    return flatten_dict({"loss": np.asarray(loss), "batch_stats": batch_stats, "grads": grads}, sep=".")


@pytest.fixture
def same_weights(monkeypatch, x64):
    """Has all networks start with the weights that numpy_ref draws from seed 0, and makes all of it float64."""
    images, labels = contestants.batch(CASE)
    monkeypatch.setattr(contestants, "batch", lambda case: (images.astype(np.float64), labels))
    config = numpy_ref.resnet.resnet18(num_classes=CASE.num_classes, in_channels=CASE.channels)
    drawn = numpy_ref.resnet.init(config, np.random.default_rng(0), np.float64)
    monkeypatch.setattr(numpy_ref.resnet, "init", lambda *_: drawn)
    monkeypatch.setattr(jax_resnet.resnet, "init", lambda *_: jax.tree.map(jnp.asarray, drawn))
    if TORCH:
        import torch
        import torchvision

        def torch_resnet18(num_classes):
            model = build(num_classes=num_classes).double()
            state_dict = {name: torch.from_numpy(array) for name, array in weights.to_torch(*drawn).items()}
            model.load_state_dict(state_dict, strict=False)  # without torch's counts of batches
            return model

        build = torchvision.models.resnet18
        monkeypatch.setattr(torchvision.models, "resnet18", torch_resnet18)


@pytest.mark.usefixtures("same_weights")
@pytest.mark.parametrize("task", ["training", "inference"])
def test_networks_compute_the_same(task):
    """Loss, running statistics and every gradient, or logits; 1e-10 leaves room for rounding in float64.

    In float32 a ReLU's input that is 0 up to rounding may switch, and gradients jump by percents, between PyTorch's two
    layouts as well.
    """
    expected = network_results("numpy", task)
    for name in ("jax", "torch", "torch.channels_last") if TORCH else ("jax",):
        results = network_results(name, task)
        assert results.keys() == expected.keys()
        for key, reference in expected.items():
            tolerance = 1e-10 * np.abs(reference).max()
            np.testing.assert_allclose(results[key], reference, rtol=0, atol=tolerance, err_msg=f"{name}: {key}")


CONV2D_AXES = [(0, 2, 3, 1), (0, 2, 3, 1), (2, 3, 1, 0), (0,)]  # of y, dx, dweight and dbias: PyTorch's to ours


@pytest.mark.parametrize("case", TINY_CASES, ids=str)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_torch if name.startswith("torch") else ())
        for name in conv2d.CONTESTANTS
        if name != "numpy.loops"
    ],
)
def test_conv2d_contestants_compute_the_same(name, case):
    """float32 sums of at most some hundred terms; 1e-4 of the largest entry is far below any mistake."""
    results = conv2d.CONTESTANTS[name](case)()
    if name.startswith("torch"):
        results = [r.detach().numpy().transpose(axes) for r, axes in zip(results, CONV2D_AXES, strict=True)]
    expected = conv2d.CONTESTANTS["numpy.loops"](case)()
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, reference, rtol=0, atol=1e-4 * np.abs(reference).max())


def test_kept_memory():
    """conv2d keeps nothing beside what the caller has; the unfolded form its patches, 9 values for each of x here."""
    case = conv2d.Case(24, 24, 16, 16, kernel=3, stride=1, padding=1)
    patches = 9 * conv2d.operands(case).x.nbytes
    assert conv2d.kept_memory("conv2d", case) < 0.01 * patches
    assert patches <= conv2d.kept_memory("conv2d_unfolded", case) < 1.1 * patches


def test_remat_keeps_less_and_changes_no_product_away(capsys):
    assert main(["remat", "--arch", "resnet18", "--batch-size", "4", "--image-size", "32", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    (without,), (remat,) = rows(printed, "without"), rows(printed, "--remat")
    assert int(remat[0]) < int(without[0])
    assert int(remat[1]) >= int(without[1])


def test_remat_without_rounds(capsys):
    assert main(["remat", "--rounds", "0"]) == 2
    assert "--rounds and --batch-size must be at least 1" in capsys.readouterr().err
