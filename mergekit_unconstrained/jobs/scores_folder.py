"""The folder that `evaluate --out` writes: whose it is, before anything is put into it.

Scores of one command only: a table that mixed models or tasks of two would compare what cannot be
compared. A killed run leaves scores of some of its models, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_unconstrained.errors import OutputError
from mergekit_unconstrained.evaluation.records import Split
from mergekit_unconstrained.evaluation.run import wanted
from mergekit_unconstrained.evaluation.task import Task

SCORES = "scores.json"
MADE_BY = "mergekit_unconstrained"


def asked(tasks: Sequence[Task], split: Split, limit: int | None) -> dict[str, Any]:
    """What scores.json says of the question, for the next command to compare with its own.

    keys: of every task, a hash of its settings and of the examples that are asked.
    """
    keys = {}
    for task in tasks:
        content = [task.key, *(example.digest for example in wanted(task, split, limit))]
        keys[task.name] = hashlib.sha256(" ".join(content).encode()).hexdigest()
    return {"split": split, "limit": limit, "keys": keys}


def prepare(
    folder: Path, models: Sequence[str], question: Mapping[str, Any], overwrite: bool
) -> None:
    """Make the folder, or see that it is an earlier one of the same question; else OutputError.

    question: of `asked`. overwrite: drop the scores that another command left there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"the folder {str(folder)!r} cannot be made: {error.strerror}") from error
    if not there:
        return
    earlier = _read(folder)
    other = _difference(earlier, models, question)
    if other and not overwrite:
        raise OutputError(
            f"{folder} holds scores of {other}: name another folder, or drop them with --overwrite"
        )
    if other:
        _drop(folder)


def _read(folder: Path) -> dict[str, Any]:
    """scores.json; OutputError when the folder is none of ours."""
    try:
        found = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or MADE_BY not in found:
        raise OutputError(
            f"{folder} is not empty, and no earlier output of `evaluate` (it has no {SCORES} of "
            "one): name another folder"
        )
    return found


def _difference(
    earlier: Mapping[str, Any], models: Sequence[str], question: Mapping[str, Any]
) -> str:
    """What the earlier scores are of and the new ones are not; "" when they belong together."""
    others = [model for model in earlier.get("models", {}) if model not in models]
    if others:
        return f"another model, {others[0]}"
    if earlier.get("split") != question["split"]:
        return f"the {earlier.get('split')} split"
    if earlier.get("limit") != question["limit"]:
        return f"--limit {earlier.get('limit') or 'none'}"
    keys = earlier.get("keys", {})
    if list(keys) != list(question["keys"]):
        return f"other tasks, {', '.join(keys) or 'not named'}"
    changed = [name for name, key in keys.items() if key != question["keys"][name]]
    if changed:
        return f"the task {changed[0]} with other settings or examples"
    return ""


def _drop(folder: Path) -> None:
    """Remove what `evaluate` wrote, and nothing else."""
    written = [folder / name for name in (SCORES, "scores.csv", "table.md")]
    try:
        for file in (*written, *folder.glob("examples/*/*.jsonl")):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename!r}: {error.strerror}") from error
