"""What was compared, and as a table on the terminal."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.output.tables import print_table
from experiments.parity.checks import Growth, Profile
from experiments.parity.errors import Row, columns


@dataclasses.dataclass
class Report:
    """What was found.

    title: who is compared.
    machine: on which machine, with which versions.
    left_out: what was not compared, and why.
    tables: rows by title.
    profiles: errors along the network.
    growths: how trainings diverge.
    notes: how to read the tables.
    """

    title: str
    machine: str
    left_out: list[str]
    tables: dict[str, list[Row]] = dataclasses.field(default_factory=dict)
    profiles: list[Profile] = dataclasses.field(default_factory=list)
    growths: list[Growth] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.tables.values() for row in rows]

    @property
    def is_broken(self) -> bool:
        return any(row.verdict == "BROKEN" for row in self.rows)

    @property
    def conclusions(self) -> list[str]:
        """Notes, what was left out, and in the last line how many bounds hold."""
        verdicts = [row.verdict for row in self.rows if row.bound is not None]
        broken = verdicts.count("BROKEN")
        conclusion = f"{broken} of {len(verdicts)} bounds are BROKEN" if broken else f"all {len(verdicts)} bounds hold"
        return [*self.notes, *(f"left out: {what}" for what in self.left_out), conclusion]

    def as_json(self) -> dict[str, Any]:
        """The tables, row by row, and on which machine they came out."""
        tables = {title: [row._asdict() for row in rows] for title, rows in self.tables.items()}
        return {"title": self.title, "machine": self.machine, "tables": tables, "conclusions": self.conclusions}


def print_report(report: Report) -> None:
    """The tables, and what they say."""
    for title, rows in report.tables.items():
        print(f"\n{title}")
        print_table({row.name: columns(row) for row in rows})
    print("", *report.conclusions, sep="\n")
