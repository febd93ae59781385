"""Programs start at once: what --help imports, and what the whole of a quick program imports."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "matplotlib", "orbax", "grain", "tensorboardX"}
PROGRAM = """if True:
    import contextlib, importlib, io, sys
    name, *arguments = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        importlib.import_module(name).main(arguments)
    print(*sys.modules)
"""
HELP = ["experiments.bench.__main__", "experiments.parity.__main__", "experiments.describe"]


@pytest.mark.parametrize("command", [*(f"{name} --help" for name in HELP), "experiments.describe --arch resnet101"])
def test_nothing_heavy_is_imported(command):
    process = [sys.executable, "-c", PROGRAM, *command.split()]
    root = Path(__file__).parents[2]
    printed = subprocess.run(process, cwd=root, check=True, capture_output=True, text=True).stdout
    assert HEAVY.isdisjoint(printed.split())
    assert "jax" not in printed.split() or "--help" not in command
