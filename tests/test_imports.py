"""The project keeps the contracts in pyproject.toml, which say which part may import which."""

import subprocess
import sys
from pathlib import Path


def test_contracts():
    """import-linter runs in a process of its own, since its console keeps the first standard output that it sees."""
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
