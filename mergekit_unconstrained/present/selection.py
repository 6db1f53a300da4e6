"""What people see of a selection: candidates x families, who was picked, what to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mergekit_unconstrained.present import console


def print_selection(found: Any, out: Path) -> None:
    """found: jobs.selecting.Selection."""
    families = list(next(iter(found.scores.values())))
    table = Table(title="candidates by family, ± one standard error", title_justify="left")
    table.add_column("model")
    for family in families:
        table.add_column(escape(family), justify="right")
    for model, scores in found.scores.items():
        cells = []
        for family in families:
            text = f"{scores[family].mean:.3f} ± {scores[family].error:.3f}"
            cells.append(f"[bold]{text}[/]" if found.picked.get(family) == model else text)
        table.add_row(escape(model), *cells)
    console.print(table)
    for family, model in found.picked.items():
        console.print(f"{family}: {model}", highlight=False, markup=False)
    console.print(f"pivot: {found.pivot}", highlight=False, markup=False)
    console.print(
        f"{out} is written; run it with\n  {found.command}", highlight=False, markup=False
    )
