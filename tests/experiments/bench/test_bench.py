"""The benchmarks run and print their tables; the measured times are not tested."""

import contextlib
import functools
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from shallow import patch_shallow

from experiments.bench import benchmark, contestants, layers, networks, turns
from experiments.bench.__main__ import BENCHES, main
from experiments.cli import FailedError
from experiments.output.tables import as_text, print_table

STEP = ["step", "--arch", "resnet18", "--batch-size", "2", "--image-size", "32x40", "--rounds", "2", "--steps", "1"]
LAYERS = ["layers", "--contestants", "jax", "--rounds", "1", "--iterations", "1"]
NUMBER = r"[\d,]+(\.\d+)?"


def rows(printed: str, name: str) -> list[list[str]]:
    """The columns of the printed rows of a contestant; a row may have more words in its name."""
    return [line[len(name) :].split() for line in printed.splitlines() if line.startswith(name + " ")]


class Here:
    """A contestant in this process, for tests of what is done with the measurements."""

    memory_before, peak_memory = 100.0, 300.0

    def __init__(self, name, threads=1, environment=None):
        self.name = name

    def build(self, make_step):
        try:
            self.step = make_step()
            self.step()
        except Exception as error:
            raise FailedError(f"{self.name}: {type(error).__name__}: {error}") from error
        return 2.0

    def measure(self, steps):
        return [turns._seconds(self.step) for _ in range(steps)]

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    """Contestants in this process, which compute with shallow networks."""
    monkeypatch.setattr(turns, "Contestant", Here)
    monkeypatch.setattr(turns, "PAUSE", 0)
    patch_shallow(monkeypatch, "resnet18")


@pytest.fixture
def without_torch(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "torch" in name else find_spec(name))


@pytest.mark.usefixtures("without_torch")
def test_step_prints_and_writes_its_tables(tmp_path, capsys):
    """Contestants run in processes; those that are not installed are left out."""
    assert main([*STEP, "--contestants", "numpy", "torch", "--json", str(tmp_path / "step.json")]) == 0
    printed = capsys.readouterr().out
    assert "left out: torch, without torch and torchvision installed" in printed
    assert "resnet18, batch 2 of 32x40x3, float32, training step" in printed
    assert not re.search("^ +ratio", printed, re.MULTILINE)
    assert len(rows(printed, "numpy")) == 2
    for row in rows(printed, "numpy"):  # median, quartiles, first step, peak memory, above libraries
        assert re.fullmatch(rf"{NUMBER} {NUMBER}-{NUMBER} {NUMBER} {NUMBER} {NUMBER}", " ".join(row))
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["benchmark"] == "step"
    assert written["machine"] == printed.splitlines()[0]
    assert written["settings"]["image_size"] == "32x40"
    assert written["complete"] is True
    training, inference = written["tables"]
    assert inference["title"] in printed
    assert np.shape(training["seconds"]["numpy"]) == (2, 1)
    median = 1e3 * np.median(training["seconds"]["numpy"])
    assert training["rows"]["numpy"]["median ms"] == pytest.approx(median)
    assert rows(printed, "numpy")[0][0] == as_text(median)
    assert [file.name for file in tmp_path.iterdir()] == ["step.json"]


def test_step_table(capsys):
    seconds = np.array([[0.2, 0.4], [0.2, 0.4]])
    results = {
        "numpy": turns.Result(1.5, 1.25 * seconds, memory_before=40.0, peak_memory=540.0),
        "torch": turns.Result(0.5, seconds, memory_before=300.0, peak_memory=900.0),
    }
    print_table(networks.step_rows(results))
    assert capsys.readouterr().out.splitlines() == [
        "        ratio   median ms   quartiles ms   first step s   peak MB   above libraries MB",
        "numpy    1.25         375        250-500           1.50       540                  500",
        "torch    1.00         300        200-400           0.50       900                  600",
    ]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (STEP, ["jax", "flax", "keras", "numpy", "torch", "torch.channels_last", "torch.compile"]),
        ([*STEP, "--contestants", "numpy", "jax"], ["numpy", "jax"]),
        (LAYERS, ["jax"]),
        (["compile"], ["jax", "torch.compile"]),
    ],
)
def test_where_nothing_is_installed_all_are_left_out(arguments, names, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert re.findall(r"^left out: ([\w.]+),", printed.out, re.MULTILINE) == names
    assert "nobody is left to measure" in printed.err


def test_a_contestant_that_fails_is_left_out(capsys):
    """The network is unknown: its process says so instead of hanging, and the others go on."""
    case = contestants.Case("resnet19", 2, 32, 32)
    make_steps = {
        "jax": functools.partial(contestants.jax_step, case),
        "numpy": functools.partial(layers.numpy_layer, layers.SMALL, "forward", "float32"),
    }
    with turns.started(["jax", "numpy"], 1) as started:
        results = turns.compete(started, make_steps, rounds=2, steps=3)
    assert re.search(r"left out: jax: AttributeError: .*resnet19", capsys.readouterr().out)
    assert list(results) == ["numpy"]
    assert results["numpy"].seconds.shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory", "--precision", "bfloat16", "--contestants", "numpy"], "left out: numpy: .*NumPy has no bfloat16"),
        (["memory", "--batch-size", "1", "--contestants", "numpy"], "left out: numpy: .*more than one value"),
        (["compile", "--batch-size", "1", "--contestants", "jax"], "left out: jax: .*more than one value"),
    ],
)
@pytest.mark.usefixtures("here")
def test_where_all_fail_nobody_is_left(arguments, message, capsys):
    small = ["--arch", "resnet18", "--image-size", "32", "--rounds", "1", "--tasks", "training"]
    assert main([*arguments, *small]) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.out)
    assert "nobody is left to measure" in printed.err


def test_peak_memory_is_that_of_the_contestant_alone():
    """Memory of this process must not count; with getrusage, a process would start with its parent's peak. The lower
    bound is 0.95, since a little of the allocation fits into memory that importing has freed.
    """
    ours, theirs = 2**28, 2**26  # bytes
    held = np.ones(ours // 8)
    with turns.started(["numpy"], 1) as (contestant,):
        contestant.build(functools.partial(functools.partial, np.ones, theirs // 8))
    assert contestant.memory_before < held.nbytes / 1e6
    assert 0.95 < (contestant.peak_memory - contestant.memory_before) / (theirs / 1e6) < 1.5


def test_ratios_are_to_the_best_torch():
    """The best form has the lowest median. Ratios are taken within rounds, so that a slow round cancels."""
    slow_round = np.array([1, 1, 10])
    seconds = {"jax": 3 * slow_round, "torch": 4 * slow_round, "torch.channels_last": 2 * slow_round}
    assert benchmark.ratios_to_best_torch(seconds) == {"jax": 1.5, "torch": 2.0, "torch.channels_last": 1.0}
    assert benchmark.ratios_to_best_torch({"jax": slow_round}) == {}


def test_remat_takes_less_memory(monkeypatch):
    """The step is one program: XLA:CPU does not merge the second run of a block with the first."""
    patch_shallow(monkeypatch, "resnet50")
    case = contestants.Case("resnet50", 4, 64, 64)
    programs = [contestants.our_program(case, remat=remat) for remat in (False, True)]
    without, remat = (
        function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes for function, arguments in programs
    )
    assert remat < 0.8 * without


TWO_LAYERS = {layers.Layer("conv", (2, 6, 7, 3), 5): 1, layers.Layer("norm+relu", (2, 6, 7, 3)): 1}


@pytest.mark.usefixtures("here")
def test_layers_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(layers, "distinct_layers", lambda case: TWO_LAYERS)
    assert main(LAYERS) == 0
    printed = capsys.readouterr().out
    small, product, conv, norm, total = rows(printed, "jax")
    assert str(layers.SMALL) in printed
    assert [len(rows(printed, name)) for name in layers.NUMPY_FORMS] == [1, 1, 1]
    assert len(small) == len(product) == 3  # GFLOP/s, median, quartiles
    assert len(conv) == 9  # time, speed and share of three passes
    assert len(norm) == 4  # time and speed of two
    milliseconds = float(conv[0]) + float(conv[3]) + float(conv[6]) + float(norm[0]) + float(norm[2])
    assert float(total[-1]) == pytest.approx(milliseconds, abs=0.05)


def programs(cache):
    return {path.name for path in Path(cache).glob("*-cache")}


def test_compile_starts_cold_and_then_warm(monkeypatch):
    """The first start finds no compiled program; the second finds those of the first and compiles no other."""
    seen = []

    @contextlib.contextmanager
    def started(names, threads, environment):
        cache = environment["JAX_COMPILATION_CACHE_DIR"]
        seen.append(programs(cache))
        with turns.started(names, threads, environment) as those:
            yield those
        seen.append(programs(cache))

    monkeypatch.setattr(networks, "started", started)
    case = contestants.Case("resnet18", 2, 32, 32, task="inference")
    assert min(networks.cold_and_warm("jax", case, 1)) > 0
    before_cold, after_cold, before_warm, after_warm = seen
    assert not before_cold
    assert after_cold
    assert after_cold == before_warm == after_warm


def test_an_interrupted_run_leaves_what_it_has_and_says_so(tmp_path, monkeypatch):
    def one_table_then_none(self):
        yield benchmark.Table("first", {"numpy": {"ms": 1.0}})
        raise ValueError("nobody is left")

    monkeypatch.setattr(BENCHES["step"], "run", one_table_then_none)
    assert main(["step", "--contestants", "numpy", "--json", str(tmp_path / "step.json")]) == 2
    written = json.loads((tmp_path / "step.json").read_text())
    assert (written["complete"], len(written["tables"])) == (False, 1)


def test_turns_rotate():
    """No contestant always follows the same one; each has built its step before."""
    took = []
    make_steps = {name: lambda name=name: lambda: took.append(name) for name in "abc"}
    results = turns.compete(list(map(Here, "abc")), make_steps, rounds=3, steps=1)
    assert "".join(took) == "abc" + "bcacababc"
    assert {name: result.seconds.shape for name, result in results.items()} == dict.fromkeys("abc", (3, 1))


def test_a_contestant_that_dies_is_named():
    with turns.started(["numpy"], 1) as (contestant,), pytest.raises(FailedError, match="without a message"):
        contestant.build(functools.partial(os._exit, 1))


def test_compile_prints_its_table(tmp_path, monkeypatch):
    """Ratios are to torch.compile, if it takes part."""
    taken = {"jax": (6.0, 1.0), "torch.compile": (60.0, 20.0)}
    monkeypatch.setattr(networks, "cold_and_warm", lambda name, case, threads: taken[name])
    monkeypatch.setattr(networks, "available", list)
    for names in (["jax"], list(taken)):
        arguments = ["--contestants", *names, "--tasks", "inference", "--rounds", "3"]
        assert main(["compile", *arguments, "--json", str(tmp_path / "compile.json")]) == 0
        (table,) = json.loads((tmp_path / "compile.json").read_text())["tables"]
        row = {"cold s": 6.0, "cold range s": [6.0, 6.0], "warm s": 1.0, "warm range s": [1.0, 1.0]}
        assert table["rows"]["jax"] == row | ({"cold ratio": 0.1, "warm ratio": 0.05} if len(names) == 2 else {})
        assert np.shape(table["seconds"]["jax"]) == (3, 2)


@pytest.mark.usefixtures("here")
def test_memory_prints_its_table(capsys):
    """Rows have ratio, MB, median and quartiles; JAX's also has the peak with compilation. NumPy is left out."""
    arguments = ["--arch", "resnet18", "--image-size", "32", "--batch-size", "2", "--rounds", "1"]
    arguments += ["--tasks", "inference", "--precision", "bfloat16", "--contestants", "jax", "numpy", "torch"]
    assert main(["memory", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "left out: numpy: ValueError: NumPy has no bfloat16" in printed
    assert [len(row) for name in ("torch", "jax") for row in rows(printed, f"{name}, batch")] == [5, 6]
    assert rows(printed, "torch, batch")[0][:3] == ["2", "1.00", "200"]


def test_memory_grows_with_the_batch(capsys):
    """Each batch has its own process."""
    arguments = ["--arch", "resnet18", "--batch-size", "1", "64", "--image-size", "32", "--tasks", "inference"]
    assert main(["memory", *arguments, "--contestants", "numpy", "--rounds", "1"]) == 0
    small, large = (float(row[1]) for row in rows(capsys.readouterr().out, "numpy, batch"))
    assert 40 < small < large  # MB: more than the weights of a ResNet-18


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot bind a process to cores")
def test_threads_bind_a_contestant_to_cores():
    """A contestant has one core and its variables; this process keeps its own."""
    before = os.sched_getaffinity(0)
    with turns.started(["numpy"], threads=1, environment={"SOMETHING": "1"}) as (contestant,):
        contestant.build(functools.partial(functools.partial, check_what_is_inherited))
    assert os.sched_getaffinity(0) == before
    assert "SOMETHING" not in os.environ


def check_what_is_inherited():
    assert len(os.sched_getaffinity(0)) == 1
    assert (os.environ["OMP_NUM_THREADS"], os.environ["SOMETHING"]) == ("1", "1")
