"""A families file: which tasks make a family, and what the experts' recipe will need.

families:                            # families.yml; any names, each of one task or several
  mathematics: [gsm8k, sums]
  code: programs
tasks: tasks.yml                     # of `evaluate`; relative to this file
experts: [mathematics, code]         # families whose best models enter; these two by default
base: org/base                       # what experts of one architecture were trained from
dataset: problems.jsonl              # what experts of several architectures are fused on
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_unconstrained import compat
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.parents import Parent, read_parent
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.evaluation.settings import load_tasks
from mergekit_unconstrained.fusion.plan import check_dataset
from mergekit_unconstrained.jobs.mixture import mergeable

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
    # for their names: scoring asks for leave to run code
    known = [task.name for task in load_tasks(tasks_file, allow_code=True)]
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
    named = data.get("experts") or usual
    experts = (named,) if isinstance(named, str) else tuple(named)
    for name in experts:
        if name not in families:
            document.fail(("experts",), f"no family {name!r}. {suggest(name, families)}")
    return Families(document, families, experts, tasks_file, data.get("base"), data.get("dataset"))


def check_needs(families: Families, models: Sequence[str]) -> None:
    """RecipeError when a pair of the candidates would need a `base` or `dataset` that is missing.

    ModelError when a candidate cannot be read.
    """
    parents = {m: read_parent(compat.ModelReference.parse(m)) for m in models}
    groups = grouped(parents)
    if len(families.experts) < 2:
        return
    several = [group for group in groups if len(group) > 1]
    if several and not families.base:
        families.document.fail(
            (),
            f"{several[0][0]} and {several[0][1]} are of one architecture, and merged by weights "
            "when both are picked: name the `base` they come from",
        )
    if several and families.base:
        base = read_parent(compat.ModelReference.parse(families.base))
        if not any(mergeable(parents[group[0]], base) for group in several):
            families.document.fail(
                ("base",), f"{families.base} is not the base of {', '.join(several[0])}"
            )
    if len(groups) > 1 and not families.dataset:
        families.document.fail(
            (),
            f"{groups[0][0]} and {groups[1][0]} differ in architecture, and are fused when both "
            "are picked: name a `dataset` to train on",
        )
    if len(groups) > 1 and families.dataset:
        check_dataset(families.dataset, families.document)


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
