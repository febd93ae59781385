"""Where loss curves part, and one command for several frameworks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image
from runs import wait_for

from experiments import cars, compare
from experiments.compare import describe_distances, loss_distances
from experiments.training.run_folder import UNTESTED, read_metrics
from experiments.training.settings import DATA_VARIABLE

ROOT = Path(__file__).parents[2]
TINY = "--arch resnet18 --image-size 32 --limit 48 --batch-size 12 --epochs 1 --keep 0".split()
ALONE = {name: value for name, value in os.environ.items() if name != DATA_VARIABLE} | {"OMP_NUM_THREADS": "1"}


def rows(losses, ends=(), tested=MappingProxyType({"test_loss": 1.0})):
    """A row for each step, and one at the end of each epoch."""
    found = [{"epoch": step / 4, "step": step, "train_loss": loss} for step, loss in enumerate(losses, 1)]
    return found + [{"epoch": step / 4, "step": step, "train_loss": 99.0} | tested for step in ends]


@pytest.mark.parametrize("tested", [{"test_loss": 1.0}, UNTESTED])
def test_distances_by_hand(tested):
    ours, theirs = rows([2.0, 4.0, 5.0, 3.0], [4], tested), rows([2.0, 4.0004, 4.0], [3], tested)
    distances = loss_distances(ours, theirs)
    assert [row["step"] for row in distances] == [1, 2, 3]
    assert [row["epoch"] for row in distances] == [0.25, 0.5, 0.75]
    np.testing.assert_allclose([row["distance"] for row in distances], [0, 1e-4, 0.25], rtol=1e-3)
    assert describe_distances(distances) == (
        "training losses differ by at most 2.5e-01 (step 3 of 3), by more than 1e-12 first at step 2, 1e-09 first at "
        "step 2, 1e-06 first at step 2, 1e-04 first at step 3, 1e-02 first at step 3"
    )


def test_equal_curves_and_strangers():
    same = loss_distances(rows([1.0, 2.0]), rows([1.0, 2.0]))
    assert describe_distances(same) == "training losses differ by at most 0.0e+00 (step 1 of 2)"
    assert describe_distances(loss_distances(rows([1.0]), rows([])[:0])) == "no step was logged by both"
    strange = loss_distances(rows([1.0, 1.0]), rows([1.0, float("nan")]))
    assert describe_distances(strange) == "a training loss is not a number at step 2"
    only_ends = loss_distances(rows([], ends=[4, 8]), rows([], ends=[8]))
    assert [row["step"] for row in only_ends] == [8]


def test_a_loss_that_is_no_number_and_the_folder_one_is_in(tmp_path, monkeypatch, capsys):
    """A run writes NaN as null. "." has the folder's name, and a picture without a suffix becomes a .png."""
    for name, loss in (("a", 1.0), ("b", None)):
        (tmp_path / name).mkdir()
        row = dict(epoch=1.0, step=1, train_loss=loss, test_loss=loss, test_top1=0.25, test_top5=0.5)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        config = {"input": {"arch": "resnet18"}, "data": {"title": "cars"}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path / "a")
    assert compare.main([".", "../b", "--out", "../both"]) == 0
    printed = capsys.readouterr().out
    assert "a: test top-1 25.00%" in printed
    assert "b: test top-1 25.00%, top-5 50.00%, loss nan" in printed
    assert printed.endswith("curves are in ../both.png\n")
    assert (tmp_path / "both.png").exists()


def start(names, out, *more, **options):
    """Starts the command with --compare in its own process."""
    command = [sys.executable, "-m", "experiments.cars", *TINY, "--compare", names, "--out", str(out), *more]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=ALONE, **pipes, **options)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Trains the demo in three frameworks; returns the folder and what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "compared"
    process = start("jax,numpy,torchvision", folder)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder, printed


@pytest.mark.slow
@pytest.mark.xdist_group("compared")
def test_one_command_trains_in_all_and_compares(compared):
    """Every step is logged, under the same names. The first losses agree to 1e-6, the fourth to 1e-3, in float32."""
    folder, printed = compared
    found = {name: read_metrics(folder / name) for name in ("jax", "numpy", "torchvision")}
    for name, ours in found.items():
        assert [row["step"] for row in ours] == [1, 2, 3, 4, 4]
        assert [set(row) for row in ours] == [set(row) for row in found["jax"]]
        assert ours[0]["train_loss"] == pytest.approx(found["jax"][0]["train_loss"], rel=1e-6)
        assert ours[3]["train_loss"] == pytest.approx(found["jax"][3]["train_loss"], rel=1e-3)
        files = {file.name for file in (folder / name).iterdir()}
        assert {"weights.safetensors", "curves.png", "predictions.png", "step_sizes.png", "config.json"} <= files
        if name != "jax":
            assert f"{name} from jax: training losses differ by at most " in printed
    assert json.loads((folder / "torchvision" / "config.json").read_text())["settings"]["framework"] == "torchvision"
    assert "torchvision's resnet18 in PyTorch with adabound on drawn cars" in printed
    assert np.asarray(Image.open(folder / "comparison.png").convert("L")).std() > 5


@pytest.mark.slow
@pytest.mark.xdist_group("compared")
def test_earlier_runs_are_kept_and_unknown_ones_named(compared, tmp_path, capsys):
    folder, _ = compared
    assert cars.main([*TINY, "--compare", "torch,jax", "--out", str(folder)]) == 2
    assert f"{folder / 'jax'} holds an earlier run" in capsys.readouterr().err
    assert not (folder / "torch").exists()
    arguments = [str(folder / "jax"), str(folder / "numpy"), "--out", str(tmp_path / "a.png"), "--against", "adam"]
    assert compare.main(arguments) == 2
    assert "--against adam is none of jax, numpy" in capsys.readouterr().err


def test_frameworks_differ_whatever_else_is_asked_for(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(compare, "_run_in_a_process", lambda run, settings: ran.append(settings) or 130)
    for names in ("torch,jax", "torchvision,torch", "jax,torch"):
        arguments = ["--framework", "torchvision", "--compare", names, "--out", str(tmp_path / names)]
        assert cars.main([*TINY, *arguments]) == 130
    assert [settings.experiment.framework for settings in ran] == ["torch", "torchvision", "jax"]


def test_one_that_fails_ends_it(tmp_path):
    """The failed run's message and exit code are passed on."""
    process = start("numpy,jax", tmp_path / "run", "--batch-size", "49")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "--batch-size 49 exceeds the 48 training pictures" in errors
    assert "numpy ended with exit code 2: the runs are not compared" in errors
    assert "Traceback" not in errors


def test_ctrl_c_ends_all_and_compares_what_there_is(tmp_path):
    """The process group gets SIGINT, as in a terminal: the current run reports, and the next one does not begin."""
    folder = tmp_path / "run"
    heard = dict(start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    process = start("numpy,jax", folder, "--epochs", "400", **heard)
    metrics = folder / "numpy" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 6, 240)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert (folder / "numpy" / "weights.safetensors").is_file()
    assert (folder / "comparison.png").is_file()
    assert not (folder / "jax").exists()
