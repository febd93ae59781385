"""A run that is stopped and goes on is the run that was never stopped, bit for bit; and what can go wrong with that."""

import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy
import tiny_network
from soak import differences

from experiments.frameworks.experiment import Experiment
from experiments.training.loop import DivergedError
from experiments.training.run import train_and_report
from experiments.training.run_folder import CHECKPOINTS, METRICS, WEIGHTS, read_metrics
from experiments.training.settings import RunSettings, System
from jax_resnet.checkpoint import Checkpoints

STEPS = 3 * 5  # epochs, batches of 6 of 30 pictures


def settings_for(out, **changes):
    experiment = Experiment("amsbound", learning_rate=1e-2, epochs=3, batch_size=6, log_every=2, ema=0.9)
    return RunSettings(experiment, System(out=out, keep=3, checkpoint_steps=2)).replace(**changes)


def train(settings, *, kill_at=None, number=signal.SIGTERM, in_test=None, spoiled=()):
    """Runs the tiny training; sends itself a signal in a step, or in a batch of a test. Returns what ended it.

    In the spoiled steps the pictures are not numbers.
    """
    data = tiny_network.dataset()
    training = tiny_network.training(settings, data, spoiled=spoiled)
    calls = {"train": 0, "test": 0}

    def train_step(state, images, labels):
        calls["train"] += 1
        if calls["train"] == kill_at:
            signal.raise_signal(number)
        return training.train_step(state, images, labels)

    def eval_step(*arguments):
        calls["test"] += 1
        if calls["test"] == in_test:
            signal.raise_signal(number)
        return training.eval_step(*arguments)

    train_step.lower = training.train_step.lower
    description = {"class_names": list(data.class_names), "mean": [0.0], "std": [1.0], "image_size": [8, 8]}
    return train_and_report(
        settings,
        data,
        training._replace(train_step=train_step, eval_step=eval_step),
        title="tiny",
        description=description,
    )


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The run that is left alone."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    assert train(settings_for(out)) is None
    assert Checkpoints(out / CHECKPOINTS).steps()[-1] == STEPS
    return out


@pytest.mark.parametrize("kill_at", [1, 4, 5, 6, 13, 15])
def test_stopped_and_gone_on_is_the_run_left_alone(kill_at, quiet, tmp_path, capsys):
    """In the first step, at and around the end of an epoch, in the last step of all."""
    out = tmp_path / "run"
    assert train(settings_for(out), kill_at=kill_at) == signal.SIGTERM
    assert Checkpoints(out / CHECKPOINTS).steps()[-1] == kill_at  # of the current step, due or not
    assert "--resume goes on" in capsys.readouterr().out
    assert train(settings_for(out, resume=True)) is None
    assert f"going on at step {kill_at}" in capsys.readouterr().out
    assert differences(quiet, out) == []


def test_stopped_in_a_test_it_is_tested_again(quiet, tmp_path):
    """In the second test of the first epoch, that of the averages: after all its steps, before its row."""
    out = tmp_path / "run"
    assert train(settings_for(out), in_test=5) == signal.SIGTERM
    assert not any("test_loss" in row for row in read_metrics(out))
    assert train(settings_for(out, resume=True)) is None
    assert differences(quiet, out) == []


def test_stopped_many_times(quiet, tmp_path):
    out = tmp_path / "run"
    train(settings_for(out, resume=True), kill_at=2, number=signal.SIGINT)
    while train(settings_for(out, resume=True), kill_at=3, number=signal.SIGINT) is not None:
        pass
    assert differences(quiet, out) == []


def test_a_difference_would_be_seen(quiet, tmp_path):
    """That the comparison is one: another seed, and one bit in the metrics."""
    out = tmp_path / "run"
    train(settings_for(out, seed=1))
    found = differences(quiet, out)
    assert {"params.fc.weight", "batch_stats.bn1.running_mean", f"{WEIGHTS}, fc.weight"} <= set(found)
    copy = tmp_path / "copy"
    shutil.copytree(quiet, copy)
    rows = read_metrics(copy)
    rows[3]["train_loss"] = float(np.nextafter(rows[3]["train_loss"], 9))
    (copy / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert differences(quiet, copy) == [f"metrics.jsonl, step {rows[3]['step']}"]


def stopped(tmp_path, quiet, keep_last):
    """A run killed by SIGKILL, as far as files go: the first checkpoints of the quiet one, all of its metrics."""
    out = tmp_path / "run"
    shutil.copytree(quiet, out)
    for step in Checkpoints(out / CHECKPOINTS).steps()[keep_last:]:
        shutil.rmtree(out / CHECKPOINTS / str(step))
    with open(out / METRICS, "a", encoding="utf-8") as file:
        file.write('{"step": 99, "tr')
    return out


def test_metrics_are_cut_back_to_the_checkpoint(quiet, tmp_path):
    out = stopped(tmp_path, quiet, keep_last=1)
    assert train(settings_for(out, resume=True)) is None
    assert differences(quiet, out) == []


def test_half_written_and_damaged_ones_are_named_and_the_one_before_is_used(quiet, tmp_path, capsys):
    out = stopped(tmp_path, quiet, keep_last=3)
    folder = out / CHECKPOINTS
    *_, before, last = Checkpoints(folder).steps()
    (folder / f"{last + 1}.unfinished").mkdir()
    file = folder / str(last) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert train(settings_for(out, resume=True)) is None
    printed = capsys.readouterr()
    assert f"{folder / f'{last + 1}.unfinished'} is half-written: it is not used" in printed.err
    assert f"{folder / str(last)} is damaged: " in printed.err
    assert f"going on at step {before}" in printed.out, printed.err
    assert differences(quiet, out) == []


def test_checkpoints_of_an_earlier_version_are_refused(quiet, tmp_path):
    out = stopped(tmp_path, quiet, keep_last=2)
    (out / CHECKPOINTS / "99").mkdir()
    (out / CHECKPOINTS / "99" / "_CHECKPOINT_METADATA").touch()
    with pytest.raises(ValueError, match=r"99 was written by orbax, in an earlier version"):
        train(settings_for(out, resume=True))


def test_without_a_complete_checkpoint_it_begins(quiet, tmp_path, capsys):
    out = stopped(tmp_path, quiet, keep_last=0)
    assert train(settings_for(out, resume=True)) is None
    assert f"{out} has no complete checkpoint: starting at step 0" in capsys.readouterr().out
    assert differences(quiet, out) == []
    assert train(settings_for(tmp_path / "new", resume=True)) is None
    assert differences(quiet, tmp_path / "new") == []


def test_a_run_that_has_ended_stays_as_it_is(quiet, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(quiet, out)
    assert train(settings_for(out, resume=True), kill_at=1) is None  # no step, or it would be killed
    assert differences(quiet, out) == []


def test_other_settings_are_named(quiet, tmp_path):
    out = stopped(tmp_path, quiet, keep_last=1)
    before = (out / METRICS).read_bytes()
    message = (
        "other settings: --epochs 3 there, 4 here; --batch-size 6 there, 10 here. --resume goes on with the same ones; "
        "to train with these, begin a run in another --out$"
    )
    with pytest.raises(ValueError, match=message):
        train(settings_for(out, resume=True, epochs=4, batch_size=10))
    (out / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read .*cannot know what run this was"):
        train(settings_for(out, resume=True))
    assert (out / METRICS).read_bytes() == before


def test_settings_that_change_no_result_may_differ(quiet, tmp_path):
    out = stopped(tmp_path, quiet, keep_last=1)
    assert train(settings_for(out, resume=True, keep=1, checkpoint_steps=3)) is None
    assert differences(quiet, out) == []


def test_other_versions_are_warned_of(quiet, tmp_path, capsys):
    out = stopped(tmp_path, quiet, keep_last=1)
    config = json.loads((out / "config.json").read_text())
    config["versions"]["jax"] = "0.0.1"
    (out / "config.json").write_text(json.dumps(config))
    train(settings_for(out, resume=True))
    assert "warning: not bit for bit as without the break: jax 0.0.1 then" in capsys.readouterr().err


def test_changed_metrics_are_refused(quiet, tmp_path):
    out = stopped(tmp_path, quiet, keep_last=3)
    (out / METRICS).write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 0 lines, and had \d+ at the checkpoint: it was changed"):
        train(settings_for(out, resume=True))


def test_what_is_not_finite_ends_the_run_with_the_state_from_before(quiet, tmp_path):
    """Step 8 fails. The message has the step and the layers; what was saved goes on to the quiet run's end."""
    out = tmp_path / "run"
    with pytest.raises(DivergedError) as caught:
        train(settings_for(out), spoiled=[8])
    assert str(caught.value) == (
        "the loss is nan at step 8 (epoch 2). Not finite are the pictures, the activation conv1, the activation pool, "
        f"the logits and 5 more; the checkpoint of step 7, before it, is in {out / CHECKPOINTS}: try a lower "
        "--learning-rate or --clip-norm in a new --out, or --resume with --skip-nonfinite"
    )
    assert Checkpoints(out / CHECKPOINTS).steps()[-1] == 7
    assert train(settings_for(out, resume=True)) is None
    assert differences(quiet, out) == []


def test_what_is_not_finite_is_left_out_up_to_a_limit(tmp_path):
    out = tmp_path / "run"
    assert train(settings_for(out, skip_nonfinite=2, log_every=1), spoiled=[8, 11]) is None
    rows = [row for row in read_metrics(out) if "test_loss" not in row]
    assert [row["step"] for row in rows if row.get("skipped")] == [8, 11]
    assert [row["step"] for row in rows if row["train_loss"] is None] == [8, 11]
    ends = [row for row in read_metrics(out) if "test_loss" in row]
    assert [row.get("skipped") for row in ends] == [None, 1, 1]
    assert all(np.isfinite(row["train_loss"]) for row in ends)
    with pytest.raises(DivergedError, match="at step 13"):
        train(settings_for(tmp_path / "other", skip_nonfinite=2), spoiled=[8, 11, 13])


def test_a_disk_that_is_full_is_said_and_the_run_goes_on(quiet, tmp_path, capsys, monkeypatch):
    """At step 10: the results are the same, and the checkpoints around it are there."""
    out = tmp_path / "run"
    save_file = safetensors.numpy.save_file

    def failing(arrays, path):
        if "10.unfinished" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(arrays, path)

    monkeypatch.setattr(safetensors.numpy, "save_file", failing)
    assert train(settings_for(out, keep=9)) is None
    warning = (
        f"warning: the checkpoint of step 10 could not be written ({os.strerror(errno.ENOSPC)}); the last good one is"
    )
    assert warning in capsys.readouterr().err
    assert 10 not in Checkpoints(out / CHECKPOINTS).steps()
    assert differences(quiet, out) == []


def test_dry_run_touches_nothing(tmp_path, capsys):
    assert train(settings_for(tmp_path / "run", dry_run=True), kill_at=1) is None
    printed = capsys.readouterr().out
    assert "memory of a device" in printed
    assert "checkpoints of" in printed
    assert "nothing was trained" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": True, "out": None}, "--resume needs --out"),
        ({"resume": True, "overwrite": True}, "choose one"),
        ({"resume": True, "keep": 0}, "--keep 0 writes none"),
        ({"ema": 1.0}, "--ema must be between 0 and 1"),
        ({"accumulate": 4}, "--batch-size 6 must be a multiple of --accumulate 4"),
        ({"devices": "two"}, "--devices is a number or all"),
        ({"process_id": 1}, "need --coordinator"),
        ({"checkpoint_minutes": 0.0}, "--checkpoint-minutes must be positive"),
        ({"framework": "numpy", "ema": 0.9}, "--ema is for --framework jax, not for numpy"),
    ],
)
def test_settings_that_cannot_be(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings_for(tmp_path).replace(**{"checkpoint_steps": None, "ema": None} | changes).check()
