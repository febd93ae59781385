"""What programs that run JAX on a CPU tell glibc's malloc."""

from __future__ import annotations

import ctypes
import os
import sys

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"  # 1: ask for huge pages for what malloc maps


def use_huge_pages() -> None:
    """Starts this program anew, under the same process number, with malloc's large blocks in huge pages.

    XLA:CPU allocates the temporary memory of a step (hundreds of MB) anew for each call, and glibc has the system map
    and zero its pages every time, which takes a tenth of a step of ResNet-101 in pages of 4 kB and much less in those
    of 2 MB. glibc reads its settings when a process starts and never again. To be called first of all; does nothing
    where the setting is there already or the system is not Linux, and other C libraries than glibc do not mind.
    """
    before = os.environ.get(TUNABLES, "")
    if not sys.platform.startswith("linux") or HUGE_PAGES in before:
        return
    os.environ[TUNABLES] = ":".join(filter(None, [before, f"{HUGE_PAGES}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back_freed_memory() -> None:
    """Returns to the system what malloc has kept for later: compiling takes more memory than steps do."""
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
