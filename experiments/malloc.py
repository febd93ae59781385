"""What programs that run JAX on a CPU tell glibc's malloc."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"  # 1: ask for huge pages for what malloc maps
MARK = "huge_pages"  # an option of Python's own, -X huge_pages, that says: started anew, do not do so again


def use_huge_pages() -> None:
    """Starts this program anew, under the same process number, with malloc's large blocks in huge pages.

    XLA:CPU allocates the temporary memory of a step (hundreds of MB) anew for each call, and glibc has the system map
    and zero its pages every time, which takes a tenth of a step of ResNet-101 in pages of 4 kB and much less in those
    of 2 MB. glibc (from 2.35) reads its settings when a process starts and never again. To be called first of all, by a
    program that `python -m` has started; does nothing where the setting has been made or Linux would not heed it.
    """
    before = os.environ.get(TUNABLES, "")
    if "-m" not in sys.orig_argv or MARK in sys._xoptions or HUGE_PAGES in before or not _on_request():
        return
    os.environ[TUNABLES] = ":".join(filter(None, [before, f"{HUGE_PAGES}=1"]))
    try:
        os.execv(sys.executable, [sys.executable, "-X", MARK, *sys.orig_argv[1:]])
    except (OSError, ValueError):  # there is no such executable: it goes on in small pages
        os.environ[TUNABLES] = before


def _on_request() -> bool:
    """Whether Linux gives huge pages to who asks: not in its settings "never" and "always"."""
    try:
        return "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def describe_pages() -> str:
    """For the description of a machine: the pages that malloc's large blocks are in."""
    return "huge pages" if f"{HUGE_PAGES}=1" in os.environ.get(TUNABLES, "") else "the system's pages"


def give_back_freed_memory() -> None:
    """Returns to the system what malloc has kept for later: compiling takes more memory than steps do."""
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
