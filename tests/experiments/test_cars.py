"""The command `python -m experiments.cars`: end to end on tiny runs, its files, its exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from logistic_regression import pixel_accuracy
from PIL import Image

from experiments import cars, classify
from experiments.cli import parse_image_size
from experiments.data.drawn_cars import drawn_cars
from experiments.training import side_by_side as compare
from experiments.training.plots import plot_predictions
from experiments.training.run_folder import read_metrics, read_test_results
from experiments.training.settings import DATA_VARIABLE, PRESETS, parse_settings
from jax_resnet import resnet, weights

ROOT = Path(__file__).parents[2]
TINY = "--arch resnet18 --image-size 32 --limit 60 --batch-size 12 --log-every 2 --keep 0".split()
METRICS = {"epoch", "step", "train_loss", "train_top1", "train_macro_f1", "images_per_second", "seconds"}
TEST_METRICS = {"test_loss", "test_top1", "test_top5", "test_macro_f1"}


@pytest.fixture(autouse=True)
def no_data_by_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def cars_folder(root, per_class=6, size=48):
    """Stanford Cars in miniature, by class: three classes of noise around a grey of their own."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi S4 Sedan 2012"]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.normal(60 + 60 * number, 15, (size, size, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:05}.jpg")
    return root


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A tiny run of the demo, done twice: the folders and what was printed."""
    folders, printed = [], []
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp("runs") / name
        command = [sys.executable, "-m", "experiments.cars", "--epochs", "2", *TINY, "--out", str(folder)]
        environment = {k: v for k, v in os.environ.items() if k != DATA_VARIABLE}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        folders.append(folder)
        printed.append(done.stderr + done.stdout)
    return folders, printed


def test_demo_leaves_its_files(demo):
    (folder, _), (printed, _) = demo
    names = {file.name for file in folder.iterdir()}
    expected = {"config.json", "metrics.jsonl", "curves.png", "predictions.png", "weights.safetensors"}
    assert expected | {"step_sizes.png", "step_sizes.json", "predictions.csv"} <= names
    assert [name for name in names if name.startswith("events.out.tfevents")]
    for name in ("curves.png", "predictions.png", "step_sizes.png"):
        assert np.asarray(Image.open(folder / name).convert("L")).std() > 5, f"{name} is blank"
    assert "top-1" in printed.splitlines()[-1]
    assert str(folder) in printed.splitlines()[-1]


def test_demo_says_drawn_cars_everywhere(demo):
    (folder, _), (printed, _) = demo
    assert "Stanford" not in printed
    told = [line for line in printed.splitlines() if "top-1" in line or "pictures" in line]
    assert told
    assert all("drawn cars" in line for line in told)
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["title"] == "drawn cars"
    assert weights.read_metadata(folder / "weights.safetensors")["data"] == '"drawn cars"'


def test_every_test_picture_has_its_prediction(demo):
    results = read_test_results(demo[0][0] / "predictions.csv")
    last = read_metrics(demo[0][0])[-1]
    assert len(results["label"]) == 600
    assert (results["label"] == results["prediction"]).mean() == pytest.approx(last["test_top1"])
    assert results["top5"].mean() == pytest.approx(last["test_top5"])
    assert results["loss"].mean() == pytest.approx(last["test_loss"], abs=1e-4)


def test_metrics_are_flat_fractions(demo):
    rows = read_metrics(demo[0][0])
    assert [row["step"] for row in rows] == [2, 4, 5, 7, 9, 10]
    for row in rows:
        ends = row["step"] in (5, 10)
        steps = {name for name in row if name.startswith(("step_", "step/", "at_"))}
        assert set(row) - steps == METRICS | (TEST_METRICS if ends else set())
        assert len(steps) == (4 + 21 if ends else 0)  # the bounds, the shares at them, the kernels
        assert all(isinstance(value, int | float) for value in row.values())
        assert all(0 <= row[name] <= 1 for name in row if "top" in name or "f1" in name)


def test_the_same_seed_gives_the_same_run(demo):
    """Bit for bit, times aside, and weights too: two processes."""
    first, second = (
        [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in read_metrics(folder)]
        for folder in demo[0]
    )
    assert first == second
    ours, theirs = (weights.read_arrays(folder / "weights.safetensors") for folder in demo[0])
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_folder_alone_classifies(demo):
    """The test accuracy of the last row, from weights.safetensors and its metadata and nothing else of the run."""
    folder = demo[0][0]
    metadata = {k: json.loads(v) for k, v in weights.read_metadata(folder / "weights.safetensors").items()}
    config = getattr(resnet, metadata["arch"])(num_classes=len(metadata["class_names"]), in_channels=1)
    params, batch_stats = weights.load(folder / "weights.safetensors", config)
    test = drawn_cars(tuple(metadata["image_size"]), **cars.DRAWINGS, grey=metadata["grey"], seed=0).test
    images = (test.images / np.float32(255) - np.float32(metadata["mean"])) / np.float32(metadata["std"])
    logits = jax.jit(lambda x: resnet.apply(config, params, batch_stats, x, train=False).logits)(images)
    top1 = float((np.argmax(logits, -1) == test.labels).mean())
    # A picture at the border of two classes may fall on either side in a batch of another size.
    assert top1 == pytest.approx(read_metrics(folder)[-1]["test_top1"], abs=2 / len(test))


def test_stanford_cars_by_class_and_fine_tuning(tmp_path, capsys):
    """A folder of cars, colour, not square; then from its weights with --init, grey and with another head."""
    data = cars_folder(tmp_path / "cars")
    common = ["--data", str(data), "--arch", "resnet18", "--epochs", "1", "--batch-size", "6"]
    first = tmp_path / "colour"
    arguments = [
        *common,
        "--opt",
        "adam",
        "--no-grey",
        "--image-size",
        "32x48",
        "--preset",
        "cars224",
        "--out",
        str(first),
    ]
    assert cars.main([*arguments, "--warmup-epochs", "0.5"]) == 0
    config = json.loads((first / "config.json").read_text())
    assert config["input"]["image_size"] == [32, 48]
    assert config["settings"]["augmentation"] == "crop"
    assert config["data"]["layout"] == "by class"
    assert config["input"]["class_names"][0] == "AM General Hummer SUV 2000"
    assert weights.read_arrays(first / "weights.safetensors")["conv1.weight"].shape == (64, 3, 7, 7)
    second = tmp_path / "grey"
    init = ["--init", str(first / "weights.safetensors")]
    assert cars.main([*common, *init, "--opt", "sgd", "--image-size", "32", "--out", str(second)]) == 0
    assert "summed into one for grey" in capsys.readouterr().out
    third = tmp_path / "drawn"
    assert cars.main([*TINY, *init, "--epochs", "1", "--out", str(third)]) == 0
    assert "has 3 classes: a new dense layer is drawn for 6" in capsys.readouterr().out
    assert compare.main([str(first), str(second), "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").is_file()
    assert "colour: test top-1" in capsys.readouterr().out


def test_presets_and_what_overrides_them(monkeypatch):
    demo = parse_settings([])
    assert (demo.preset, demo.arch, demo.image_size, demo.opt) == ("demo", "resnet101", "64", "adabound")
    assert demo.learning_rate == 1e-3
    real = parse_settings(["--data", "somewhere"])
    assert (real.preset, real.image_size, real.grey) == ("cars96", "96", True)
    monkeypatch.setenv(DATA_VARIABLE, "elsewhere")
    assert parse_settings([]).data == Path("elsewhere")
    assert parse_settings(["--preset", "demo"]).data is None
    large = parse_settings(["--preset", "cars224", "--grey", "--epochs", "3", "--opt", "sgd"])
    assert (large.grey, large.epochs, large.learning_rate, large.image_size) == (True, 3, 0.05, "224")
    assert PRESETS["cars224"].grey is False


def test_parts_of_the_data_and_of_the_network(tmp_path):
    """Three classes, some of their training pictures in place of the test pictures, not normalized, no BatchNorm."""
    parts = ["--classes", "3", "--holdout", "0.1", "--no-normalize", "--no-batch-norm", "--no-zero-gamma"]
    assert cars.main([*TINY, *parts, "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert len(config["input"]["class_names"]) == 3
    assert config["data"]["title"].startswith("3 classes of drawn cars, ")
    assert (config["input"]["mean"], config["input"]["std"]) == ([0], [1])
    assert len(read_test_results(tmp_path / "run" / "predictions.csv")["label"]) < 100  # of 600 drawings to test
    arrays = weights.read_arrays(tmp_path / "run" / "weights.safetensors")
    assert not any("bn" in name for name in arrays)
    assert "conv1.bias" in arrays
    picture = tmp_path / "picture.png"
    Image.new("L", (40, 40), 99).save(picture)
    assert classify.main([str(picture), "--weights", str(tmp_path / "run")]) == 0


def test_a_scaled_loss_is_a_scaled_rate_for_sgd(tmp_path):
    """Up to rounding, which BatchNorm magnifies; the other rate alone moves the dense layer a hundred times as far."""
    sgd = [*TINY, "--opt", "sgd", "--epochs", "1"]
    assert cars.main([*sgd, "--loss-scale", "4", "--learning-rate", "0.015625", "--out", str(tmp_path / "scaled")]) == 0
    assert cars.main([*sgd, "--learning-rate", "0.0625", "--out", str(tmp_path / "plain")]) == 0
    scaled, plain = (weights.read_arrays(tmp_path / name / "weights.safetensors") for name in ("scaled", "plain"))
    for name in plain:
        np.testing.assert_allclose(scaled[name], plain[name], rtol=0, atol=1e-4 * np.abs(plain[name]).max())
    assert cars.main([*sgd, "--learning-rate", "0.015625", "--out", str(tmp_path / "slow")]) == 0
    slow = weights.read_arrays(tmp_path / "slow" / "weights.safetensors")["fc.weight"]
    assert np.abs(slow - plain["fc.weight"]).max() > 0.01 * np.abs(slow).max()


def test_image_sizes():
    assert parse_image_size("96") == (96, 96)
    assert parse_image_size("64x96") == (64, 96)


MISTAKES = {
    "no data": (["--data", "nowhere"], "train/<Class Name>"),
    "cars96 without data": (["--preset", "cars96"], "--data"),
    "demo with data": (["--preset", "demo", "--data", "x"], "leave --data out"),
    "image size": (["--image-size", "16"], "--image-size"),
    "image size words": (["--image-size", "big"], "--image-size"),
    "epochs": (["--epochs", "0"], "--epochs must be at least 1"),
    "batch": ([*TINY, "--batch-size", "61"], "--batch-size 61 exceeds the 60 training pictures"),
    "limit": (["--limit", "100000"], "cannot draw 100,000"),
    "momentum": (["--momentum", "1.5"], "--momentum must be within 0 and 1"),
    "learning rate": (["--learning-rate", "-1"], "--learning-rate must be positive"),
    "onecycle": ([*TINY, "--schedule", "onecycle", "--warmup-epochs", "1"], "leave --warmup-epochs at 0"),
    "init": ([*TINY, "--init", "nothing.npz"], "no weight file nothing.npz"),
    "dampening": (["--opt", "adam", "--dampening", "0.9"], "--dampening is SGD's"),
    "momentum 1": (["--momentum", "1"], "--momentum must be below 1"),
    "seed": (["--seed", "99999999999999999999"], "--seed must be below 2^32"),
    "huge": (["--image-size", "999999"], "each 32 to 4096"),
    "torchvision in JAX": (["--model", "torchvision"], "--model torchvision needs --framework torch, got jax"),
    "freeze": (["--freeze", "backbone"], "--freeze backbone needs --init FILE"),
    "gamma without BatchNorm": (["--no-batch-norm"], "--zero-gamma is of BatchNorm"),
    "torchvision's without BatchNorm": (
        ["--framework", "torch", "--model", "torchvision", "--no-batch-norm"],
        "--model torchvision has BatchNorm",
    ),
    "loss scale in torch": (["--framework", "torch", "--loss-scale", "2"], "--loss-scale is for --framework jax"),
    "loss scale": (["--loss-scale", "0"], "--loss-scale must be positive"),
    "one class": (["--classes", "1"], "--classes must be at least 2"),
    "many classes": ([*TINY, "--classes", "99"], "cannot draw 99 of 6 classes"),
    "holdout": (["--holdout", "1"], "--holdout must be between 0 and 1"),
    "large holdout": ([*TINY, "--holdout", "0.999"], "cannot hold out 100% of"),
    "amsgrad in NumPy": ([*TINY, "--framework", "numpy", "--opt", "amsgrad"], "--opt amsgrad is in JAX alone"),
    "dampening in torch": (
        [*TINY, "--framework", "torch", "--opt", "sgd", "--dampening", "0.9"],
        "--dampening is not in torch",
    ),
    "framework": (["--framework", "tensorflow"], "tensorflow"),
    "no value": (["--data"], "--data"),
    "option": (["--optimizer", "adam"], "--optimizer"),
    "choice": (["--opt", "adamax"], "adamax"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_bad_input_is_exit_code_2_and_one_clear_message(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = cars.main([*arguments, "--out", str(tmp_path / "run")])
    except SystemExit as stop:  # the parser's own
        code = stop.code
    assert code == 2
    printed = " ".join("".join(capsys.readouterr()).split())  # the parser breaks lines
    assert message in printed
    assert "Traceback" not in printed


def test_no_data_lists_every_layout_in_a_process(tmp_path):
    command = [sys.executable, "-m", "experiments.cars", "--data", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for layout in ("train/<Class Name>", "cars_train", "tfds", "parquet"):
        assert layout.lower() in done.stderr.lower()


def test_bad_pictures_stop_the_run_unless_skipped(tmp_path, capsys):
    data = cars_folder(tmp_path / "cars")
    bad = data / "train" / "Acura RL Sedan 2012" / "00003.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    arguments = ["--data", str(data), "--arch", "resnet18", "--epochs", "1", "--batch-size", "6", "--image-size", "32"]
    assert cars.main([*arguments, "--out", str(tmp_path / "a")]) == 2
    printed = capsys.readouterr().err
    assert "00003.jpg" in printed
    assert "--skip-bad" in printed
    assert cars.main([*arguments, "--out", str(tmp_path / "b"), "--skip-bad"]) == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["data"]["train"] == 17


def test_an_earlier_run_is_kept(demo, capsys):
    folder = demo[0][0]
    before = (folder / "metrics.jsonl").read_bytes()
    assert cars.main([*TINY, "--out", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    # Nor is it lost to a start that fails.
    assert cars.main([*TINY, "--batch-size", "61", "--overwrite", "--out", str(folder)]) == 2
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_start_that_fails_leaves_nothing(tmp_path):
    assert cars.main([*TINY, "--batch-size", "61", "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_ctrl_c_before_the_training_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cars, "drawn_cars", interrupted)
    assert cars.main(["--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


BAD_WEIGHTS = {
    "vector for a kernel": ({"conv1.weight": np.ones(3, np.float32)}, "conv1.weight: expected (64, 1, 7, 7)"),
    "number for a matrix": ({"fc.weight": np.float32(1)}, "fc.weight: expected (6, 512), the file has ()"),
    "nan": ({"bn1.weight": np.full(64, np.nan, np.float32)}, "bn1.weight: 64 of 64 values are not finite"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights_are_named(changes, message, demo, tmp_path, capsys):
    np.savez(tmp_path / "bad.npz", **(weights.read_arrays(demo[0][0] / "weights.safetensors") | changes))
    assert cars.main([*TINY, "--init", str(tmp_path / "bad.npz"), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_frozen_backbone(framework, demo, tmp_path):
    """From the demo's weights, in .pth: the dense layer alone has changed after it, and its steps are shown."""
    pytest.importorskip("torch", reason="needs the extra torch")
    source, target = tmp_path / "weights.pth", tmp_path / "run"
    before = weights.read_arrays(demo[0][0] / "weights.safetensors")
    weights.write_arrays(source, before)
    arguments = [*TINY, "--epochs", "1", "--init", str(source), "--freeze", "backbone", "--framework", framework]
    assert cars.main([*arguments, "--out", str(target)]) == 0
    after = weights.read_arrays(target / "weights.safetensors")
    changed = {name for name, array in before.items() if not np.array_equal(array, after[name])}
    assert changed == {"fc.weight", "fc.bias"}
    steps = json.loads((target / "step_sizes.json").read_text())
    assert [layer["name"] for layer in steps["layers"]] == ["fc.weight"]


def test_a_class_name_is_no_formula(tmp_path):
    names = ["A $x_{$ car", "B car"]
    images = np.zeros((2, 8, 8, 1), np.uint8)
    plot_predictions(tmp_path / "a.png", images, names, names[::-1], [0.5, 0.5], "cars of $ {")
    assert (tmp_path / "a.png").is_file()


def test_compared_runs_of_one_name_are_told_apart(demo, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(demo[0][0], tmp_path / name / "run")
    assert compare.main([str(tmp_path / n / "run") for n in "ab"] + ["--out", str(tmp_path / "c.png")]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/a/run: test top-1" in printed
    assert f"{tmp_path}/b/run: test top-1" in printed
    (tmp_path / "a" / "run" / "config.json").write_text("{}")
    assert compare.main([str(tmp_path / "a" / "run")]) == 2


def test_a_diverging_run_ends_with_exit_code_1(tmp_path, capsys):
    arguments = [*TINY, "--opt", "sgd", "--learning-rate", "1e30", "--epochs", "2", "--out", str(tmp_path / "run")]
    assert cars.main(arguments) == 1
    assert "the loss is" in capsys.readouterr().err
    assert "the loss is" in (tmp_path / "run" / "error.txt").read_text()


def test_main_path_needs_no_torch(tmp_path):
    """With torch and torchvision made impossible to import everything still imports."""
    blocked = "import sys; sys.modules.update(torch=None, torchvision=None); import experiments.cars"
    assert subprocess.run([sys.executable, "-c", blocked], cwd=ROOT).returncode == 0


def test_import_of_the_package_is_light():
    code = "import sys, jax_resnet; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_stanford_cars_by_the_command(stanford_cars_dir, tmp_path):
    """The real pictures through the real command, a small draw of them for training, the whole test set."""
    arguments = ["--data", str(stanford_cars_dir), "--arch", "resnet18", "--image-size", "32", "--limit", "196"]
    assert cars.main([*arguments, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"]["train"], config["data"]["test"], len(config["input"]["class_names"])) == (8144, 8041, 196)
    assert config["data"]["title"] == "Stanford Cars"
    assert read_metrics(tmp_path / "run")[-1]["step"] == 12


@pytest.mark.slow
def test_demo_learns_what_logistic_regression_does_not(tmp_path):
    """The README's first command: ResNet-101 with AdaBound reaches 70% of held-out drawings, far above pixels."""
    assert cars.main(["--opt", "adabound", "--out", str(tmp_path / "run")]) == 0
    reached = read_metrics(tmp_path / "run")[-1]["test_top1"]
    linear = pixel_accuracy(drawn_cars((64, 64), **cars.DRAWINGS, grey=True, seed=0))
    assert reached >= 0.7
    assert reached >= linear + 0.2
