"""Reads what `experiments.bench step --json` has written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_steps(folder: Path, pattern: str = "*.json") -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yields (machine, title of the table, contestant, row) from files of this benchmark; "seconds" has a row's times.

    Raises:
      ValueError: a file is not from experiments.bench. Files of its other benchmarks are left out.
    """
    for file in sorted(folder.glob(pattern)):
        try:
            bench = json.loads(file.read_text(encoding="utf-8"))
            if bench["benchmark"] != "step":
                continue
            machine = bench["machine"]
            rows = [
                (of_bench["title"], name, row | {"seconds": of_bench["seconds"].get(name)})
                for of_bench in bench["tables"]
                for name, row in of_bench["rows"].items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not what experiments.bench --json writes: {error!r}") from error
        for title, name, row in rows:
            yield machine, title, name, row
