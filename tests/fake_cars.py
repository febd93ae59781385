"""Stands in for experiments.cars in tests of experiments.study: writes a run's files within milliseconds.

The nearer a contestant's learning rate is to 0.01, the better it does; a rate above 1 diverges. Each epoch takes
$FAKE_CARS_SECONDS and appends a line to the file $FAKE_CARS_LOG. A killed run keeps its finished epochs, as with
checkpoints. A run of 13 epochs ends before the first.
"""

import csv
import json
import math
import os
import random
import sys
import time
from pathlib import Path

FAKE = Path(__file__)
TEST_PICTURES = 200
DEFAULTS = {"momentum": 0.9, "dampening": 0.0, "preset": "cars96", "data": None, "framework": "jax", "test_every": 1}
DEFAULTS |= {"final_lr": 1.0, "gamma": 0.001, "gamma_times_steps": None}


SMALL = """
about = "Which is better, on drawn cars?"
[settings]
preset = "demo"
arch = "resnet18"
image_size = "32"
[tuning]
trials = 3
epochs = 2
holdout = 0.1
[final]
seeds = [4, 5]
epochs = 3
[[contestants]]
name = "Adam"
settings = { opt = "adam" }
search.learning_rate = { low = 1e-4, high = 1e-1, log = true }
search.momentum = [0.8, 0.9]
[[contestants]]
name = "AdaBound"
settings = { opt = "adabound" }
search.learning_rate = { low = 1e-4, high = 1e-1, log = true }
search.final_lr = { low = 0.1, high = 1.0 }
[report]
compare = ["AdaBound", "Adam"]
targets = [0.2, 0.99]
"""


def read_settings() -> dict[str, object]:
    """Parses --name=value, with numbers as numbers; importing experiments.training.settings would take seconds."""
    settings = dict(DEFAULTS)
    for argument in sys.argv[1:]:
        name, _, text = argument.removeprefix("--").partition("=")
        try:
            settings[name.replace("-", "_")] = text if name == "image-size" else json.loads(text)
        except ValueError:
            settings[name.replace("-", "_")] = text or True
    return settings


def main() -> int:
    settings = read_settings()
    out, rate, epochs = Path(settings["out"]), settings["learning_rate"], settings["epochs"]
    out.mkdir(parents=True, exist_ok=True)
    if rate < 1e-5:
        print("error: no memory", file=sys.stderr)
        return 2
    config = {
        "settings": settings,
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "data": {"title": "drawn cars"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "steps_per_epoch": 1,
        "versions": {"jax": "0.10.2", "jaxlib": "0.10.2"},
        "git_commit": 40 * "a" + "-dirty",
        "input": {"arch": settings["arch"], "image_size": [32, 32], "grey": True, "class_names": ["a", "b", "c"]},
    }
    if settings["gamma_times_steps"]:
        settings["gamma"] = settings["gamma_times_steps"] / epochs
    (out / "config.json").write_text(json.dumps(config))
    if rate > 1:
        (out / "error.txt").write_text(f"the loss is nan at step 3; the checkpoint is in {out}/checkpoints\n")
        return 1
    if epochs == 13:
        return 0
    (out / "weights.safetensors").write_text("large")
    (out / "checkpoints").mkdir(exist_ok=True)
    metrics = out / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    right = math.exp(-abs(math.log10(rate) + 2))
    for epoch in range(done + 1, epochs + 1):
        time.sleep(float(os.environ.get("FAKE_CARS_SECONDS", 0)))
        noise = random.Random(f"{settings['seed']} {rate} {settings['opt']} {epoch}").uniform(0.95, 1)
        top1 = right * noise * epoch / epochs
        row = {"epoch": float(epoch), "step": epoch, "train_loss": 2 - top1, "train_top1": top1}
        if epoch % settings["test_every"] == 0 or epoch == epochs:
            row |= {"test_loss": 2 - top1, "test_top1": top1, "test_top5": 1.0, "test_macro_f1": top1}
        if settings["opt"] in ("adam", "adabound"):
            row |= {"step_lower": 0.1, "step_upper": 10 / epoch, "at_lower": 0.1, "at_upper": 1 - 1 / epoch}
            row |= {"step/conv1": 1.0, "step/layer1.0.conv1": 20.0 / epoch, "step/fc": 0.5}
        row |= {"images_per_second": 100.0, "seconds": 1.5 * epoch}
        with open(metrics, "a") as file:
            file.write(json.dumps(row) + "\n")
        if log := os.environ.get("FAKE_CARS_LOG"):
            with open(log, "a") as file:
                file.write(f"{out} {epoch}\n")
    labels = random.Random(0)
    predictions = random.Random(f"{settings['seed']} {rate} {settings['opt']}")
    with open(out / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("picture", "label", "prediction", "confidence", "top5", "loss"))
        for number in range(TEST_PICTURES):
            label = labels.randrange(3)
            prediction = label if predictions.random() < right else (label + 1) % 3
            writer.writerow((number, label, prediction, 0.5, 1, 1.0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
