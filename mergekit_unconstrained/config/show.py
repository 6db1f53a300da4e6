"""Coefficients in a terminal: a table for every expert, layers down, kinds of tensor across."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mergekit_unconstrained.config.grid import Cell, ExpertGrid, Grid


def print_grid(grid: Grid, console: Console) -> None:
    """Print every expert's weights, and densities where any is not 1.

    Equal layers that follow each other share a line. `~` marks the mean of tensors that differ, `·`
    a place without a tensor.
    """
    for name, expert in grid.experts.items():
        for quantity in ("weight", "density") if grid.has_densities else ("weight",):
            console.print(Text(f"{name}: {quantity}", style="bold"))
            if grid.kinds:
                console.print(_table(grid, expert, quantity))
            outer = [
                f"{kind} {_text(expert.outer.get(kind), quantity)}" for kind in grid.outer_kinds
            ]
            if outer:
                console.print(Text(", ".join(outer)))
            console.print()


def _table(grid: Grid, expert: ExpertGrid, quantity: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    for kind in grid.kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    runs: list[tuple[int, int, list[str]]] = []
    for n in range(grid.layers):
        row = [_text(expert.inner.get((n, kind)), quantity) for kind in grid.kinds]
        if runs and runs[-1][2] == row:
            runs[-1] = (runs[-1][0], n, row)
        else:
            runs.append((n, n, row))
    for first, last, row in runs:
        table.add_row(str(first) if first == last else f"{first}-{last}", *row)
    return table


def _text(cell: Cell | None, quantity: str) -> str:
    number = None if cell is None else cell.weight if quantity == "weight" else cell.density
    if cell is None or number is None:
        return "·"
    return f"{'~' if quantity in cell.mixed else ''}{number:.2f}"
