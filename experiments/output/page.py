"""One page that needs nothing else: tables, and pictures inside it as data."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from experiments.output.figures import save

WIDE = 900  # pixels of a picture with letters that a phone's width would make too small
STYLESHEET = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 68rem;
       margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; } td { white-space: nowrap; } th { vertical-align: bottom; }
@media (max-width: 40rem) { td { white-space: normal; min-width: 5rem; vertical-align: top; } }
tr + tr { border-top: 1px solid #e4e4e4; }
.ok { color: #19692c; } .BROKEN { color: #fff; background: #b3261e; font-weight: bold; }
blockquote { font-size: 1.1rem; background: #f2f5fa; padding: .1rem 1rem; margin: 1rem 0;
             border-left: 4px solid #3465a4; }
summary { font-size: 1.1rem; font-weight: bold; padding: .6rem 0; cursor: pointer; overflow-wrap: anywhere; }
details { border-top: 1px solid #ccc; } p, li, h1 { overflow-wrap: anywhere; }
pre, code { font-size: .82rem; } pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
@media (max-width: 40rem) { img.wide { max-width: none; width: 46rem; } }
figcaption { font-size: .85rem; color: #555; }
"""


def write_html(path: Path, title: str, parts: Iterable[str]) -> None:
    """Writes a page of HTML; title is plain text, parts are HTML."""
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLESHEET}</style></head><body>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )


def html_table(rows: Sequence[Mapping[str, str]], classes: Mapping[str, str] | None = None) -> str:
    """A table of plain text; the columns are the first row's.

    Args:
      rows: {column: text}.
      classes: {text: the CSS class of a cell with that text}.
    """
    columns = list(rows[0])
    lines = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in columns) + "</tr>"]
    for row in rows:
        cells = []
        for name in columns:
            text = row.get(name, "")
            style = f' class="{classes[text]}"' if classes and text in classes else ""
            cells.append(f"<td{style}>{html.escape(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def figure_bytes(figure: Figure, format: Literal["svg", "png"]) -> bytes:
    """The picture's file; the figure is closed."""
    file = io.BytesIO()
    save(figure, file, format)
    return file.getvalue()


def html_figure(picture: bytes, caption: str, kind: Literal["svg+xml", "png"] = "svg+xml") -> str:
    """A picture inside the page; a wide PNG is moved sideways on a narrow screen, for its letters to be read."""
    text, data = html.escape(caption), base64.b64encode(picture).decode()
    pixels = int.from_bytes(picture[16:20], "big") if kind == "png" else 0  # the header's width
    style = ' class="wide"' if pixels > WIDE else ""
    picture_html = f'<img{style} alt="{text}" src="data:image/{kind};base64,{data}">'
    return f'<figure><div class="scroll">{picture_html}</div><figcaption>{text}</figcaption></figure>'
