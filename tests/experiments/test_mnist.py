"""The command `python -m experiments.mnist`: end to end on tiny runs in all frameworks, its files, its exit codes."""

import json

import jax
import numpy as np
import pytest
import scipy.signal
from idx_files import write_mnist
from runs import check_classify, check_files, check_rows
from safetensors import safe_open
from safetensors.numpy import load_file

from experiments import mnist
from experiments.data.digits import load_mnist
from experiments.data.stream import training_batches
from experiments.frameworks.experiment import TITLES
from experiments.machine import jax_device, numpy_device, torch_device
from experiments.training.run_folder import read_metrics

TINY = {
    "cnn": ["--limit", "320", "--epochs", "2", "--batch-size", "32", "--log-every", "4"],
    "resnet18": ["--model", "resnet18", "--limit", "80", "--batch-size", "16", "--keep", "0"],
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """400 + 50 pictures with digits that are easy to tell."""
    return write_mnist(tmp_path_factory.mktemp("data"), train=400, test=50)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A function (model, framework) -> folder, which trains each pair once."""
    root, done = tmp_path_factory.mktemp("runs"), {}

    def run(model, framework):
        folder = root / f"{model}-{framework}"
        if folder not in done:
            arguments = [*TINY[model], "--framework", framework, "--data", str(data), "--out", str(folder)]
            done[folder] = mnist.main(arguments)
        assert done[folder] == 0
        return folder

    return run


EVERY_RUN = [*(("cnn", framework) for framework in TITLES), ("resnet18", "jax")]


@pytest.mark.parametrize(("model", "framework"), EVERY_RUN)
def test_a_run_leaves_its_files(model, framework, runs):
    folder = runs(model, framework)
    check_files(folder, "curves.png", "predictions.png")
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["title"] == "MNIST"
    assert (config["data"]["train"], config["data"]["test"]) == (400, 50)
    assert {"jax", "numpy"} <= set(config["versions"])
    assert config["settings"]["seed"] == 0
    assert "git_commit" in config
    device = {"numpy": numpy_device, "jax": jax_device, "torch": torch_device}[framework]()
    assert config["device"] == device | ({"used": 1} if framework == "jax" else {})
    assert config["input"]["image_size"] == ([28, 28] if model == "cnn" else [32, 32])
    if model == "cnn":
        check_rows(folder, [4, 8, 10, 14, 18, 20], [10, 20])
    else:  # a row for each step
        check_rows(folder, [1, 2, 3, 4, 5, 5], [5])


def test_the_frameworks_give_one_curve_and_learn(runs):
    """Weights and batches are the same, in float32; 2e-4 leaves room for rounding over 20 steps.
    frameworks/test_optimizers.py compares each optimizer in float64, frameworks/test_common.py compares ResNets.

    The digits are easy to tell: in the end at least 90% of the 50 test pictures are right; guessing gets 10%.
    """
    theirs, *others = (read_metrics(runs("cnn", name)) for name in TITLES)
    for ours in others:
        for ours_row, their_row in zip(ours, theirs, strict=True):
            assert ours_row["train_loss"] == pytest.approx(their_row["train_loss"], rel=2e-4)
    assert theirs[-1]["test_top1"] >= 0.9


@pytest.mark.parametrize("model", TINY)
def test_the_frameworks_start_from_one_draw_of_weights(model, data):
    found = []
    for framework in TITLES:
        settings = mnist.parse_settings([*TINY[model], "--data", str(data), "--framework", framework])
        training, _ = mnist.prepare(settings, mnist.load_data(settings))
        arrays = training.arrays(training.state.params, training.state.batch_stats)
        found.append({name: array for name, array in arrays.items() if not name.endswith("num_batches_tracked")})
    for arrays in found:
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
        assert set(arrays) == set(found[0])
        assert all(np.array_equal(array, found[0][name]) for name, array in arrays.items())


def test_numpys_steps_compile_nothing(data):
    settings = mnist.parse_settings([*TINY["resnet18"], "--data", str(data)])
    dataset = mnist.load_data(settings)
    training, _ = mnist.prepare(settings, dataset)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        state, (images, labels) = training.state, next(training_batches(dataset.train, 16, 0, epochs=1, prefetch=0))
        for _ in range(2):
            state, _ = training.train_step(state, images, labels)
        training.eval_step(state.params, state.batch_stats, images, labels)
        assert not compiled
        jax.jit(lambda x: x + 1)(1)
        assert compiled  # the listener hears a compilation
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("framework", TITLES)
def test_the_cnns_file_is_pytorchs(framework, runs, data):
    """SciPy applies the file as PyTorch's layers would, and reaches the accuracy of the run's last row."""
    folder = runs("cnn", framework)
    arrays = load_file(folder / "weights.safetensors")
    shapes = {name: value.shape for name, value in arrays.items()}
    assert shapes == {
        "conv.weight": (32, 1, 5, 5),
        "conv.bias": (32,),
        "fc.weight": (10, 32 * 14 * 14),
        "fc.bias": (10,),
    }
    with safe_open(folder / "weights.safetensors", framework="numpy") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
    test = load_mnist(data).test
    images = np.pad((test.images[..., 0] / 255 - metadata["mean"]) / metadata["std"], ((0, 0), (2, 2), (2, 2)))
    right = []
    for image, label in zip(images, test.labels, strict=True):
        channels = [scipy.signal.correlate2d(image, kernel[0], "valid")[::2, ::2] for kernel in arrays["conv.weight"]]
        features = np.maximum(np.stack(channels) + arrays["conv.bias"][:, None, None], 0)
        logits = arrays["fc.weight"] @ features.reshape(-1) + arrays["fc.bias"]
        right.append(metadata["class_names"][logits.argmax()] == str(label))
    assert np.mean(right) == read_metrics(folder)[-1]["test_top1"]


def test_classify_answers_as_the_runs_own_test(runs, data, tmp_path, capsys):
    """classify pads the 28x28 pictures as the training did."""
    folder = runs("resnet18", "jax")
    assert json.loads((folder / "config.json").read_text())["input"]["pad"] == 2
    check_classify(folder, load_mnist(data).test.images[:8], "numpy", tmp_path, capsys)


def test_defaults_depend_on_the_model():
    found = [mnist.parse_settings(arguments).experiment for arguments in ([], ["--model", "resnet101", "--opt", "sgd"])]
    small, large = found
    assert (small.model, small.framework, small.opt, small.epochs, small.limit) == ("cnn", "numpy", "adam", 3, None)
    assert (large.epochs, large.limit, large.log_every) == (1, 6000, 1)
    assert (small.learning_rate, large.learning_rate) == (1e-3, 0.05)
    changed = mnist.parse_settings(["--model=resnet50", "--limit", "100", "--opt", "adamw"]).experiment
    assert (changed.model, changed.limit, changed.weight_decay) == ("resnet50", 100, 1e-4)


@pytest.mark.parametrize("framework", TITLES)
def test_a_diverging_run_ends_with_exit_code_1(framework, data, tmp_path, capsys):
    arguments = [*TINY["cnn"], "--opt", "sgd", "--learning-rate", "1e30", "--framework", framework]
    assert mnist.main([*arguments, "--data", str(data), "--out", str(tmp_path / "run")]) == 1
    assert "error: the loss is" in capsys.readouterr().err
    assert "the loss is" in (tmp_path / "run" / "error.txt").read_text()


def test_a_few_real_digits(mnist_dir, tmp_path):
    """One epoch over 3,000 real digits reaches 85% on the 10,000 test digits; guessing reaches 10%."""
    arguments = ["--data", str(mnist_dir), "--limit", "3000", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert mnist.main(arguments) == 0
    assert read_metrics(tmp_path / "run")[-1]["test_top1"] >= 0.85


@pytest.mark.slow
def test_the_cnn_reaches_98_percent(mnist_dir, tmp_path):
    """A command of docs/cars.md: 3 epochs of Adam in NumPy."""
    assert mnist.main(["--model", "cnn", "--data", str(mnist_dir), "--out", str(tmp_path / "run")]) == 0
    assert read_metrics(tmp_path / "run")[-1]["test_top1"] >= 0.98
