"""XLA's persistent compilation cache: what was compiled once is read at the next start."""

from __future__ import annotations

import os

import jax

from experiments.data.cache import Unwritable, cache_folder


def use_compilation_cache() -> None:
    """Turns the cache on, in the user's cache folder; $JAX_COMPILATION_CACHE_DIR names another, "" turns it off.

    It keeps what was compiled within JAX's limit of a second too: a hundred small programs come before the first step.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # JAX has read it
    try:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder(None) / "xla"))
    except Unwritable:
        return  # without a home there is no cache, and all else works
