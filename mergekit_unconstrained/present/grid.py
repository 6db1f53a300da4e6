"""A table of numbers that fits the terminal: names are folded, numbers are never cut.

Where the columns do not fit side by side, rows and columns change places; where that does not fit
either, every number has a line of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

_NAME = 16
"""Characters that the names of rows keep at least."""
_AROUND = 3
"""Of a column: a border and a space on both sides."""


def grid(
    title: str,
    corner: str,
    rows: Sequence[str],
    columns: Mapping[str, str],
    cells: Mapping[tuple[str, str], Text],
    width: int,
) -> Table:
    """A table for so many characters of width.

    corner: what the rows are. columns: name -> heading, which may have several lines. cells: by row
    and column.
    """
    headings = list(columns.values())
    sizes = [
        max(_size(heading), *(len(cells[row, name]) for row in rows))
        for name, heading in columns.items()
    ]
    if _least(rows, sizes) <= width:
        return _table(title, corner, rows, headings, sizes, width, _by_rows(rows, columns, cells))
    turned = [max(len(cells[row, name]) for name in columns) for row in rows]
    heads = [_line(heading) for heading in headings]
    if _least(heads, turned) <= width:
        lines = [[cells[row, name] for row in rows] for name in columns]
        return _table(title, "", heads, list(rows), turned, width, lines)
    return _list(title, corner, rows, columns, cells)


def _table(
    title: str,
    corner: str,
    rows: Sequence[str],
    headings: Sequence[str],
    sizes: Sequence[int],
    width: int,
    lines: Sequence[Sequence[Text]],
) -> Table:
    """sizes: of the columns but the first, which has what is left."""
    found = Table(title=Text(title), title_justify="left")
    left = width - 1 - sum(size + _AROUND for size in sizes) - _AROUND
    longest = max(_size(name) for name in (corner, *rows))
    found.add_column(Text(corner), overflow="fold", width=min(longest, left))
    for heading, size in zip(headings, sizes, strict=True):
        found.add_column(Text(heading), justify="right", overflow="fold", width=size)
    for row, line in zip(rows, lines, strict=True):
        found.add_row(Text(row), *line)
    return found


def _list(
    title: str,
    corner: str,
    rows: Sequence[str],
    columns: Mapping[str, str],
    cells: Mapping[tuple[str, str], Text],
) -> Table:
    """A line for every number; the numbers first, so that names alone are folded."""
    found = Table(title=Text(title), title_justify="left")
    found.add_column("", justify="right", no_wrap=True, min_width=max(map(len, cells.values())))
    found.add_column(Text(corner), overflow="fold")
    found.add_column("", overflow="fold")
    for row in rows:
        for name, heading in columns.items():
            found.add_row(cells[row, name], Text(row), Text(_line(heading)))
    return found


def _by_rows(
    rows: Sequence[str], columns: Mapping[str, str], cells: Mapping[tuple[str, str], Text]
) -> list[list[Text]]:
    return [[cells[row, name] for name in columns] for row in rows]


def _least(rows: Sequence[str], sizes: Sequence[int]) -> int:
    """Characters that a table needs when the names of its rows are folded."""
    name = min(_NAME, max(map(_size, rows)))
    return 1 + name + _AROUND + sum(size + _AROUND for size in sizes)


def _size(text: str) -> int:
    return max(map(len, text.split("\n")))


def _line(heading: str) -> str:
    return ", ".join(heading.split("\n"))
