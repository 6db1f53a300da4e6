"""`select`: rank candidates by family of tasks, pick the experts, write the recipe to merge them.

OUT.yml is the recipe, OUT.scores.json the ranking it came from.

The paper's evaluator (arXiv 2410.13699) ranks models on text, mathematics, code and tool-augmented
mathematics, and lets the best mathematics expert and the best code expert in. Ours: the mean over a
family's tasks as its score; the pivot is the picked expert with the best mean over all families; an
expert that is the best of several families enters once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_unconstrained.errors import OutputError
from mergekit_unconstrained.evaluation.records import Split
from mergekit_unconstrained.evaluation.run import Results
from mergekit_unconstrained.evaluation.statistics import Mean
from mergekit_unconstrained.jobs.evaluating import evaluate_models
from mergekit_unconstrained.jobs.families import check_needs, read_families
from mergekit_unconstrained.jobs.selected_recipe import write_recipe, write_text
from mergekit_unconstrained.present import selection as display


@dataclass(frozen=True)
class Selection:
    """What was picked. picked: family -> model. recipe: text, and the command that runs it."""

    scores: Mapping[str, Mapping[str, Mean]]
    picked: Mapping[str, str]
    pivot: str
    recipe: str
    command: str


def select(
    models: Sequence[str],
    families_file: Path,
    out: Path,
    *,
    split: Split = "development",
    **options: Any,
) -> Selection:
    """Score the candidates, pick, print the table, write the ranking and the recipe to `out`.

    options: of evaluate_models (cache, batch_size, dtype, device, limit, allow_code). What the file
    lacks for a recipe of some of the candidates is told before the first one is scored.
    """
    if out.exists():
        raise OutputError(f"{out} exists: name another file for the recipe, or remove it")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"there is no folder for {out}: make it, or name another file")
    families = read_families(families_file)
    check_needs(families, models)
    results = evaluate_models(models, families.tasks_file, split=split, **options)
    scores = {r.model: family_scores(r, families.families) for r in results}
    picked = {f: best(scores, f) for f in families.experts}
    chosen = list(dict.fromkeys(picked.values()))
    pivot = max(chosen, key=lambda m: math.fsum(s.mean for s in scores[m].values()))
    ranking = out.with_suffix(".scores.json")
    written = display.ranking(scores, picked, pivot, families.families, split)
    write_text(ranking, json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    recipe, command = write_recipe(families, chosen, pivot, out)
    found = Selection(scores, picked, pivot, recipe, command)
    display.print_selection(found, out, ranking)
    return found


def family_scores(results: Results, families: Mapping[str, Sequence[str]]) -> dict[str, Mean]:
    """The mean over each family's tasks; the error of a mean of independent means."""
    found = {}
    for family, tasks in families.items():
        parts = [results[task].score for task in tasks]
        mean = math.fsum(p.mean for p in parts) / len(parts)
        error = math.sqrt(math.fsum(p.error**2 for p in parts)) / len(parts)
        found[family] = Mean(mean, error, sum(p.n for p in parts))
    return found


def best(scores: Mapping[str, Mapping[str, Mean]], family: str) -> str:
    """The model with the highest score of a family, the first of equal ones."""
    return max(scores, key=lambda model: scores[model][family].mean)
