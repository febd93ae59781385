"""How programs start and end: what they import, and output that nobody reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cli, convert
from jax_resnet import resnet, weights

ROOT = Path(__file__).parents[2]
PROGRAMS = ("cars", "mnist", "compare", "describe", "convert", "classify", "bench", "parity", "study", "report")
HEAVY = {"jax", "orbax", "grain", "matplotlib", "torch", "tensorboardX"}
IMPORTS = """
import contextlib, importlib, io, json, sys
found = {}
for command in sys.argv[1:]:
    name, *arguments = command.split()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        program = importlib.import_module(f"experiments.{name}")
        if hasattr(program, "__path__"):
            program = importlib.import_module(f"experiments.{name}.__main__")
        program.main(arguments)
    found[command] = sorted(sys.modules)
print(json.dumps(found))
"""


def imports(*commands):
    """Runs programs in one process; returns the heavy modules imported by the end of each."""
    done = subprocess.run([sys.executable, "-c", IMPORTS, *commands], cwd=ROOT, capture_output=True, text=True)
    return {command: HEAVY & set(modules) for command, modules in json.loads(done.stdout).items()}


def test_help_and_describe_import_nothing_heavy():
    commands = [f"{name} --help" for name in PROGRAMS]
    for command, heavy in imports(*commands, "describe --arch resnet101").items():
        assert heavy <= ({"jax"} if command.startswith("describe --arch") else set()), command


def test_import_contracts():
    """They are in pyproject.toml. import-linter's console keeps the first standard output, so it needs a process."""
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_command_lines_copy_from_jax_resnet():
    assert cli.MIN_SIZE == resnet.MIN_SIZE
    assert convert.Names == weights.Names


def test_training_needs_no_torch():
    """If torch and torchvision cannot be imported, the training modules still can."""
    blocked = "import sys; sys.modules.update(torch=None, torchvision=None); import experiments.training.prepare"
    code = f"{blocked}, experiments.training.run, experiments.mnist, jax_resnet"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["describe", "--arch", "resnet101"], ["cars", "--help"]])
def test_a_closed_pipe_ends_a_program_quietly(command, unbuffered):
    """The pipe is closed before the first line; `| head -1` closes it after one."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", f"experiments.{command[0]}", *command[1:]],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write)
    assert process.stderr == ""
    assert process.returncode == 128 + 13


FULL = "error: the work is done, but what it printed could not be written: No space left on device\n"


OUTPUTS = [
    ("--help >&-", 0, ""),
    ("--help >/dev/full", 1, FULL),
    (">/dev/full", 2, "error: name at least one run folder\n"),
]


@pytest.mark.parametrize(("output", "code", "said"), OUTPUTS)
def test_output_that_is_closed_or_cannot_be_written(output, code, said):
    command = f"{sys.executable} -m experiments.compare {output}"
    options = dict(cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": ""})
    process = subprocess.run(["bash", "-c", command], **options)
    assert (process.returncode, process.stderr) == (code, said)
