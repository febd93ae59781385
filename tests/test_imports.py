"""The contracts of pyproject.toml hold: which part of the project may import which."""

import subprocess
import sys
from pathlib import Path


def test_contracts():
    """In a process of its own: import-linter's console keeps the standard output that it meets first."""
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
