"""The command `python -m experiments.cars`: end to end on tiny runs, its files, its exit codes."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from folder_changes import a_picture, cut
from logistic_regression import pixel_accuracy
from runs import check_classify, check_files, check_rows

from experiments import cars, compare
from experiments.cli import parse_image_size
from experiments.data.drawn_cars import drawn_cars
from experiments.training import prepare
from experiments.training.run_folder import read_metrics, read_test_results
from experiments.training.settings import DATA_VARIABLE, parse_settings, settings_from
from jax_resnet import weights
from jax_resnet.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
TINY = "--arch resnet18 --image-size 32 --limit 36 --test-limit 60 --batch-size 12 --epochs 2 --log-every 2".split()
TINY += ["--keep", "0"]


@pytest.fixture(autouse=True)
def no_data_by_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def few_drawings(monkeypatch):
    monkeypatch.setattr(prepare, "DRAWINGS", dict(train_count=300, test_count=60))


def train(out, *arguments):
    """Trains in this process; returns the exit code."""
    return cars.main([*TINY, *map(str, arguments), "--out", str(out)])


def config_of(out):
    return json.loads((out / "config.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Runs a tiny demo by the command and in this process; returns the folders and what the command printed."""
    first, second = (tmp_path_factory.mktemp("runs") / name for name in ("first", "second"))
    environment = {k: v for k, v in os.environ.items() if k != DATA_VARIABLE}
    command = [sys.executable, "-m", "experiments.cars", *TINY, "--out", str(first)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert train(second) == 0
    return (first, second), done.stderr + done.stdout


def test_demo_leaves_its_files_and_says_drawn_cars_everywhere(demo):
    (folder, _), printed = demo
    check_files(folder, "curves.png", "predictions.png", "step_sizes.png")
    assert (folder / "step_sizes.json").is_file()
    assert "top-1" in printed.splitlines()[-1]
    assert str(folder) in printed.splitlines()[-1]
    assert "Stanford" not in printed
    told = [line for line in printed.splitlines() if "top-1" in line or "pictures" in line]
    assert told
    assert all("drawn cars" in line for line in told)
    assert config_of(folder)["data"]["title"] == "drawn cars, 60 test pictures"


def test_every_test_picture_has_its_prediction(demo):
    results = read_test_results(demo[0][0] / "predictions.csv")
    last = read_metrics(demo[0][0])[-1]
    assert len(results["label"]) == 60
    assert (results["label"] == results["prediction"]).mean() == pytest.approx(last["test_top1"])
    assert results["top5"].mean() == pytest.approx(last["test_top5"])
    assert results["loss"].mean() == pytest.approx(last["test_loss"], abs=1e-4)


def test_metrics_are_flat_fractions(demo):
    """The end of an epoch adds the bounds, the shares at the bounds, and the steps of 21 kernels."""
    last = read_metrics(demo[0][0])[-1]
    bounds = {"step_lower", "step_upper", "at_lower", "at_upper"}
    kernels = {name for name in last if name.startswith("step/")}
    assert len(kernels) == 21
    check_rows(demo[0][0], [2, 3, 5, 6], [3, 6], bounds | kernels)


def test_the_same_seed_gives_the_same_run(demo):
    """Metrics, except times, and weights agree bit for bit."""
    first, second = (
        [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in read_metrics(folder)]
        for folder in demo[0]
    )
    assert first == second
    ours, theirs = (weights.read_arrays(folder / "weights.safetensors") for folder in demo[0])
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("framework", ["jax", "numpy", "torch"])
def test_classify_answers_as_the_runs_own_test(framework, demo, tmp_path, capsys):
    test = prepare.load_cars(parse_settings([*TINY, "--out", "x"])).test
    check_classify(demo[0][0], test.images[:8], framework, tmp_path, capsys)


def test_stanford_cars_by_class_and_fine_tuning(few_drawings, tmp_path, capsys):
    """One picture cannot be read; the first run is in colour and not square. Runs in grey and with another head then
    start from its weights with --init. NumPy compiles nothing."""
    data, bad = tmp_path / "cars", "train/Acura RL Sedan 2012/train, Acura RL Sedan 2012, 3.jpg"
    names = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi S4 Sedan 2012")
    cars_of_each = itertools.product(("train", "test"), names, range(6))
    a_picture(*(f"{split}/{name}/{split}, {name}, {number}.jpg" for split, name, number in cars_of_each))(data)
    cut(bad, 300)(data)
    tiny = ["--arch", "resnet18", "--epochs", "1", "--batch-size", "6", "--framework", "numpy"]
    common = [*tiny, "--data", str(data), "--out"]
    first, second, third = (tmp_path / name for name in ("colour", "grey", "drawn"))
    colour = ["--opt", "adam", "--no-grey", "--image-size", "32x48", "--preset", "cars224", "--warmup-epochs", "0.5"]
    assert cars.main([*common, str(first), *colour]) == 2
    printed = capsys.readouterr().err
    assert bad in printed
    assert "--skip-bad" in printed
    common = ["--skip-bad", *common]
    assert cars.main([*common, str(first), *colour]) == 0
    config = config_of(first)
    assert config["input"]["image_size"] == [32, 48]
    assert config["settings"]["augmentation"] == "crop"
    assert (config["data"]["layout"], config["data"]["train"]) == ("by class", 17)
    assert config["input"]["class_names"][0] == "AM General Hummer SUV 2000"
    assert weights.read_arrays(first / "weights.safetensors")["conv1.weight"].shape == (64, 3, 7, 7)
    init = ["--init", str(first / "weights.safetensors")]
    assert cars.main([*common, str(second), *init, "--opt", "sgd", "--image-size", "32"]) == 0
    printed = capsys.readouterr()
    assert "summed into one for grey" in printed.out
    assert printed.err.count("expected 8,144 train and 8,041 test") <= 2  # once for each run
    assert train(third, *init, "--epochs", "1", "--test-limit", "12", "--framework", "numpy") == 0
    assert "has 3 classes: a new dense layer is drawn for 6" in capsys.readouterr().out
    assert compare.main([str(first), str(second), "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").is_file()
    assert "colour: test top-1" in capsys.readouterr().out


def test_presets_and_what_overrides_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    demo = parse_settings(["--out=~/run"])
    experiment = demo.experiment
    assert (experiment.preset, experiment.arch, experiment.image_size, experiment.opt, experiment.learning_rate) == (
        *("demo", "resnet101", "64", "adabound"),
        1e-3,
    )
    assert demo.system.out == tmp_path / "run"
    real = parse_settings(["--data", "somewhere"]).experiment
    assert (real.preset, real.image_size, real.grey) == ("cars96", "96", True)
    assert settings_from({"preset": "cars96"}).experiment == real
    monkeypatch.setenv(DATA_VARIABLE, "elsewhere")
    assert parse_settings([]).system.data == Path("elsewhere")
    assert parse_settings(["--preset", "demo"]).system.data is None
    large = parse_settings(["--preset", "cars224", "--grey", "--epochs", "3", "--opt", "sgd"]).experiment
    assert (large.grey, large.epochs, large.learning_rate, large.image_size) == (True, 3, 0.05, "224")
    assert [parse_image_size(size) for size in ("96", "64x96")] == [(96, 96), (64, 96)]


def test_parts_of_the_data_and_of_the_network(few_drawings, tmp_path):
    """The run has three classes, tests on held-out training pictures, and has no normalization and no BatchNorm."""
    parts = ["--classes", "3", "--holdout", "0.2", "--no-normalize", "--no-batch-norm", "--no-zero-gamma"]
    assert train(tmp_path / "run", *parts, "--test-limit", "24", "--epochs", "1", "--framework", "numpy") == 0
    config = config_of(tmp_path / "run")
    assert len(config["input"]["class_names"]) == 3
    assert config["data"]["title"].startswith("3 classes of drawn cars, ")
    assert (config["input"]["mean"], config["input"]["std"]) == ([0], [1])
    assert len(read_test_results(tmp_path / "run" / "predictions.csv")["label"]) == 24
    arrays = weights.read_arrays(tmp_path / "run" / "weights.safetensors")
    assert not any("bn" in name for name in arrays)
    assert "conv1.bias" in arrays


def test_an_earlier_run_is_kept(demo, capsys):
    folder = demo[0][0]
    before = (folder / "metrics.jsonl").read_bytes()
    assert train(folder) == 2
    assert "--overwrite" in capsys.readouterr().err
    # A failing start keeps the earlier run.
    assert train(folder, "--batch-size", "61", "--overwrite") == 2
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_ctrl_c_before_the_training_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "drawn_cars", interrupted)
    assert cars.main(["--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_a_frozen_backbone(demo, tmp_path):
    """Training from the demo's weights in .pth changes the dense layer alone, and shows only its steps."""
    source, target = tmp_path / "weights.pth", tmp_path / "run"
    before = weights.read_arrays(demo[0][0] / "weights.safetensors")
    weights.write_arrays(source, before)
    assert train(target, "--init", source, "--freeze", "backbone", "--framework", "torch") == 0
    after = weights.read_arrays(target / "weights.safetensors")
    assert {n for n, array in before.items() if not np.array_equal(array, after[n])} == {"fc.weight", "fc.bias"}
    steps = json.loads((target / "step_sizes.json").read_text())
    assert [layer["name"] for layer in steps["layers"]] == ["fc.weight"]


def test_resuming_needs_the_checkpoint_alone(demo, tmp_path, capsys):
    """The file of --init may be gone. More epochs are refused with a way out. The checkpoint describes its network."""
    start, out = tmp_path / "start.safetensors", tmp_path / "run"
    shutil.copy(demo[0][0] / "weights.safetensors", start)
    assert train(out, "--keep", "1", "--init", start) == 0
    before = (out / "metrics.jsonl").read_bytes()
    start.unlink()
    assert train(out, "--keep", "1", "--init", tmp_path / "gone.npz", "--resume") == 0
    assert f"nothing is left to train after step 6 with {out}" in capsys.readouterr().out
    assert (out / "metrics.jsonl").read_bytes() == before
    assert train(out, "--keep", "1", "--init", start, "--resume", "--epochs", "3") == 2
    assert f"begin a run in another --out with --init {out / 'weights.safetensors'}" in capsys.readouterr().err
    _, facts = Checkpoints(out / "checkpoints").read(6)
    metadata = {k: json.loads(v) for k, v in weights.read_file(out / "weights.safetensors").metadata.items()}
    assert facts["input"] == config_of(out)["input"] == metadata


def test_compared_runs_of_one_name_are_told_apart(demo, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(demo[0][0], tmp_path / name / "run")
    assert compare.main([str(tmp_path / n / "run") for n in "ab"] + ["--out", str(tmp_path / "c.png")]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/a/run: test top-1" in printed
    assert f"{tmp_path}/b/run: test top-1" in printed
    (tmp_path / "a" / "run" / "config.json").write_text("{}")
    assert compare.main([str(tmp_path / "a" / "run")]) == 2


def test_stanford_cars_by_the_command(stanford_cars_dir, tmp_path):
    """The program trains on a small draw of the real pictures."""
    limits = ["--limit", "196", "--test-limit", "196", "--epochs", "1", "--batch-size", "16"]
    assert train(tmp_path / "run", "--data", stanford_cars_dir, *limits) == 0
    config = config_of(tmp_path / "run")
    assert (config["data"]["train"], config["data"]["test"], len(config["input"]["class_names"])) == (8144, 8041, 196)
    assert config["data"]["title"] == "Stanford Cars, 196 test pictures"
    assert read_metrics(tmp_path / "run")[-1]["step"] == 12


@pytest.mark.slow
def test_demo_learns_what_logistic_regression_does_not(tmp_path):
    """With the README's first command ResNet-101 reaches 80% on the test set, 20 points above a linear classifier."""
    assert cars.main(["--opt", "adabound", "--out", str(tmp_path / "run")]) == 0
    reached = read_metrics(tmp_path / "run")[-1]["test_top1"]
    linear = pixel_accuracy(drawn_cars((64, 64), **prepare.DRAWINGS, grey=True, seed=0))
    assert reached >= 0.8
    assert reached >= linear + 0.2
