"""Writes text, tables and pictures as Markdown, and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from experiments.output.figures import save

COLOURS = 128  # of a picture
WIDE = 900  # pixels; on a phone, letters in wider pictures would be too small
STYLESHEET = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 68rem;
       margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; } td { white-space: nowrap; } th { vertical-align: bottom; }
td:first-child { white-space: normal; min-width: 11rem; max-width: 20rem; }
@media (max-width: 40rem) { td { white-space: normal; min-width: 5rem; vertical-align: top; } }
tr + tr { border-top: 1px solid #e4e4e4; }
td strong { color: #fff; background: #b3261e; }
blockquote { font-size: 1.1rem; background: #f2f5fa; padding: .1rem 1rem; margin: 1rem 0;
             border-left: 4px solid #3465a4; }
summary { font-size: 1.1rem; font-weight: bold; padding: .6rem 0; cursor: pointer; overflow-wrap: anywhere; }
details { border-top: 1px solid #ccc; } p, li, h1 { overflow-wrap: anywhere; }
pre, code { font-size: .82rem; } pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
@media (max-width: 40rem) { img.wide { max-width: none; width: 46rem; } }
figcaption { font-size: .85rem; color: #555; }
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, and the name of its file beside the Markdown."""

    name: str
    caption: str
    data: bytes

    def __str__(self) -> str:
        """The picture in Markdown."""
        return f"![{self.caption}]({self.name})"

    @property
    def as_html(self) -> str:
        """The picture inside the page; on a narrow screen, a wide one scrolls sideways to keep letters legible."""
        text, data = html.escape(self.caption), base64.b64encode(self.data).decode()
        style = ' class="wide"' if Image.open(io.BytesIO(self.data)).width > WIDE else ""
        shown = f'<img{style} alt="{text}" src="data:image/png;base64,{data}">'
        return f'<figure><div class="scroll">{shown}</div><figcaption>{text}</figcaption></figure>'


Block = str | Picture  # a paragraph or a table in Markdown, or a picture
Sections = Mapping[str, Sequence[Block]]  # by heading


def picture(name: str, caption: str, figure: Figure) -> Picture:
    """The figure as a PNG of COLOURS colours, a quarter as large as with all of them; the figure is closed.

    The PNG's Description is a digest of its curves and maps, without bands, texts and colours. A copy whose digest
    differs is out of date.
    """
    drawn, file, said = io.BytesIO(), io.BytesIO(), PngInfo()
    said.add_text("Description", _digest(figure))
    save(figure, drawn, "png")
    # MAXCOVERAGE keeps rare colours.
    few = Image.open(drawn).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(file, "png", optimize=True, pnginfo=said)
    return Picture(f"{name}.png", caption, file.getvalue())


def _digest(figure: Figure) -> str:
    lines = [line.get_xydata() for axis in figure.axes for line in axis.lines]
    maps = [image.get_array() for axis in figure.axes for image in axis.images]
    values = [f"{value:.4g}" for drawn in (*lines, *maps) for value in np.ma.filled(drawn, np.nan).flat]
    return hashlib.sha256(" ".join(values).encode()).hexdigest()


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of rows {column: text}; the first row has all columns."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def anchor(heading: str) -> str:
    """The anchor of a section, as GitHub names it.

    >>> anchor("What was not run, and other remarks"), anchor("cars64_small")
    ('what-was-not-run-and-other-remarks', 'cars64_small')
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _text(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(str, blocks))


def _top(title: str, head: Sequence[Block], sections: Sections) -> str:
    links = "\n".join(f"- [{heading}](#{anchor(heading)})" for heading in sections)
    return f"# {title}\n\n{_text(head)}\n\n{links}"


def _pictures(head: Sequence[Block], sections: Sections) -> list[Picture]:
    return [block for blocks in (head, *sections.values()) for block in blocks if isinstance(block, Picture)]


def write_markdown(path: Path, title: str, head: Sequence[Block], sections: Sections) -> None:
    """Writes Markdown, and beside it the pictures that it shows; for the arguments see `write_html`."""
    for found in _pictures(head, sections):
        (path.parent / found.name).write_bytes(found.data)
    parts = [_top(title, head, sections), *(f"## {heading}\n\n{_text(blocks)}" for heading, blocks in sections.items())]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_html(path: Path, title: str, head: Sequence[Block], sections: Sections) -> None:
    """Writes the same as one page; HTML in the Markdown is escaped.

    Args:
      path: of the page.
      title: in plain text.
      head: always visible.
      sections: folded, and listed below the head.
    """
    pictures = {found.name: found for found in _pictures(head, sections)}
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(self: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        return pictures[tokens[index].attrs["src"]].as_html

    renderer.add_render_rule("image", image)
    renderer.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>")
    folded = [
        f'<details><summary>{html.escape(heading)}</summary><div id="{anchor(heading)}">'
        f"{renderer.render(_text(blocks))}</div></details>"
        for heading, blocks in sections.items()
    ]
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLESHEET}</style></head><body>"
        f"{renderer.render(_top(title, head, sections))}{''.join(folded)}</body></html>\n",
        encoding="utf-8",
    )
