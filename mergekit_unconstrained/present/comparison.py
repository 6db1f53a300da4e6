"""What people see of a comparison: what will be compared, its progress, the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mergekit_unconstrained.compat import MergeMethod
from mergekit_unconstrained.hub.comparison import Comparison, cells, headings
from mergekit_unconstrained.present import console, duration
from mergekit_unconstrained.search.contenders import genome_for, tuned


def print_plan(plan: Any, methods: Sequence[MergeMethod]) -> None:
    """Methods with the numbers that will be tuned, and what it costs. plan: a SearchPlan."""
    given, layers = plan.settings.recipe, plan.merge.layers
    experts = ", ".join(e.name for e in plan.merge.experts)
    console.print(f"[bold]compare[/] {len(methods)} methods on {escape(experts)}", highlight=False)
    for method in methods:
        names = tuned(genome_for(method, given, layers))
        console.print(
            f"  {escape(method.spec.name)}: {escape(', '.join(names) or 'nothing to tune')}",
            highlight=False,
        )
    scored = [t for t in plan.tasks if "search" in t.splits() and t.weight > 0]
    examples = sum(len(t.examples("search")) for t in scored)
    console.print(
        f"  cost   {len(methods)} methods x {plan.settings.budget} candidates x at most "
        f"{examples} examples",
        highlight=False,
    )


def print_method(method: MergeMethod, index: int, count: int) -> None:
    """Which one it is at."""
    console.print(f"[bold]{escape(method.spec.name)}[/] ({index} of {count})", highlight=False)


def print_failure(method: MergeMethod, reason: str) -> None:
    """A method that cannot merge these models does not end a comparison."""
    console.print(f"  [yellow]failed[/] {escape(method.spec.name)}: {escape(reason)}")


def print_summary(found: Comparison, out: Path, seconds: float) -> None:
    """The table, and where it lies."""
    table = Table(box=SIMPLE_HEAD)
    for index, heading in enumerate(headings(found)):
        table.add_column(escape(heading), justify="left" if index < 2 else "right")
    for entry in found.ranked:
        table.add_row(*map(escape, cells(found, entry)))
    console.print(table, highlight=False)
    console.print(
        f"wrote {escape(str(out))}/compare.md, .json, .png and scores.csv in {duration(seconds)}",
        highlight=False,
        soft_wrap=True,
    )
