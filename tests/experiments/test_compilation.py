"""experiments.machine, in processes of their own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
from experiments.machine import use_compilation_cache
use_compilation_cache()
jax.jit(lambda x: x + 1)(1.0)
"""


@pytest.mark.parametrize("named", [None, "", "elsewhere"])
def test_even_small_programs_are_kept_where_the_user_wants_them(named, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "home")
    if named is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = named and str(tmp_path / named)
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)
    kept = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*-cache")}
    assert kept == {None: {"home"}, "": set(), "elsewhere": {"elsewhere"}}[named]
