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
    for at, name in enumerate(names):
        # Every word of a header is a line of its own; short cells stay whole.
        words = [*name.split("_"), *(row[at] for row in rows if len(row[at]) <= _WHOLE)]
        width = max(map(len, words))
        result.add_column("\n".join(name.split("_")), overflow="fold", min_width=width)
    for row in rows:
        result.add_row(*row)
    return result
