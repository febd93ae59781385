"""Trainings in processes of their own, by the command line: two that train together, SIGTERM, SIGKILL."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soak
from bad_files import noisy_digits

from experiments.training.processes import choose_devices, join_processes
from experiments.training.run_folder import CHECKPOINTS, METRICS, read_metrics
from jax_resnet.checkpoint import Checkpoints

ROOT = Path(__file__).parents[3]
# Four devices in each of two processes on two cores wait long for one another.
FLAGS = (
    "--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=900 "
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=900"
)


def start(data, out, *arguments, program="mnist", flags=""):
    command = [sys.executable, "-m", f"experiments.{program}", *arguments, "--out", str(out), "--log-every", "1"]
    return subprocess.Popen(
        command + (["--data", str(data)] if data else []),
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


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(data, out, *arguments):
    """Two processes of one training."""
    port = free_port()
    shared = (*arguments, "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2")
    return [start(data, out, *shared, "--process-id", str(number), flags=FLAGS) for number in (0, 1)]


def distance(one, other):
    """The largest difference of an array of the last checkpoints, over its largest entry."""
    both = [Checkpoints(out / CHECKPOINTS) for out in (one, other)]
    (arrays, _), (others, _) = (checkpoints.read(checkpoints.steps()[-1]) for checkpoints in both)
    assert arrays.keys() == others.keys()
    return max(float(np.abs(arrays[n] - others[n]).max() / max(np.abs(others[n]).max(), 1e-3)) for n in arrays)


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one(tmp_path):
    """ResNet-18 in float64, six steps: parameters, statistics, moments, metrics; the reports are written once."""
    noisy_digits(tmp_path, seed=0, train=48, test=10)
    run = (
        "--framework",
        "jax",
        "--model",
        "resnet18",
        "--limit",
        "48",
        "--batch-size",
        "16",
        "--epochs",
        "2",
        "--precision",
        "float64",
    )
    finish(start(tmp_path / "digits", tmp_path / "one", *run))
    first, second = together(tmp_path / "digits", tmp_path / "two", *run)
    printed = [finish(process) for process in (first, second)]
    assert "top-1 of 10 test pictures after 2 of 2 epochs" in printed[0]
    assert "top-1" not in printed[1]
    assert distance(tmp_path / "two", tmp_path / "one") < 1e-9
    for ours, theirs in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-9)
        assert ours["train_macro_f1"] == theirs["train_macro_f1"]
    printed = finish(start(tmp_path / "digits", tmp_path / "two", *run, "--resume"))
    assert "warning: not bit for bit as without the break: it ran on" in printed


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_with_a_checkpoint(tmp_path):
    noisy_digits(tmp_path, seed=0, train=48, test=10)
    run = ("--framework", "jax", "--model", "resnet18", "--limit", "48", "--batch-size", "16", "--epochs", "500")
    processes = together(tmp_path / "digits", tmp_path / "two", *run)
    wait_for_rows(processes[0], tmp_path / "two", 3)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        finish(process, code=128 + signal.SIGTERM, timeout=300)
    checkpoints = Checkpoints(tmp_path / "two" / CHECKPOINTS)
    assert checkpoints.steps()[-1] == read_metrics(tmp_path / "two")[-1]["step"]
    checkpoints.read(checkpoints.steps()[-1])


def wait_for_rows(process, out, count, timeout=600):
    end = time.monotonic() + timeout
    while soak.rows(out) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_sigterm_ends_within_30_seconds_with_a_checkpoint_of_the_current_step(tmp_path):
    out = tmp_path / "run"
    arguments = ("--arch", "resnet18", "--image-size", "32", "--limit", "96", "--batch-size", "16", "--epochs", "500")
    process = start(None, out, *arguments, program="cars")
    wait_for_rows(process, out, 2)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    printed = finish(process, code=128 + signal.SIGTERM)
    assert time.monotonic() - sent < 30
    assert f"stopped by SIGTERM: the same command with --out {out} --resume goes on" in printed
    assert Checkpoints(out / CHECKPOINTS).steps()[-1] == read_metrics(out)[-1]["step"]


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tmp_path, capsys):
    """At least five of them while a checkpoint is being written: what is left of it is named at the next start."""
    assert soak.main(["--kills", "20", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (writing,) = re.findall(r"20 times SIGKILL, (\d+) while a checkpoint was being written", printed)
    assert int(writing) >= 5
    assert (tmp_path / "killed.log").read_text().count("is half-written: it is not used") >= 5
    assert (tmp_path / "killed" / METRICS).exists()


def test_more_devices_than_there_are():
    with pytest.raises(ValueError, match=r"--devices 99: JAX sees \d+ \(cpu\); XLA_FLAGS=.*=99 makes virtual ones"):
        choose_devices("99", 99)


def test_an_address_without_a_port_is_an_error():
    with pytest.raises(ValueError, match="takes HOST:PORT of process 0"):
        join_processes("localhost", 0, 2)
