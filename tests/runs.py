"""Waits for the run of a training program, and checks what it leaves behind, whatever its data."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from experiments.classify import __main__ as classify
from experiments.training.run_folder import read_metrics, read_test_results

METRICS = {"epoch", "step", "train_loss", "train_top1", "train_macro_f1", "images_per_second", "seconds"}
TEST_METRICS = {"test_loss", "test_top1", "test_top5", "test_macro_f1"}


def wait_for(found, seconds=60):
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def check_files(folder, *pictures):
    """The folder has configuration, metrics, weights, predictions, TensorBoard's file, and no blank pictures."""
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "weights.safetensors", "predictions.csv", *pictures} <= names
    assert [name for name in names if name.startswith("events.out.tfevents")]
    for name in pictures:
        assert np.asarray(Image.open(folder / name).convert("L")).std() > 5, f"{name} is blank"


def check_rows(folder, steps, ends, more=frozenset()):
    """The metrics have rows of plain numbers at these steps; the rows at `ends` have test metrics too."""
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == steps
    assert [row["step"] for row in rows if "test_loss" in row] == ends
    for row in rows:
        assert set(row) == METRICS | (TEST_METRICS | more if "test_loss" in row else set())
        assert all(isinstance(value, int | float) for value in row.values())
        assert all(0 <= row[name] <= 1 for name in row if "top" in name or "f1" in name)


def check_classify(folder, images, framework, tmp_path, capsys):
    """classify answers as the run's own test did, from the folder alone; images are the first test pictures, grey.

    2e-3 is for the rounding in predictions.csv and in batches of another size.
    """
    expected = read_test_results(folder / "predictions.csv")
    paths = [str(tmp_path / f"{number}.png") for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[..., 0]).save(path)
    capsys.readouterr()
    arguments = ["--weights", str(folder), "--framework", framework, "--json", "--top", "1"]
    assert classify.main([*paths, *arguments]) == 0
    answers = [rows[0] for rows in json.loads(capsys.readouterr().out)["pictures"].values()]
    for number, answer in enumerate(answers):
        assert answer["probability"] == pytest.approx(expected["confidence"][number], abs=2e-3)
        assert answer["number"] == expected["prediction"][number]
