"""Scores of models on tasks, for people and for programs: terminal, Markdown, JSON, CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mergekit_unconstrained.evaluation.run import Results, TaskResult
from mergekit_unconstrained.present import console
from mergekit_unconstrained.present.grid import grid

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def print_results(results: Sequence[Results]) -> None:
    """Models x tasks, with n and the standard error of every mean; failures below."""
    console.print(table(results, console.width))
    console.print("mean ± standard error over the examples", highlight=False)
    for line in failures(results):
        console.print(escape(line), highlight=False)


def table(results: Sequence[Results], width: int) -> Table:
    """The table for so many characters of width; where it is too wide, tasks are the rows."""
    return grid(
        f"{results[0].split} split",
        "model",
        [one.model for one in results],
        {t.task: f"{t.task}\n{t.unit}\nn = {t.score.n}" for t in results[0].tasks},
        {(one.model, task.task): Text(cell(task)) for one in results for task in one.tasks},
        width,
    )


def markdown(results: Sequence[Results]) -> str:
    """The same table as Markdown, a line of explanation and the failures below."""
    tasks = results[0].tasks
    heads = ["model", *(f"{_plain(t.task)} ({_plain(t.unit)}, n = {t.score.n})" for t in tasks)]
    lines = [
        f"| {' | '.join(heads)} |",
        f"|---|{'---:|' * len(tasks)}",
        *(
            f"| {_plain(one.model)} | {' | '.join(cell(task) for task in one.tasks)} |"
            for one in results
        ),
        "",
        f"Mean ± standard error over the examples of the {results[0].split} split.",
    ]
    lines += [f"- {_plain(line)}" for line in failures(results)]
    return "\n".join(lines) + "\n"


def data(results: Sequence[Results]) -> dict[str, Any]:
    """The same as JSON values: tasks with their units, models with their scores."""
    return {
        "split": results[0].split,
        "tasks": {
            task.task: {"unit": task.unit, "weight": task.weight, "solved_at": task.solved_at}
            for task in results[0].tasks
        },
        "models": {
            one.model: {
                "mean": one.mean,
                "tasks": {
                    task.task: {
                        "mean": task.score.mean,
                        "standard_error": task.score.error,
                        "n": task.score.n,
                        "failures": task.failures,
                    }
                    for task in one.tasks
                },
            }
            for one in results
        },
    }


def table_csv(results: Sequence[Results]) -> str:
    """The same as CSV, one line for each model and task."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "task", "unit", "n", "mean", "standard_error", "failures"))
    for one in results:
        for task in one.tasks:
            score = task.score
            row = (one.model, task.task, task.unit, score.n, score.mean, score.error, task.failures)
            writer.writerow(row)
    return text.getvalue()


def cell(task: TaskResult) -> str:
    """`0.613 ± 0.021`."""
    return f"{task.score.mean:.3f} ± {task.score.error:.3f}"


def failures(results: Sequence[Results]) -> list[str]:
    """A sentence for each model and task with examples that failed, with the commonest reason.

    Reasons that differ in their numbers only are one, and show those numbers that they share.
    """
    lines = []
    for one in results:
        for task in one.tasks:
            reasons = [scored.failure for scored in task.scored if scored.failure]
            if reasons:
                groups: dict[str, list[str]] = {}
                for reason in reasons:
                    groups.setdefault(_NUMBER.sub("0", reason), []).append(reason)
                commonest = max(groups.values(), key=len)
                lines.append(
                    f"{one.model} on {task.task}: {len(reasons)} of {task.score.n} examples failed "
                    f"({len(commonest)} x {_shared(commonest)})"
                )
    return lines


def _shared(reasons: Sequence[str]) -> str:
    """The one text of reasons that differ in their numbers only; such numbers as an ellipsis."""
    numbers = zip(*(_NUMBER.findall(reason) for reason in reasons), strict=True)
    shown = iter([own[0] if len(set(own)) == 1 else "…" for own in numbers])
    return _NUMBER.sub(lambda _: next(shown), reasons[0])


@contextmanager
def example_progress(total: int) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """A bar by examples; gives a function told how many more are done, and one told of what."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # On stderr: what a command prints may be redirected into a file.
    with Progress(*columns, console=Console(stderr=True), disable=total == 0) as bar:
        task = bar.add_task("", total=total)
        yield (
            lambda count: bar.advance(task, count),
            lambda message: bar.update(task, description=escape(message)),
        )


def _plain(text: str) -> str:
    """Text that does not end a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
