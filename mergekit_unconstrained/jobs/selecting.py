"""`select`: rank candidates by family of tasks, pick the experts, write the recipe to merge them.

The paper's evaluator (arXiv 2410.13699) ranks models on text, mathematics, code and tool-augmented
mathematics, and lets the best mathematics expert and the best code expert in. Ours: the mean over a
family's tasks as its score; the pivot is the picked expert with the best mean over all families; an
expert that is the best of several families enters once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_unconstrained import compat
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.parents import Parent, read_parent
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.errors import OutputError, RecipeError
from mergekit_unconstrained.evaluation.records import Split
from mergekit_unconstrained.evaluation.run import Results
from mergekit_unconstrained.evaluation.settings import load_tasks
from mergekit_unconstrained.evaluation.statistics import Mean
from mergekit_unconstrained.jobs.evaluating import evaluate_models
from mergekit_unconstrained.jobs.mixture import mergeable
from mergekit_unconstrained.present import selection as display

KEYS = ("families", "tasks", "experts", "base", "dataset")
USUAL_EXPERTS = ("mathematics", "code")
"""Families whose best models enter, where the file does not say: the paper's."""


@dataclass(frozen=True)
class Families:
    """A families file.

    families: name -> its tasks. experts: the families whose best models enter. base: what the
    experts of one architecture were trained from. dataset: what a fusion trains on.
    """

    document: Document
    families: Mapping[str, tuple[str, ...]]
    experts: tuple[str, ...]
    tasks_file: Path
    base: str | None
    dataset: str | None


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
    """Score the candidates, pick, print the table and write the recipe to `out`.

    options: of evaluate_models (cache, batch_size, dtype, device, limit, allow_code).
    """
    if out.exists():
        raise OutputError(f"{out} exists: name another file for the recipe, or remove it")
    families = read_families(families_file)
    results = evaluate_models(models, families.tasks_file, split=split, **options)
    scores = {r.model: family_scores(r, families.families) for r in results}
    picked = {f: best(scores, f) for f in families.experts}
    chosen = list(dict.fromkeys(picked.values()))
    pivot = max(chosen, key=lambda m: math.fsum(s.mean for s in scores[m].values()))
    recipe, command = write_recipe(families, chosen, pivot, out)
    found = Selection(scores, picked, pivot, recipe, command)
    display.print_selection(found, out)
    return found


def read_families(path: Path) -> Families:
    """A families file; RecipeError names the key and the nearest right word."""
    document = Document.read(path, "families file")
    data = document.data
    if not isinstance(data, dict) or "families" not in data or "tasks" not in data:
        document.fail((), "needs `families` (name -> tasks) and `tasks` (the path of a tasks file)")
    for key in data:
        if key not in KEYS:
            document.fail((key,), f"no such key. {suggest(key, KEYS)}")
    given = data["families"]
    if not isinstance(given, dict) or not given:
        document.fail(("families",), "maps every family to its tasks")
    tasks_file = path.parent / str(data["tasks"])
    known = [task.name for task in load_tasks(tasks_file)]
    families = {}
    for name, tasks in given.items():
        listed = (tasks,) if isinstance(tasks, str) else tuple(tasks or ())
        for task in listed:
            if task not in known:
                document.fail(("families", name), f"no task {task!r}. {suggest(task, known)}")
        if not listed:
            document.fail(("families", name), "names no task")
        families[str(name)] = listed
    usual = [f for f in USUAL_EXPERTS if f in families] or list(families)
    experts = tuple(data.get("experts") or usual)
    for name in experts:
        if name not in families:
            document.fail(("experts",), f"no family {name!r}. {suggest(name, families)}")
    return Families(document, families, experts, tasks_file, data.get("base"), data.get("dataset"))


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


# -- the recipe -----------------------------------------------------------------------------------


def write_recipe(
    families: Families, chosen: Sequence[str], pivot: str, out: Path
) -> tuple[str, str]:
    """A search where the experts agree in architecture, else a fusion or a mixture of both."""
    if len(chosen) == 1:
        raise RecipeError(
            f"{chosen[0]} is the best of every family that counts: there is nothing to merge it "
            "with. Name other `experts`, or more candidates"
        )
    parents = {m: read_parent(compat.ModelReference.parse(m)) for m in (pivot, *chosen)}
    groups = grouped(parents)
    if len(groups) == 1:
        data = _search(families, chosen, out)
        command = f"mergekit-unconstrained search {out} OUT"
    else:
        data = _fusion(families, groups, pivot)
        command = f"mergekit-yaml {out} OUT"
    text = yaml.safe_dump(data, sort_keys=False)
    with replacing(out) as stream:
        stream.write(text.encode())
    return text, command


def grouped(parents: Mapping[str, Parent]) -> list[list[str]]:
    """Models that can be merged tensor by tensor, together; the pivot's group first."""
    groups: list[list[str]] = []
    for name, parent in parents.items():
        for group in groups:
            if mergeable(parents[group[0]], parent):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _search(families: Families, chosen: Sequence[str], out: Path) -> dict[str, Any]:
    """A search file over the experts, with the tasks of the families that picked them."""
    wanted = [task for family in families.experts for task in families.families[family]]
    tasks = Document.read(families.tasks_file, "tasks file").data["tasks"]
    shift = families.tasks_file.parent
    return {
        "recipe": {
            "merge_method": "layerwise",
            "base_model": _base_of(families, chosen),
            "models": [{"model": m} for m in chosen],
            "parameters": {"operator": "ties"},
        },
        "tasks": {name: _moved(tasks[name], shift, out.parent) for name in dict.fromkeys(wanted)},
    }


def _moved(task: Mapping[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """A task whose relative files are found from another folder."""
    data = task.get("data")
    if data is None:
        return dict(task)
    files = {"test": data} if isinstance(data, str) else data
    resolved = {split: str((old / file).resolve()) for split, file in files.items()}
    home = new.resolve()
    shown = {
        split: str(Path(file).relative_to(home)) if Path(file).is_relative_to(home) else file
        for split, file in resolved.items()
    }
    return {**task, "data": shown}


def _fusion(families: Families, groups: list[list[str]], pivot: str) -> dict[str, Any]:
    """A recipe of `distribution_fusion`, or of `unconstrained` where some experts can be merged."""
    if not families.dataset:
        families.document.fail(
            (), "the experts differ in architecture and are fused: name a `dataset` to train on"
        )
    base_model = pivot
    models: list[dict[str, Any]] = []
    for group in groups:
        if len(group) == 1:
            models += [{"model": m} for m in group if m != pivot]
            continue
        base = _base_of(families, group)
        if pivot in group:
            base_model = base
            models += [{"model": m} for m in group]
        else:
            models += [{"model": m, "parameters": {"base": base}} for m in group]
    mixed = any(len(group) > 1 for group in groups)
    return {
        "merge_method": "unconstrained" if mixed else "distribution_fusion",
        "base_model": base_model,
        "models": models,
        "parameters": {"dataset": families.dataset},
    }


def _base_of(families: Families, group: Sequence[str]) -> str:
    """The base of a group of experts; RecipeError when it is not named, or another group's."""
    listed = ", ".join(group)
    if not families.base:
        families.document.fail(
            (), f"{listed} are merged by weights: name the `base` they come from"
        )
    first, base = (
        read_parent(compat.ModelReference.parse(name)) for name in (group[0], families.base)
    )
    if not mergeable(first, base):
        families.document.fail(("base",), f"{families.base} is not the base of {listed}")
    return families.base
