"""Fixtures for real data, threads and memory. The repository holds no real data: tests that need it skip without it."""

import ctypes
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config):
    """Shares compiled programs among all tests, workers and subprocesses: many train the same tiny network."""
    if not hasattr(config, "workerinput"):
        config.compiled = tempfile.mkdtemp(prefix="compiled-by-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.compiled, ignore_errors=True)


def folder_or_skip(name: str) -> Path:
    directory = SHARED_DATA / name
    if not directory.is_dir():
        pytest.skip(f"needs the real data in {directory}")
    return directory


@pytest.fixture(scope="session")
def stanford_cars_dir() -> Path:
    """Stanford Cars by class: 8,144 + 8,041 crops of 128x128."""
    return folder_or_skip("stanford_cars")


@pytest.fixture(scope="session")
def devkit_dir() -> Path:
    """The .mat files of the devkit."""
    return folder_or_skip("devkit")


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """MNIST's four idx files, .gz: 60,000 + 10,000 digits of 28x28."""
    return folder_or_skip("mnist")


@pytest.fixture(scope="session")
def photos_dir() -> Path:
    """Six photographs of ImageNet with their class in the file's name; one of them is grey."""
    return folder_or_skip("photos")


@pytest.fixture(scope="module")
def one_thread():
    """Limits torch to one thread: in small problems on shared cores, its threads mostly wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def narrow(monkeypatch):
    """NumPy's networks of full depth with few channels, which are cheap."""
    monkeypatch.setattr("numpy_ref.config.STAGE_WIDTHS", (4, 4, 8, 8))


@pytest.fixture
def x64():
    """JAX with 64-bit types, for this test only."""
    with jax.enable_x64(True):
        yield


def give_memory_back():
    jax.clear_caches()
    gc.collect()
    if sys.platform.startswith("linux"):
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)


@pytest.fixture(autouse=True)
def memory_given_back(request):
    """Frees memory after slow tests: each may compile a deep network, and a worker that keeps them all takes 10 GB."""
    yield
    if request.node.get_closest_marker("slow"):
        give_memory_back()


@pytest.fixture(autouse=True, scope="module")
def memory_given_back_after_a_file():
    """Frees the compiled programs in memory after each file: otherwise two workers take 13 GB."""
    yield
    give_memory_back()
