"""The shared training loop: batches, evaluation, rows, and how it ends."""

import json
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.dataset import Dataset, Split
from experiments.frameworks.common import Training
from experiments.frameworks.experiment import Experiment
from experiments.machine import jax_device, numpy_device, processor
from experiments.training.loop import DivergedError, Loop
from experiments.training.meter import macro_f1
from experiments.training.plots import plot_curves
from experiments.training.processes import Stopped, StopRequest
from experiments.training.run_folder import RunFolder, earlier_run, ends_epoch, read_metrics
from experiments.training.saving import Progress, Saver
from experiments.training.settings import RunSettings, System


def split(n):
    return Split(np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1), np.arange(n, dtype=np.int32) % 3)


def run(tmp_path, losses, *, array=np.asarray, interrupt_at=None, number=signal.SIGINT, **changes):
    """Trains a fake network with the given losses. In training it takes class 2 for class 1 and is right otherwise;
    in tests it is always right. `array` makes its metrics.

    Returns:
      what ended the run, each report's test results, the rows, each batch's pictures, each test batch's shape.
    """
    found = SimpleNamespace(reports=[], trained=[], tested=[])
    losses = iter(losses)

    def train_step(state, images, labels):
        found.trained.append(images.reshape(-1).tolist())
        if len(found.trained) == interrupt_at:
            signal.raise_signal(number)
        prediction = np.minimum(labels, 1)
        metrics = {"loss": next(losses), "top1": (prediction == labels).mean(), "prediction": prediction}
        return state, {name: array(value) for name, value in metrics.items()}

    def eval_step(params, batch_stats, images, labels):
        found.tested.append(images.shape)
        return {"loss": labels * 0.5, "prediction": labels, "confidence": labels * 0.1, "top5": labels >= 0}

    dataset = Dataset("numbers", ("a", "b", "c"), split(10), split(7), {})
    folder = RunFolder(tmp_path / "run")
    settings = RunSettings(Experiment(epochs=2, batch_size=3, log_every=2), System(keep=0)).replace(**changes)
    state = SimpleNamespace(step=0, params=None, batch_stats=None)
    training = Training("numpy", state, train_step, eval_step, {}, arrays=None, moments=None)
    report = SimpleNamespace(observe=lambda state: {}, write=lambda state, results: found.reports.append(results))
    saver = Saver(None, settings.system, {})
    found.ended_by = Loop(settings, dataset, training, folder, saver, report, Progress()).run()
    folder.close()
    found.rows = read_metrics(tmp_path / "run")
    return found


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_rows_of_a_run(array, tmp_path):
    """NumPy's metrics are there after a step; JAX's are read one step later."""
    found = run(tmp_path, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], array=array)
    rows, seen = found.rows, found.trained
    assert found.ended_by is None
    assert len(found.reports) == 1  # at the end; the run is shorter than the time between two reports
    assert [(row["epoch"], row["step"]) for row in rows] == [(2 / 3, 2), (1, 3), (5 / 3, 5), (2, 6)]
    assert [row["train_loss"] for row in rows] == [5.5, 5, 2.5, 2]
    for row, batches in zip(rows, (seen[:2], seen[:3], seen[3:5], seen[3:6]), strict=True):
        labels = np.concatenate(batches) % 3
        assert row["train_top1"] == pytest.approx((labels < 2).mean())
        assert row["train_macro_f1"] == pytest.approx(macro_f1(labels, np.minimum(labels, 1)))
    assert 0 < rows[0]["train_macro_f1"] < 1
    ends = [row for row in rows if "test_loss" in row]
    assert [row["step"] for row in ends] == [3, 6]
    labels = split(7).labels
    assert ends[0]["test_loss"] == pytest.approx(float(np.mean(labels * 0.5)))
    assert (ends[0]["test_top1"], ends[0]["test_top5"], ends[0]["test_macro_f1"]) == (1, 1, 1)
    assert all(row["images_per_second"] > 0 and row["seconds"] >= 0 for row in rows)
    # The last batch of a test is filled up.
    np.testing.assert_array_equal(found.reports[0]["prediction"], labels)
    assert set(found.tested) == {(3, 1, 1, 1)}


def test_some_epochs_are_not_tested(tmp_path):
    """An untested epoch, too, ends with a row of its means; the last epoch is always tested."""
    found = run(tmp_path, range(12, 0, -1), epochs=4, test_every=3)
    ends = [row for row in found.rows if ends_epoch(row)]
    assert [row["epoch"] for row in ends] == [1, 2, 3, 4]
    assert ["test_top1" in row for row in ends] == [False, False, True, True]
    assert [row["train_loss"] for row in ends] == [11, 8, 5, 2]
    assert len(found.rows) - len(ends) == 4  # a row within each epoch, as without --test-every
    assert found.reports[-1] is not None
    plot_curves(tmp_path / "curves.png", found.rows, "a run")


@pytest.mark.parametrize(("interrupt_at", "tested"), [(2, []), (5, [3])], ids=["in the first epoch", "in the second"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_a_report(number, interrupt_at, tested, tmp_path):
    """The current step ends first; then the run reports, and no other step begins."""
    before = signal.getsignal(number)
    found = run(tmp_path, [6.0, 5.0, 4.0, 3.0, 2.0], interrupt_at=interrupt_at, number=number)
    assert found.ended_by == number
    assert len(found.trained) == interrupt_at
    assert signal.getsignal(number) is before
    assert [results is not None for results in found.reports] == [bool(tested)]
    assert [row["step"] for row in found.rows if "test_loss" in row] == tested


def test_the_same_signal_once_more_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(Stopped):
                stop.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(DivergedError, match=r"the loss is nan at step 5 \(epoch 2\)"):
        run(tmp_path, [6.0, 5.0, 4.0, 3.0, float("nan"), 1.0])


def test_a_folder_keeps_its_configuration_until_the_next_run(tmp_path):
    assert earlier_run(tmp_path / "not" / "there") == []
    folder = RunFolder(tmp_path)
    folder.write_config({"a": "é"})
    folder.log({"step": 1, "train_loss": 0.5})
    folder.close()
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["a"] == "é"
    assert {"jax", "numpy", "optax", "python"} <= set(config["versions"])
    assert "git_commit" in config
    (tmp_path / "weights.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    assert {"config.json", "metrics.jsonl", "weights.safetensors"} <= {file.name for file in earlier_run(tmp_path)}
    second = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="is in use by another run that has not ended"):
        RunFolder(tmp_path)
    second.close()
    assert read_metrics(tmp_path) == []
    assert not (tmp_path / "weights.safetensors").exists()
    assert (tmp_path / "notes.txt").exists()
    with pytest.raises(ValueError, match=r"cannot be written: .*notes.txt is a file"):
        earlier_run(tmp_path / "notes.txt" / "run")


def test_devices_are_plain_values():
    assert jax_device()["platform"] == jax.default_backend()
    assert numpy_device()["count"] == os.cpu_count()
    assert json.loads(json.dumps(numpy_device())) == numpy_device()
    assert numpy_device()["processor"] == processor() != ""


def test_macro_f1_by_hand():
    """Class 0 has recall 2/3, precision 2/2 and F1 4/5; class 1 has recall 1/1, precision 1/2 and F1 2/3."""
    labels, predictions = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert macro_f1(labels, predictions) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert macro_f1(np.array([0, 0]), np.array([3, 3])) == 0
