"""Names files that get mistaken for weight files by their first bytes, and says what to do with them."""

from __future__ import annotations

import re
import string

__all__ = ["AGAIN", "first_sentence", "known"]

AGAIN = "copy or download it again"
_SIGNATURES = {  # the first bytes of other files that get mistaken for weight files
    b"": f"it is empty: {AGAIN}",
    b"version https://git-lfs": "it is a pointer of git-lfs: run `git lfs pull`",
    b"<!doctype": "it is a web page: download the file itself",
    b"<html": "it is a web page: download the file itself",
    b"\x93numpy": "it is a single array (.npy): expected {name: array}",
    b"\x1f\x8b": "it is compressed: gunzip it",
    b"bzh": "it is compressed: bunzip2 it",
    b"\xfd7zxz": "it is compressed: unxz it",
    b"7z\xbc\xaf": "it is a 7z archive: unpack it",
    b"rar!": "it is a RAR archive: unpack it",
    bytes(16): f"its first bytes are all zero: {AGAIN}",
}


def known(start: bytes) -> str | None:
    """What kind of file this is and what to do with it, if its first bytes show that it is no weight file."""
    seen = start.strip().lower()
    for signature, what in _SIGNATURES.items():
        if seen.startswith(signature) if signature else not start:
            return what
    if all(byte in string.printable.encode() for byte in start):
        return f"it is text: {AGAIN}"
    return None


def first_sentence(error: Exception) -> str:
    return re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
