"""The benchmarks run and print what they say; what they measure is not tested."""

import re

import pytest

from experiments.bench import contestants
from experiments.bench.__main__ import main
from experiments.bench.contestants import Case, Contestant

TINY = ["step", "--arch", "resnet18", "--batch-size", "2", "--image-size", "32x40", "--rounds", "2", "--steps", "1"]


def test_step_prints_its_table(capsys):
    assert main([*TINY, "--contestants", "jax"]) == 0
    printed = capsys.readouterr().out
    assert "resnet18, batch 2 of 32x40x3, float32" in printed
    assert re.search(r"^jax +\d+ +\d+-\d+ +\d+\.\d s$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--rounds", "0"], "at least 1"), (["--batch-size", "0"], "at least 1"), (["--image-size", "8"], "--image-size")],
)
def test_bad_settings_are_exit_code_2(options, message, capsys):
    assert main([*TINY, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_size_without_a_network_is_refused(capsys):
    assert main(["step", "--image-size", "64"]) == 2
    assert "go with --arch" in capsys.readouterr().err


def test_a_contestant_that_fails_is_left_out(capsys):
    """A network that there is not: its process says so instead of hanging."""
    with pytest.raises(RuntimeError, match=r"jax: AttributeError: .*resnet19"):
        Contestant("jax", Case("resnet19", 2, 32, 32))


def test_torch_takes_part_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: None)
    assert contestants.available() == ["jax"]
