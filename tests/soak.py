"""Kills a training repeatedly, resumes it each time, and compares it with one that was never killed, bit for bit."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from experiments.training.run_folder import CHECKPOINTS, METRICS, WEIGHTS, read_metrics
from jax_resnet.checkpoint import Checkpoints

TRAINING = "--arch=resnet18 --image-size=32 --limit=192 --batch-size=16 --epochs=10 --log-every=1 --checkpoint-steps=2"
TRAINING += " --opt=amsbound --ema=0.9"
KINDS = ("checkpoint", "step", "checkpoint", "time", "step")  # in turn
SLOWEST_START = 300.0  # seconds


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "experiments.cars", *TRAINING.split(), "--out", str(out), *more]


def run_killed(out: Path, kills: int, rng: random.Random) -> int:
    """Runs the training to its end and kills it on the way; its stderr and stdout go to <out>.log.

    Returns:
      the number of kills that left a half-written checkpoint.
    """
    unfinished = 0
    with open(out.with_suffix(".log"), "w", encoding="utf-8") as log:
        for number in range(kills):
            start, kind = time.monotonic(), KINDS[number % len(KINDS)]
            process = subprocess.Popen(command(out, "--resume"), stdout=log, stderr=log)
            if not wait_for(kind, process, start, out, rng):
                code = process.returncode
                raise RuntimeError(f"it ended by itself (exit code {code}) after {number} kills: see {log.name}")
            process.kill()
            process.wait()
            met = bool(fresh_unfinished(out, start))
            unfinished += met
            told = f"kill {number + 1}, waited for: {kind}; after {time.monotonic() - start:.1f} s, {rows(out)} rows"
            print(f"{told}{', checkpoint half-written' if met else ''}", flush=True)
        subprocess.run(command(out, "--resume"), stdout=log, stderr=log, check=True)
    return unfinished


def wait_for(kind: str, process: subprocess.Popen, start: float, out: Path, rng: random.Random) -> bool:
    """Waits until it is time to kill; returns False if the process ends before that."""
    delay, more = rng.random(), rng.randint(1, 5)  # the kill waits for `more` steps, or half as many checkpoints
    cut = rows(out)
    seen: set[Path] = set()
    while process.poll() is None:
        now = time.monotonic() - start
        cut = min(cut, rows(out))  # a resumed run first cuts its metrics back to the checkpoint
        if kind == "time" and (now > 20 * delay or rows(out) >= cut + more):  # all kills must fit into one training
            return True
        if kind == "checkpoint":
            seen |= fresh_unfinished(out, start)
            if 2 * len(seen) >= more:
                time.sleep(0.1 * delay)
                return process.poll() is None
        if kind == "step" and rows(out) >= cut + more:
            time.sleep(0.5 * delay)
            return process.poll() is None
        if now > SLOWEST_START:
            raise RuntimeError(f"nothing to kill within {SLOWEST_START:.0f} s: see {out}.log")
        time.sleep(0.001)
    return False


def fresh_unfinished(out: Path, start: float) -> set[Path]:
    """The checkpoints that this process is writing, without those that an earlier one left half-written."""
    since = time.time() - (time.monotonic() - start)
    try:
        return {path for path in Checkpoints(out / CHECKPOINTS).unfinished() if path.stat().st_mtime > since}
    except FileNotFoundError:  # renamed meanwhile
        return set()


def rows(out: Path) -> int:
    try:
        return (out / METRICS).read_bytes().count(b"\n")
    except FileNotFoundError:  # not there yet, or removed by a start from step 0
        return 0


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs that have ended: arrays of the last checkpoints, lines of metrics, weights."""
    both = [Checkpoints(out / CHECKPOINTS) for out in (one, other)]
    steps = [checkpoints.steps()[-1] for checkpoints in both]
    if steps[0] != steps[1]:
        return [f"the last checkpoints are of steps {steps[0]} and {steps[1]}"]
    arrays, others = (checkpoints.read(steps[0])[0] for checkpoints in both)
    found = sorted(arrays.keys() ^ others.keys())
    for name in arrays.keys() & others.keys():
        if arrays[name].dtype != others[name].dtype or not np.array_equal(arrays[name], others[name], equal_nan=True):
            found.append(name)
    lines, other_lines = timeless_rows(one), timeless_rows(other)
    if len(lines) != len(other_lines):
        found.append(f"{METRICS} has {len(lines)} and {len(other_lines)} lines")
    found += [f"{METRICS}, step {a['step']}" for a, b in zip(lines, other_lines, strict=False) if a != b]
    weights, others = (load_file(out / WEIGHTS) for out in (one, other))  # safetensors' metadata have no fixed order
    return found + [f"{WEIGHTS}, {name}" for name in weights if not np.array_equal(weights[name], others[name])]


def timeless_rows(out: Path) -> list[dict[str, Any]]:
    return [{n: v for n, v in row.items() if n not in ("seconds", "images_per_second")} for row in read_metrics(out)]


def soak(out: Path, kills: int, seed: int) -> bool:
    """Runs both trainings in a folder and prints what happened; returns whether they are equal in every bit."""
    started = time.monotonic()
    quiet, killed = out / "quiet", out / "killed"
    out.mkdir(parents=True, exist_ok=True)
    for folder in (quiet, killed):
        shutil.rmtree(folder, ignore_errors=True)
    print("a training that is left alone, then one that is killed", flush=True)
    with open(out / "quiet.log", "w", encoding="utf-8") as log:
        subprocess.run(command(quiet), stdout=log, stderr=log, check=True)
    unfinished = run_killed(killed, kills, random.Random(seed))
    log = (out / "killed.log").read_text(encoding="utf-8")
    print(
        f"{kills} times SIGKILL, {unfinished} while a checkpoint was being written "
        f"({log.count('is half-written')} named in the log), {log.count('going on at step')} times gone on from a "
        f"checkpoint, {log.count('starting at step 0')} times begun; {time.monotonic() - started:.0f} s"
    )
    different = differences(quiet, killed)
    for name in different:
        print(f"differs: {name}")
    checkpoints = Checkpoints(killed / CHECKPOINTS)
    count = len(checkpoints.read(checkpoints.steps()[-1])[0])
    if not different:
        told = f"all {count} arrays of the last checkpoint, {rows(killed)} lines of metrics and the weights"
        print(f"{told} are bit-equal")
    return not different
