"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

_WHOLE = 12  # characters of a cell that are not broken


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table that fits the terminal: what is too long is broken into lines, not cut.

    Args:
        names: of the columns.
        rows: their cells.
    """
    result = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name, width in zip(names, _widths(names, rows), strict=True):
        result.add_column("\n".join(name.split("_")), overflow="fold", min_width=width)
    for row in rows:
        result.add_row(*row)
    return result


def tables(
    names: Sequence[str], rows: Sequence[Sequence[str]], width: int, keys: int
) -> list[Table]:
    """As many tables below one another as it takes to fit all columns.

    Args:
        names: of the columns.
        rows: their cells.
        width: of the terminal, in characters.
        keys: how many leading columns name a row; each table begins with them.

    >>> columns = ["run", "first", "second", "third"]
    >>> found = tables(columns, [["a", "1", "2", "3"]], width=20, keys=1)
    >>> [[column.header for column in one.columns] for one in found]
    [['run', 'first', 'second'], ['run', 'third']]
    """
    widths = [own + 1 for own in _widths(names, rows)]  # with the space between columns
    parts: list[list[int]] = [[]]
    for at in range(keys, len(names)):
        taken = sum(widths[:keys]) + sum(widths[column] for column in parts[-1])
        if parts[-1] and taken + widths[at] - 1 > width:
            parts.append([])
        parts[-1].append(at)
    chosen = [[*range(keys), *part] for part in parts]
    return [
        table([names[at] for at in part], [[row[at] for at in part] for row in rows])
        for part in chosen
    ]


def _widths(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """How wide a column is at least: every word of its header, every short cell stays whole."""
    return [
        max(map(len, [*name.split("_"), *(row[at] for row in rows if len(row[at]) <= _WHOLE)]))
        for at, name in enumerate(names)
    ]
