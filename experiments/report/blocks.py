"""What a report is made of, and its two forms: one page of HTML with the pictures inside, and Markdown beside them."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

from experiments.output.page import html_figure, html_table, write_html


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; `answer` is set off."""

    text: str
    answer: bool = False


@dataclasses.dataclass(frozen=True)
class Command:
    """What to type."""

    text: str


@dataclasses.dataclass(frozen=True)
class TextTable:
    """Rows {column: text}; the first row has all columns."""

    rows: Sequence[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG; name is that of its file beside the Markdown."""

    name: str
    caption: str
    data: bytes


Block = Heading | Text | Command | TextTable | Picture


def write_report(folder: Path, title: str, blocks: Sequence[Block]) -> None:
    """Writes index.html, report.md and the pictures that the latter shows."""
    folder.mkdir(parents=True, exist_ok=True)
    write_html(folder / "index.html", title, [f"<h1>{html.escape(title)}</h1>", *map(as_html, blocks)])
    for block in blocks:
        if isinstance(block, Picture):
            (folder / block.name).write_bytes(block.data)
    text = "\n\n".join([f"# {title}", *map(as_markdown, blocks)])
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")


def as_html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text, answer):
            style = ' class="answer"' if answer else ""
            return f"<p{style}>{html.escape(text)}</p>"
        case Command(text):
            return f"<pre>{html.escape(text)}</pre>"
        case TextTable(rows):
            return html_table(rows)
        case Picture(_, caption, data):
            return html_figure(data, caption, "png")


def as_markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text, answer):
            return f"**{text}**" if answer else text
        case Command(text):
            return f"```\n{text}\n```"
        case TextTable(rows):
            columns = list(rows[0])
            lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        case Picture(name, caption, _):
            return f"![{caption}]({name})"
