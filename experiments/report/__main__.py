"""Writes the results of all studies as one page: `python -m experiments.report results/ --out DIR`."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.cli import exit_code, parse

if TYPE_CHECKING:
    from experiments.report.study_results import StudyResults

TITLE = "Is AdaBound better than Adam?"
ANSWER, NOTES = "answer.md", "notes.md"  # in the folder of all studies


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Write report.md, with its pictures beside it, and index.html, with them inside, from published files alone.

    With --readme, update the tables in Markdown files instead.
    """

    results: tyro.conf.Positional[Path]
    """The folder of one study, or a folder of several."""
    out: Path = Path("report")
    """The folder to write; files of the same names are replaced."""
    readme: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE...")] = ()
    """Update the tables in these Markdown files, each between <!-- table … --> and <!-- end of table -->."""


def run(settings: ReportSettings) -> None:
    """Writes the report, or the tables in Markdown files."""
    if settings.readme:
        from experiments.report.pages import write_pages

        changed = write_pages(settings.readme, settings.results)
        print("\n".join(f"wrote the tables of {page}" for page in changed) or "all tables are up to date")
        return
    from experiments.output.page import write_html, write_markdown
    from experiments.report.sections import overview, study_section, upper_bound_section
    from experiments.report.study_results import find_studies, read_study

    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"--out {settings.out} is a file")
    in_words = _paragraphs(settings.results / ANSWER)
    studies = in_order(" ".join(in_words), [read_study(folder) for folder in find_studies(settings.results)])
    sections = {"AdaBound's upper bound over Adam's step": list(upper_bound_section(studies))}
    sections |= {study.heading: list(study_section(study)) for study in studies}
    sections["What was not run, and other remarks"] = _paragraphs(settings.results / NOTES)
    sections = {heading: blocks for heading, blocks in sections.items() if blocks}
    settings.out.mkdir(parents=True, exist_ok=True)
    head = list(overview(studies, in_words))
    write_markdown(settings.out / "report.md", TITLE, head, sections)
    write_html(settings.out / "index.html", TITLE, head, sections)
    print(f"{settings.out / 'index.html'} and {settings.out / 'report.md'}: {', '.join(s.name for s in studies)}")


def in_order(text: str, studies: Sequence[StudyResults]) -> list[StudyResults]:
    """First the studies that the text names, in its order, then those that compare two contestants on several seeds.

    Larger studies come before smaller ones.
    """
    found = {study.name: re.search(rf"(?<![\w-]){re.escape(study.name)}(?![\w-])", text) for study in studies}
    places = {name: match.start() if match else len(text) for name, match in found.items()}
    return sorted(
        studies,
        key=lambda study: (places[study.name], not study.compared, study.seeds < 2, -study.pictures, study.name),
    )


def _paragraphs(path: Path) -> list[str]:
    """The paragraphs of a hand-written text; [] if there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(ReportSettings, arguments, "report")))


if __name__ == "__main__":
    sys.exit(main())
