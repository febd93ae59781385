"""Writes figures to files. Names from users, such as classes and folders, are drawn literally."""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import matplotlib
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter, PercentFormatter

matplotlib.use("Agg")  # files only; no window system is needed

MARK = "\u200b"  # before a label: matplotlib leaves labels that begin with _ out of legends
REPLACEMENT = "\u25a1"  # for a character that no font has


def label(name: str) -> str:
    """A name as a label that legends show; for figures that `save` writes."""
    return f"{MARK}{name}" if name.startswith("_") else name


def panels(
    count: int, most_wide: int, width: float, height: float, margin: float = 0, **shared: bool
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels with grids, in rows of up to `most_wide`.

    Args:
      width, height: of a panel, in inches.
      margin: height beside that of the panels, in inches.
      shared: as for plt.subplots.
    """
    wide = min(most_wide, count)
    deep = -(-count // wide)
    size = (width * wide, margin + height * deep)
    figure, axes = plt.subplots(deep, wide, figsize=size, layout="constrained", squeeze=False, **shared)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    for axis in axes.flat[:count]:
        axis.grid(alpha=0.3)
    return figure, list(axes.flat[:count])


def in_percent(axis: Axes) -> None:
    """Labels the y axis, which shows shares, in percent."""
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def save(figure: Figure, target: Path | BinaryIO, format: str | None = None) -> None:
    """Writes a figure and closes it.

    A $ in a text is drawn literally, except in the numbers of an axis. A character that the usual font lacks is taken
    from another installed font; if there is none, it is replaced and a note is printed, once for each character.
    """
    numbers = {text for axis in figure.axes for text in _numbers(axis)}
    undrawn: set[str] = set()
    for text in figure.findobj(Text):
        if text in numbers:
            continue
        text.set_parse_math(False)
        content = text.get_text().replace(MARK, "")
        if not content.isascii() or not content.replace("\n", "").isprintable():
            fonts, missing = fonts_for(frozenset(content) - {"\n"})
            text.set_fontfamily(fonts)
            undrawn |= missing
            content = "".join(REPLACEMENT if character in missing else character for character in content)
        text.set_text(content)
    _note(undrawn)
    figure.savefig(target, format=format, dpi=110)
    plt.close(figure)


def _numbers(axis: plt.Axes) -> Iterable[Text]:
    """The tick labels that matplotlib has chosen; powers of ten are formulas."""
    for direction in (axis.xaxis, axis.yaxis):
        if not isinstance(
            direction.get_major_formatter(), FixedFormatter | FuncFormatter
        ):  # these two hold given texts
            yield from direction.get_ticklabels(which="both")
            yield direction.get_offset_text()


@functools.cache
def fonts_for(characters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """The families of fonts that draw these characters, the usual one first, and the characters that none has."""
    usual = font_manager.FontProperties().get_family()
    families, missing = list(usual), characters - _drawn_by(font_manager.findfont("DejaVu Sans"))
    if missing:
        for font in font_manager.fontManager.ttflist:
            # The last-resort font that matplotlib brings has a box for every character.
            if not font.name.startswith("Last Resort") and missing & (found := _drawn_by(font.fname)):
                families.append(font.name)
                missing -= found
    return families, missing


@functools.cache
def _drawn_by(file: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):  # a font that is damaged or gone
        return frozenset()


_noted: set[str] = set()


def _note(missing: set[str]) -> None:
    new = sorted(missing - _noted)
    _noted.update(new)
    visible = "".join(character for character in new if unicodedata.category(character)[0] != "C")
    if visible:
        shown = visible if len(visible) <= 20 else f"{visible[:20]}…"
        print(f"note: no installed font has {shown}: drawn as {REPLACEMENT} in plots", file=sys.stderr)
