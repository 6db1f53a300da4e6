"""The recipe that merges the picked experts: a search, a fusion, or a mixture of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_unconstrained import compat
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.fusion_parameters import FUSION_PARAMETERS
from mergekit_unconstrained.config.parents import read_parent
from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.errors import OutputError, RecipeError
from mergekit_unconstrained.jobs.families import Families, grouped
from mergekit_unconstrained.jobs.mixture import mergeable

WRITTEN = ("epochs", "learning_rate", "lora_rank")
"""Parameters of a fusion that its recipe says, though they are the defaults."""


def write_recipe(
    families: Families, chosen: Sequence[str], pivot: str, out: Path
) -> tuple[str, str]:
    """A search where the experts agree in architecture, else a fusion or a mixture of both."""
    if len(chosen) == 1:
        raise RecipeError(
            f"{chosen[0]} is the best of every family that counts ({', '.join(families.experts)}): "
            f"there is nothing to merge it with. Name other families under `experts` in "
            f"{families.document.name} (there are {', '.join(families.families)}), or more "
            "candidates"
        )
    parents = {m: read_parent(compat.ModelReference.parse(m)) for m in (pivot, *chosen)}
    groups = grouped(parents)
    if len(groups) == 1:
        data, header = _search(families, chosen, out), ""
        command = f"mergekit-unconstrained search {out} OUT"
    else:
        data, header = _fusion(families, groups, pivot), _fusion_header()
        command = f"mergekit-yaml {out} OUT"
    text = header + yaml.safe_dump(data, sort_keys=False)
    write_text(out, text)
    return text, command


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; OutputError when it cannot be."""
    try:
        with replacing(path) as stream:
            stream.write(text.encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


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
    if task.get("kind") == "harness" and (old / str(task.get("task"))).is_file():
        return {**task, "task": str((old / task["task"]).resolve())}
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
        "parameters": {"dataset": families.dataset, **_training()},
    }


def _training() -> dict[str, Any]:
    """What a fusion trains by when nothing is said."""
    return {spec.name: spec.default for spec in FUSION_PARAMETERS if spec.name in WRITTEN}


def _fusion_header() -> str:
    """A comment on the numbers of the recipe: nobody has chosen them."""
    lines = [
        "# Written by `mergekit-unconstrained select`. How long and how fast to train was not "
        "chosen: these",
        "# are the defaults, to be changed here.",
    ]
    told = (spec for spec in FUSION_PARAMETERS if spec.name in WRITTEN)
    lines += (f"#   {spec.name}: {spec.description}" for spec in told)
    lines.append("# `mergekit-unconstrained fuse settings` lists all else; name such a file as")
    lines.append("# `settings`.")
    return "\n".join(lines) + "\n"


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
