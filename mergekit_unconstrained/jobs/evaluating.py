"""`evaluate`: models one after another on the tasks of a file, one table, a file for each example.

DIR/scores.json, scores.csv, table.md       after every model, of all models so far
DIR/examples/MODEL/TASK.jsonl               what was asked, wanted, said and scored
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_unconstrained import __version__
from mergekit_unconstrained.engine.digest import sha256
from mergekit_unconstrained.errors import DataError, ModelError, OutputError
from mergekit_unconstrained.evaluation.cache import ScoreCache
from mergekit_unconstrained.evaluation.configured import FileTask
from mergekit_unconstrained.evaluation.loading import check_there
from mergekit_unconstrained.evaluation.records import SPLITS, Example, Scored, Split
from mergekit_unconstrained.evaluation.run import Results, evaluate, wanted
from mergekit_unconstrained.evaluation.settings import load_tasks
from mergekit_unconstrained.evaluation.statistics import paired_error
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.evaluation.task import Task
from mergekit_unconstrained.hub.sources import licence
from mergekit_unconstrained.jobs import scores_folder
from mergekit_unconstrained.present import evaluation as display


def evaluate_models(
    models: Sequence[str],
    tasks_file: str | Path,
    *,
    split: Split = "test",
    limit: int | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    device: str = "auto",
    allow_code: bool = False,
    overwrite: bool = False,
) -> list[Results]:
    """Score models on tasks, print one table and save it where `out` says.

    Everything that can be read without a model is read first, and every model is looked for before
    the first one is scored. overwrite: drop scores of another command in `out`. Any error of the
    tree; never one for a single example, whose failure is told in the table.
    """
    if not models:
        raise ModelError("name at least one model")
    repeated = sorted({model for model in models if models.count(model) > 1})
    if repeated:
        raise ModelError(f"{repeated[0]} is named twice")
    if split not in SPLITS:
        raise DataError(f"there is no {split!r} split: choose one of {', '.join(SPLITS)}")
    tasks = load_tasks(tasks_file, allow_code=allow_code)
    total = sum(len(wanted(task, split, limit)) for task in tasks)
    for name in models:
        check_there(name)
    known = None if cache is None else ScoreCache(cache)
    if out is not None:
        question = scores_folder.asked(tasks, split, limit)
        scores_folder.prepare(out, models, question, overwrite)
    found: list[Results] = []
    with display.example_progress(total * len(models)) as (advance, tell):
        for name in models:
            tell(f"loading {_short(name)}")
            subject = Subject.load(name, dtype=dtype, device=device, batch_size=batch_size)
            tell(_short(name))
            found.append(evaluate(subject, tasks, split, known, limit, advance))
            del subject
            gc.collect()  # models hold themselves; before the next one is loaded
            if out is not None:
                _save(found, tasks, limit, out)
    display.print_results(found)
    if out is not None:
        display.console.print(f"saved in {out}", highlight=False, markup=False)
    return found


def folder_names(models: Sequence[str]) -> dict[str, str]:
    """A folder for each model, by the end of its name."""
    return _unique({model: _short(model) for model in models})


def _unique(names: Mapping[str, str]) -> dict[str, str]:
    """Names fit for files, of equal ones all but the first numbered."""
    found: dict[str, str] = {}
    for key, name in names.items():
        plain = chosen = re.sub(r"[^\w.+@-]+", "_", name).strip("._") or "unnamed"
        number = 2
        while chosen.casefold() in (other.casefold() for other in found.values()):
            chosen, number = f"{plain}-{number}", number + 1
        found[key] = chosen
    return found


def _save(results: Sequence[Results], tasks: Sequence[Task], limit: int | None, out: Path) -> None:
    question = scores_folder.asked(tasks, results[0].split, limit)
    data = {task.name: _tested(task, results[0].split, limit) for task in tasks}
    scores = {scores_folder.MADE_BY: __version__, **question, **display.data(results)}
    scores |= {"paired": paired_errors(results), "data": data}
    _write(out / scores_folder.SCORES, json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
    _write(out / "scores.csv", display.table_csv(results))
    _write(out / "table.md", display.markdown(results))
    last = results[-1]
    folder = folder_names([one.model for one in results])[last.model]
    files = _unique({task.name: task.name for task in tasks})
    for task in tasks:
        examples = wanted(task, last.split, limit)
        lines = [
            json.dumps(_row(*pair), ensure_ascii=False, default=str)
            for pair in zip(examples, last[task.name].scored, strict=True)
        ]
        _write(out / "examples" / folder / f"{files[task.name]}.jsonl", "\n".join(lines) + "\n")


def paired_errors(results: Sequence[Results]) -> dict[str, dict[str, dict[str, float]]]:
    """By task, model and other model: the standard error of their difference, over the examples."""
    return {
        task.task: {
            one.model: {
                other.model: paired_error(one[task.task].values, other[task.task].values)
                for other in results
                if other is not one
            }
            for one in results
        }
        for task in results[0].tasks
    }


def _tested(task: Task, split: Split, limit: int | None) -> dict[str, Any]:
    """What was asked: its file where there is one, else a hash of the examples; and how many."""
    examples = wanted(task, split, limit)
    if isinstance(task, FileTask):
        path = task.path(split)
        found = {"name": path.name, "sha256": sha256(path), "hashed": "file"}
        return {**found, "licence": licence(path.parent), "n": len(examples)}
    text = " ".join(example.digest for example in examples)
    digest = hashlib.sha256(text.encode()).hexdigest()
    found = {"name": task.name, "sha256": digest, "hashed": "examples"}
    return {**found, "licence": None, "n": len(examples)}


def _row(example: Example, scored: Scored) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": example.id,
        "messages": [{"role": m.role, "content": m.content} for m in example.messages],
        "target": example.target,
    }
    if example.choices:
        row["choices"] = list(example.choices)
    return {**row, "said": scored.said, "value": scored.value, "failure": scored.failure}


def _short(model: str) -> str:
    """`expert+adapter` of `models/expert+runs/adapter`."""
    return "+".join(re.split(r"[/\\]", part.rstrip("/\\"))[-1] for part in model.split("+"))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {str(folder)!r} cannot be made: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    """Write beside and rename: a reader sees the old file or the new one, never half of one."""
    _make(path.parent)
    beside = path.with_name(f".{path.name}.partial")
    try:
        # half a character that a model said is written as a question mark
        beside.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        beside.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror}") from error
