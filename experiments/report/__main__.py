"""Writes what all studies have shown as one page: `python -m experiments.report results/ --out DIR`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

from experiments.cli import exit_code
from experiments.report.answer import answer
from experiments.report.blocks import Block, Heading, Text, write_report
from experiments.report.sections import speed_section, study_section
from experiments.report.study_results import find_studies, read_study

TITLE = "Is AdaBound better than Adam?"
ANSWER, NOTES, SPEED = "answer.md", "notes.md", "bench"  # in the folder of all studies


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Write index.html, with all pictures inside, and report.md, with them beside it, from published files alone."""

    results: tyro.conf.Positional[Path]
    """The folder of one study, or of several."""
    out: Path = Path("report")
    """The folder to write; files of the same names are replaced."""
    data: Path | None = None
    """Folder of Stanford Cars: shows pictures of classes that are taken for one another."""


def run(settings: ReportSettings) -> None:
    """Writes the report.

    Raises:
      ValueError, OSError: for bad input, with a message for the person who gave it.
    """
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"--out {settings.out} is a file")
    if settings.data is not None and not settings.data.is_dir():
        raise ValueError(f"--data {settings.data} is no folder")
    studies = [read_study(folder) for folder in find_studies(settings.results)]
    studies.sort(key=lambda study: not study.compared)  # those first that compare two; otherwise by name, as found
    in_words = _paragraphs(settings.results / ANSWER)
    blocks: list[Block] = [Text(text, answer=True) for text in in_words]
    blocks += [Text(text, answer=not in_words) for study in studies if (text := answer(study))]
    for study in studies:
        blocks += study_section(study, settings.data)
    blocks += speed_section(settings.results / SPEED)
    if notes := _paragraphs(settings.results / NOTES):
        blocks.append(Heading("What was not run, and what else is to be known"))
        blocks += [Text(text) for text in notes]
    write_report(settings.out, TITLE, blocks)
    print(f"{settings.out / 'index.html'} and {settings.out / 'report.md'}: {', '.join(s.name for s in studies)}")


def _paragraphs(path: Path) -> list[str]:
    """Of a text that was written by hand; [] where there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    settings = tyro.cli(ReportSettings, args=arguments, prog="python -m experiments.report")
    return exit_code(lambda: run(settings))


if __name__ == "__main__":
    sys.exit(main())
