"""A run that is stopped and resumed equals one that was never stopped, bit for bit; and what can go wrong."""

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

STEPS = 3 * 5  # 3 epochs of 30 pictures in batches of 6


def settings_for(out, **changes):
    experiment = Experiment("amsbound", learning_rate=1e-2, epochs=3, batch_size=6, log_every=2, ema=0.9)
    return RunSettings(experiment, System(out=out, keep=3, checkpoint_steps=2)).replace(**changes)


def train(settings, *, kill_at=None, number=signal.SIGTERM, in_test=None, spoiled=(), **parts):
    """Runs the tiny training, with a signal in a step or in a test's batch. Returns what ended the training.

    In the spoiled steps the pictures are nan. `parts` replace fields of the training.
    """

    def prepare(settings, data):
        training = tiny_network.training(settings, data, spoiled=spoiled)
        calls = {"train": 0, "test": 0}

        def killed(name, step, at):
            def call(*arguments):
                calls[name] += 1
                if calls[name] == at:
                    signal.raise_signal(number)
                return step(*arguments)

            return call

        train_step = killed("train", training.train_step, kill_at)
        train_step.lower = training.train_step.lower
        description = {"class_names": list(data.class_names), "mean": [0.0], "std": [1.0], "image_size": [8, 8]}
        eval_step = killed("test", training.eval_step, in_test)
        return training._replace(train_step=train_step, eval_step=eval_step, **parts), description

    return train_and_report(settings, tiny_network.dataset(), "tiny", prepare)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A run that is never stopped."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    assert train(settings_for(out)) is None
    assert Checkpoints(out / CHECKPOINTS).steps()[-1] == STEPS
    return out


@pytest.mark.parametrize(
    "moment",
    [*({"kill_at": step} for step in (1, 4, 5, 6, 13, 15)), {"in_test": 5}],
    ids=lambda moment: " ".join(f"{name}-{number}" for name, number in moment.items()),
)
def test_stopped_and_gone_on_is_the_run_left_alone(moment, quiet, tmp_path, capsys):
    """The signal comes in the first step, around the end of an epoch, in the last step, or in the second test of the
    first epoch, which tests the averages: after the epoch's steps, before its row."""
    out, step = tmp_path / "run", moment.get("kill_at", 5)
    assert train(settings_for(out), **moment) == signal.SIGTERM
    assert Checkpoints(out / CHECKPOINTS).steps()[-1] == step  # the current step's, due or not
    assert any("test_loss" in row for row in read_metrics(out)) == (step > 5)
    assert "to continue, repeat the command with --out" in capsys.readouterr().out
    assert train(settings_for(out, resume=True)) is None
    assert f"going on at step {step}" in capsys.readouterr().out
    assert differences(quiet, out) == []


def test_stopped_many_times(quiet, tmp_path):
    out = tmp_path / "run"
    train(settings_for(out, resume=True), kill_at=2, number=signal.SIGINT)
    while train(settings_for(out, resume=True), kill_at=3, number=signal.SIGINT) is not None:
        pass
    assert differences(quiet, out) == []


def test_a_difference_would_be_seen(quiet, tmp_path):
    """The comparison finds another seed, and a changed bit in the metrics."""
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


@pytest.fixture
def stopped(quiet, tmp_path):
    """Makes the files that SIGKILL leaves: the quiet run's first checkpoints, all its metrics and half a row."""

    def stop(keep_last):
        out = tmp_path / "run"
        shutil.copytree(quiet, out)
        for step in Checkpoints(out / CHECKPOINTS).steps()[keep_last:]:
            shutil.rmtree(out / CHECKPOINTS / str(step))
        with open(out / METRICS, "a", encoding="utf-8") as file:
            file.write('{"step": 99, "tr')
        return out

    return stop


@pytest.mark.parametrize(
    ("keep_last", "changes", "said"),
    [
        (1, {}, "going on at step"),
        (1, {"keep": 1, "checkpoint_steps": 3}, "going on at step"),
        (0, {}, "run has no complete checkpoint: starting at step 0"),
        (9, {}, f"nothing is left to train after step {STEPS}"),
    ],
    ids=["metrics are cut back", "settings that change no result", "without a checkpoint", "ended"],
)
def test_what_a_kill_has_left_goes_on(keep_last, changes, said, quiet, stopped, capsys):
    out = stopped(keep_last)
    assert train(settings_for(out, resume=True, **changes), kill_at=1 if keep_last == 9 else None) is None
    assert said in capsys.readouterr().out
    assert differences(quiet, out) == []


def test_resuming_nothing_begins(quiet, tmp_path):
    assert train(settings_for(tmp_path / "new", resume=True)) is None
    assert differences(quiet, tmp_path / "new") == []


def test_half_written_and_damaged_ones_are_named_and_the_one_before_is_used(quiet, stopped, capsys):
    out = stopped(3)
    folder = out / CHECKPOINTS
    *_, before, last = Checkpoints(folder).steps()
    (folder / f"{last + 1}.unfinished").mkdir()
    file = folder / str(last) / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    config = json.loads((out / "config.json").read_text())
    config["versions"]["jax"] = "0.0.1"
    (out / "config.json").write_text(json.dumps(config))
    assert train(settings_for(out, resume=True)) is None
    printed = capsys.readouterr()
    assert f"{folder / f'{last + 1}.unfinished'} is half-written: it is not used" in printed.err
    assert f"{folder / str(last)} is damaged: " in printed.err
    assert f"going on at step {before}" in printed.out, printed.err
    assert "warning: no longer bit-identical to an uninterrupted run: jax 0.0.1 then" in printed.err
    assert differences(quiet, out) == []


def test_what_is_not_finite_ends_the_run_with_the_state_from_before(quiet, tmp_path):
    """Step 8 fails. The message names the step and the layers; the resumed run ends as the quiet one."""
    out = tmp_path / "run"
    with pytest.raises(DivergedError) as caught:
        train(settings_for(out), spoiled=[8])
    assert str(caught.value) == (
        "the loss is nan at step 8 (epoch 2). Not finite: the pictures, the activation conv1, the activation pool, "
        f"the logits and 5 more; the checkpoint of the step before, 7, is in {out / CHECKPOINTS}: try a lower "
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
        train(settings_for(tmp_path / "other", skip_nonfinite=2), spoiled=[8, 11, 13], search=lambda *batch: [])


def test_a_disk_that_is_full_is_said_and_the_run_goes_on(quiet, tmp_path, capsys, monkeypatch):
    """The checkpoint of step 10 is missing; the results are the same."""
    out = tmp_path / "run"
    save_file = safetensors.numpy.save_file

    def failing(arrays, path):
        if "10.unfinished" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(arrays, path)

    monkeypatch.setattr(safetensors.numpy, "save_file", failing)
    assert train(settings_for(out, keep=9)) is None
    warning = (
        f"warning: the checkpoint of step 10 could not be written ({os.strerror(errno.ENOSPC)}); the latest complete"
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
