"""The machine that a program runs on: processor, devices, memory pages and the user's cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"  # 1: malloc asks for huge pages for large blocks
MARK = "huge_pages"  # Python's option -X huge_pages marks a program that has been restarted


class Unwritable(Exception):
    """The cache cannot be written: no permission, no space, no such folder."""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name; on Linux with its model number, since virtual machines shorten names."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            first = dict(map(str.strip, line.split(":", 1)) for line in file.read().split("\n\n")[0].splitlines())
        return f"{first['model name']} (family {first['cpu family']}, model {first['model']})"
    except (OSError, KeyError, ValueError):
        return platform.processor() or platform.machine()


def jax_device() -> dict[str, Any]:
    """The device that JAX uses, as JSON values; for a CPU also its name and cores, which affect the last digits."""
    import jax

    device = jax.devices()[0]
    found = {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}
    return found | {"cores": cores(), "processor": processor()} if device.platform == "cpu" else found


def numpy_device() -> dict[str, Any]:
    """The processor that NumPy uses, and its library for matrix products, as JSON values."""
    import numpy as np

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    kind = f"{blas.get('name')} {blas.get('version')}"
    return {"platform": "cpu", "kind": kind, "count": cores(), "processor": processor()}


def torch_device() -> dict[str, Any]:
    """The device that PyTorch uses, as JSON values."""
    import torch

    if torch.cuda.is_available():
        return {"platform": "cuda", "kind": torch.cuda.get_device_name(), "count": 1}
    kind = f"torch {torch.__version__}"
    return {"platform": "cpu", "kind": kind, "count": torch.get_num_threads(), "processor": processor()}


def use_huge_pages() -> None:
    """Restarts this program, with the same process ID, so that malloc puts large blocks into huge pages.

    XLA:CPU allocates the temporary memory of a step (hundreds of MB) for each call, and each time the system maps and
    zeroes its pages. This takes a tenth of a step of ResNet-101 with pages of 4 kB, and much less with pages of 2 MB.
    glibc (2.35 or later) reads this setting only when a process starts. Call this first in a program that `python -m`
    has started; it does nothing if the setting exists or Linux would ignore it.
    """
    before = os.environ.get(TUNABLES, "")
    if "-m" not in sys.orig_argv or MARK in sys._xoptions or HUGE_PAGES in before or not _on_request():
        return
    os.environ[TUNABLES] = ":".join(filter(None, [before, f"{HUGE_PAGES}=1"]))
    try:
        os.execv(sys.executable, [sys.executable, "-X", MARK, *sys.orig_argv[1:]])
    except (OSError, ValueError):  # no such executable: the program continues with small pages
        os.environ[TUNABLES] = before


def _on_request() -> bool:
    """Whether Linux gives huge pages on request ("madvise"), rather than "never" or "always"."""
    try:
        return "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def give_back_freed_memory() -> None:
    """Returns the freed memory that malloc keeps to the system, since compiling needs more memory than steps."""
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def use_compilation_cache() -> None:
    """Turns on JAX's compilation cache, in $JAX_COMPILATION_CACHE_DIR ("" turns it off) or the user's cache folder.

    Also caches programs that compile in less than a second, JAX's limit: a hundred of them run before the first step.
    """
    import jax

    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # JAX has read the variable
    try:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder(None) / "xla"))
    except Unwritable:
        return  # without a home folder there is no cache; everything else works


def cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    """The folder of all caches, which need not exist; raises Unwritable if the user has no home folder."""
    try:
        if cache_dir is not None:
            return Path(cache_dir).expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME", "")  # XDG's specification ignores relative paths
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "resnet-adabound"
    except RuntimeError as error:
        raise Unwritable(str(error)) from error


def describe_machine() -> str:
    """Describes processor, cores, pages of malloc's large blocks, and the versions of the frameworks in one line."""
    pages = "huge pages" if f"{HUGE_PAGES}=1" in os.environ.get(TUNABLES, "") else "the system's pages"
    packages = ("numpy", "jax", "torch", "torchvision")
    found = versions(packages)
    told = ", ".join(f"{name} {found[name]}" if name in found else f"no {name}" for name in packages)
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()}, {pages}; {told}"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
