"""experiments.machine in separate processes: a program that restarts itself, and the cache of compiled programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import machine

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
COMPILING = """
import jax
from experiments.machine import use_compilation_cache
use_compilation_cache()
jax.jit(lambda x: x + 1)(1.0)
"""

on_request = pytest.mark.skipif(not machine._on_request(), reason="Linux gives huge pages to all here, or to nobody")


def start(folder, *command, tunables):
    """Runs PROGRAM; returns its process number and what it printed."""
    (folder / "program.py").write_text(PROGRAM)
    variables = os.environ | {machine.TUNABLES: tunables, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    process = subprocess.Popen([sys.executable, *command], env=variables, cwd=folder, stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    return process.pid, json.loads(printed)


@on_request
def test_a_program_starts_anew_as_the_same(tmp_path):
    """A restart keeps the process, arguments, Python's options, exit code and other glibc tunables."""
    arguments, before = ["two words", "-é", ""], "glibc.malloc.perturb=0"
    pid, found = start(tmp_path, "-X", "dev", "-m", "program", *arguments, tunables=before)
    tunables = f"{before}:glibc.malloc.hugetlb=1"
    assert found == {"pid": pid, "arguments": arguments, "tunables": tunables, "mark": True, "dev": True}


@pytest.mark.parametrize(
    ("command", "tunables"),
    [
        (["-m", "program"], "glibc.malloc.hugetlb=0"),  # the user has decided
        (["-X", "huge_pages", "-m", "program"], ""),  # restarted already, by something that drops variables
        (["program.py"], ""),  # not started with -m
    ],
)
def test_a_program_does_not_start_anew(tmp_path, command, tunables):
    pid, found = start(tmp_path, *command, tunables=tunables)
    assert (found["pid"], found["tunables"]) == (pid, tunables)


@on_request
def test_it_goes_on_where_it_cannot_start_anew(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "program"])
    monkeypatch.setattr(sys, "executable", "")
    monkeypatch.delenv(machine.TUNABLES, raising=False)
    machine.use_huge_pages()
    assert not os.environ[machine.TUNABLES]
    assert "the system's pages" in machine.describe_machine()


@pytest.mark.parametrize("named", [None, "", "elsewhere"])
def test_even_small_programs_are_kept_where_the_user_wants_them(named, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "home")
    if named is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = named and str(tmp_path / named)
    subprocess.run([sys.executable, "-c", COMPILING], env=environment, check=True)
    kept = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*-cache")}
    assert kept == {None: {"home"}, "": set(), "elsewhere": {"elsewhere"}}[named]
