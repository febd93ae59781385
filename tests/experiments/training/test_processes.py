"""Trainings in separate processes, by the command line: two that train together, SIGTERM, SIGKILL."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import soak
from bad_files import noisy_digits
from runs import wait_for
from trees import close

from experiments.training.processes import choose_devices
from experiments.training.run_folder import CHECKPOINTS, METRICS, read_metrics
from jax_resnet.checkpoint import Checkpoints

ROOT = Path(__file__).parents[3]
# Four devices in each of two processes on two cores wait long for one another.
FLAGS = (
    "--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=900 "
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=900"
)


def start(data, out, arguments, *more, flags=""):
    """Starts experiments.mnist in a new process."""
    command = [sys.executable, "-m", "experiments.mnist", *arguments.split(), *more, "--data", str(data)]
    return subprocess.Popen(
        [*command, "--framework", "jax", "--limit", "48", "--batch-size", "16", "--out", str(out), "--log-every", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"},
        restore_signals=True,
    )


def finish(process, code=0, timeout=900):
    printed, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, printed
    return printed


@pytest.fixture
def digits(tmp_path):
    noisy_digits(seed=0, train=48, test=10)(tmp_path)
    return tmp_path / "digits"


def together(data, out, arguments):
    """Starts two processes of one training."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    shared = f"{arguments} --coordinator {address} --num-processes 2"
    return [start(data, out, f"{shared} --process-id {number}", flags=FLAGS) for number in (0, 1)]


def last_arrays(out):
    checkpoints = Checkpoints(out / CHECKPOINTS)
    return checkpoints.read(checkpoints.steps()[-1])[0]


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one(digits, tmp_path):
    """After six steps of ResNet-18 in float64 checkpoints and metrics agree, and one process alone reports."""
    run = "--model resnet18 --epochs 2 --precision float64"
    finish(start(digits, tmp_path / "one", run))
    printed = [finish(process) for process in together(digits, tmp_path / "two", run)]
    assert "top-1 of 10 test pictures after 2 of 2 epochs" in printed[0]
    assert "top-1" not in printed[1]
    close(last_arrays(tmp_path / "two"), last_arrays(tmp_path / "one"), 1e-9)
    for ours, theirs in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-9)
        assert ours["train_macro_f1"] == theirs["train_macro_f1"]
    printed = finish(start(digits, tmp_path / "two", run, "--resume"))
    assert "warning: no longer bit-identical to an uninterrupted run: it ran on" in printed


def stop_by_sigterm(processes, number, out):
    """Sends SIGTERM to one process after three rows; returns what the first process has printed.

    The last row's step must have a checkpoint. A training of one process must end within 30 seconds.
    """
    wait_for(lambda: soak.rows(out) >= 3 or processes[0].poll() is not None, 600)
    sent = time.monotonic()
    processes[number].send_signal(signal.SIGTERM)
    printed = [finish(process, code=128 + signal.SIGTERM, timeout=300) for process in processes]
    assert len(processes) > 1 or time.monotonic() - sent < 30
    checkpoints = Checkpoints(out / CHECKPOINTS)
    assert checkpoints.steps()[-1] == read_metrics(out)[-1]["step"]
    checkpoints.read(checkpoints.steps()[-1])
    return printed[0]


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_with_a_checkpoint(digits, tmp_path):
    out = tmp_path / "two"
    stop_by_sigterm(together(digits, out, "--model resnet18 --epochs 500"), 1, out)


def test_sigterm_ends_within_30_seconds_with_a_checkpoint_of_the_current_step(digits, tmp_path):
    out = tmp_path / "run"
    printed = stop_by_sigterm([start(digits, out, "--model cnn --epochs 5000")], 0, out)
    assert f"stopped by SIGTERM: to continue, repeat the command with --out {out} --resume" in printed


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tmp_path, capsys):
    """At least five kills interrupt the writing of a checkpoint; the next start names the half-written one."""
    assert soak.soak(tmp_path, kills=20, seed=0)
    printed = capsys.readouterr().out
    (writing,) = re.findall(r"20 times SIGKILL, (\d+) while a checkpoint was being written", printed)
    assert int(writing) >= 5
    assert (tmp_path / "killed.log").read_text().count("is half-written: it is not used") >= 5
    assert (tmp_path / "killed" / METRICS).exists()


def test_a_batch_that_the_devices_cannot_share_equally(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--batch-size 33 must be a multiple of the 2 devices that share it"):
        choose_devices("all", 33)
