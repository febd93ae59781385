"""A report as Markdown with pictures beside it, and as one page of HTML that is rendered from that Markdown."""

from __future__ import annotations

import dataclasses
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from PIL import Image

from experiments.output.page import figure_bytes, html_figure, write_html

COLOURS = 128  # of a picture


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, and the name of its file beside the Markdown."""

    name: str
    caption: str
    data: bytes


Block = str | Picture  # Markdown, or a picture in it


def picture(name: str, caption: str, figure: Figure) -> Picture:
    """The figure as a PNG of COLOURS colours, a quarter as large as with all of them; the figure is closed."""
    file = io.BytesIO()
    whole = Image.open(io.BytesIO(figure_bytes(figure, "png"))).convert("RGB")
    few = whole.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)  # keeps colours that are rare
    few.save(file, "png", optimize=True)
    return Picture(f"{name}.png", caption, file.getvalue())


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows {column: text}; the first row has all columns."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def anchor(heading: str) -> str:
    """The place of a section in the page, as GitHub calls it.

    >>> anchor("What was not run, and other remarks"), anchor("cars64_small")
    ('what-was-not-run-and-other-remarks', 'cars64_small')
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def write_report(folder: Path, title: str, head: Iterable[Block], sections: dict[str, Iterable[Block]]) -> None:
    """Writes report.md, the pictures that it shows, and index.html.

    Args:
      folder: to write into; made if it is not there.
      title: of the page, in plain text.
      head: what is always seen.
      sections: by heading; folded in index.html, and listed below the head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Picture] = {}

    def text_of(blocks: Iterable[Block]) -> str:
        parts = []
        for block in blocks:
            if isinstance(block, Picture):
                pictures[block.name] = block
                (folder / block.name).write_bytes(block.data)
                block = f"![{block.caption}]({block.name})"
            parts.append(block)
        return "\n\n".join(parts)

    links = "\n".join(f"- [{heading}](#{anchor(heading)})" for heading in sections)
    top = f"# {title}\n\n{text_of(head)}\n\n{links}"
    texts = {heading: text_of(blocks) for heading, blocks in sections.items()}
    markdown = "\n\n".join([top, *(f"## {heading}\n\n{text}" for heading, text in texts.items())])
    (folder / "report.md").write_text(markdown + "\n", encoding="utf-8")

    render = _renderer(pictures).render
    folded = [
        f'<details><summary>{html.escape(heading)}</summary><div id="{anchor(heading)}">{render(text)}</div></details>'
        for heading, text in texts.items()
    ]
    write_html(folder / "index.html", title, [render(top), *folded])


def _renderer(pictures: dict[str, Picture]) -> MarkdownIt:
    """Markdown to HTML with the pictures inside the page; HTML in the Markdown is shown, not obeyed."""
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(self: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        shown = pictures[tokens[index].attrs["src"]]
        return html_figure(shown.data, shown.caption, "png")

    renderer.add_render_rule("image", image)
    renderer.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>')
    renderer.add_render_rule("table_close", lambda *_: "</table></div>")
    return renderer
