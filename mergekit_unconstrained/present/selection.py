"""What people see of a selection: candidates x families, who was picked, what to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from mergekit_unconstrained import __version__
from mergekit_unconstrained.evaluation.statistics import Mean
from mergekit_unconstrained.present import console
from mergekit_unconstrained.present.grid import grid


def ranking(
    scores: Mapping[str, Mapping[str, Mean]],
    picked: Mapping[str, str],
    pivot: str,
    families: Mapping[str, Sequence[str]],
    split: str,
) -> dict[str, Any]:
    """Who is how good at which family, as JSON values. Arguments as in Selection and Families."""
    return {
        "mergekit_unconstrained": __version__,
        "split": split,
        "families": {name: list(tasks) for name, tasks in families.items()},
        "picked": dict(picked),
        "pivot": pivot,
        "models": {
            model: {
                family: {"mean": one.mean, "standard_error": one.error, "n": one.n}
                for family, one in own.items()
            }
            for model, own in scores.items()
        },
    }


def print_selection(found: Any, out: Path, saved: Path) -> None:
    """found: jobs.selecting.Selection. saved: where the ranking is."""
    families = list(next(iter(found.scores.values())))
    cells = {}
    for model, scores in found.scores.items():
        for family in families:
            text = f"{scores[family].mean:.3f} ± {scores[family].error:.3f}"
            style = "bold" if found.picked.get(family) == model else ""
            cells[model, family] = Text(text, style)
    title = "candidates by family, ± one standard error"
    headings = {family: family for family in families}
    console.print(grid(title, "model", list(found.scores), headings, cells, console.width))
    for family, model in found.picked.items():
        console.print(f"{family}: {model}", highlight=False, markup=False)
    console.print(f"pivot: {found.pivot}", highlight=False, markup=False)
    console.print(f"{saved} is this ranking", highlight=False, markup=False)
    console.print(
        f"{out} is written; run it with\n  {found.command}", highlight=False, markup=False
    )
