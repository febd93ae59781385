"""experiments.machine: a program that starts itself anew must stay the program that was asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import machine as malloc

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys, warnings
from experiments.machine import use_huge_pages
first = os.getpid()
use_huge_pages()
print(json.dumps({"pid": os.getpid(), "arguments": sys.argv[1:], "tunables": os.environ.get("GLIBC_TUNABLES"),
                  "mark": "huge_pages" in sys._xoptions, "dev": sys.flags.dev_mode}))
sys.exit(7)
"""

on_request = pytest.mark.skipif(not malloc._on_request(), reason="Linux gives huge pages to all here, or to nobody")


def start(folder, *command, **environment):
    """Runs PROGRAM; returns its process number and what it printed."""
    (folder / "program.py").write_text(PROGRAM)
    variables = {name: value for name, value in os.environ.items() if name != malloc.TUNABLES} | environment
    variables["PYTHONPATH"] = f"{ROOT}{os.pathsep}{folder}"
    process = subprocess.Popen([sys.executable, *command], env=variables, cwd=folder, stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    return process.pid, json.loads(printed)


@on_request
def test_a_program_starts_anew_as_the_same(tmp_path):
    """Process, arguments, Python's options, exit code, and what else was told to glibc."""
    pid, found = start(
        tmp_path, "-X", "dev", "-m", "program", "two words", "-é", "", GLIBC_TUNABLES="glibc.malloc.perturb=0"
    )
    tunables = "glibc.malloc.perturb=0:glibc.malloc.hugetlb=1"
    assert found == {"pid": pid, "arguments": ["two words", "-é", ""], "tunables": tunables, "mark": True, "dev": True}


@pytest.mark.parametrize(
    ("command", "tunables"),
    [
        (["-m", "program"], "glibc.malloc.hugetlb=0"),  # somebody has decided
        (["-X", "huge_pages", "-m", "program"], ""),  # started anew already, by something that drops variables
        (["program.py"], ""),  # no program of this project's way
    ],
)
def test_a_program_does_not_start_anew(tmp_path, command, tunables):
    pid, found = start(tmp_path, *command, GLIBC_TUNABLES=tunables)
    assert found["pid"] == pid
    assert found["tunables"] == tunables


@on_request
def test_it_goes_on_where_it_cannot_start_anew(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "program"])
    monkeypatch.setattr(sys, "executable", "")
    monkeypatch.delenv(malloc.TUNABLES, raising=False)
    malloc.use_huge_pages()
    assert not os.environ[malloc.TUNABLES]
    assert malloc.describe_pages() == "the system's pages"
