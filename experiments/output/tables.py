"""Numbers as text, and tables of them for a terminal."""

from __future__ import annotations

Cell = float | str | tuple[float, float]  # a number, a word, or quartiles


def as_text(cell: Cell) -> str:
    """A cell with about three significant digits: 0.05, 1.06, 15.3, 405, 1,234.

    >>> [as_text(cell) for cell in (0.049, 1.0649, 15.26, 404.6, 1234.5, (14.0, 130.2), "no")]
    ['0.05', '1.06', '15.3', '405', '1,234', '14.0-130', 'no']
    """
    if isinstance(cell, str):
        return cell
    if isinstance(cell, tuple):
        return "-".join(map(as_text, cell))
    decimals = 0 if abs(cell) >= 99.95 or isinstance(cell, int) else 1 if abs(cell) >= 9.995 else 2
    return f"{cell:,.{decimals}f}"


def print_table(rows: dict[str, dict[str, Cell]]) -> None:
    """Prints aligned rows; a row may lack some columns."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["", *columns]]
    lines += [[name, *(as_text(row.get(column, "")) for column in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("   ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip(), flush=True)
