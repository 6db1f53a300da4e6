"""One model on some tasks: known scores are taken, the others are had piece by piece.

What goes wrong with one example is that example's failure, and the run goes on: a piece that raises
is halved until the culprit stands alone; where memory ran out, the batch is halved first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import DataError, UnconstrainedError
from mergekit_unconstrained.evaluation.cache import ScoreCache
from mergekit_unconstrained.evaluation.records import Example, Scored, Split
from mergekit_unconstrained.evaluation.statistics import Mean, mean_and_error
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.evaluation.task import Advance, Task

_PIECE = 8
"""Batches whose scores are written to the cache together: what a killed run loses at most."""


@dataclass(frozen=True)
class TaskResult:
    """One model on one split of one task: the scores of its examples, in their order."""

    task: str
    unit: str
    weight: float
    solved_at: float | None
    scored: tuple[Scored, ...]

    @cached_property
    def score(self) -> Mean:
        """Mean and standard error over the examples."""
        return mean_and_error(self.values)

    @property
    def values(self) -> list[float]:
        """The value of every example."""
        return [one.value for one in self.scored]

    @property
    def failures(self) -> int:
        """Examples without a proper answer; they count with their values."""
        return sum(bool(one.failure) for one in self.scored)


@dataclass(frozen=True)
class Results:
    """One model on a split of all tasks, in the tasks' order."""

    model: str
    split: Split
    tasks: tuple[TaskResult, ...]

    def __getitem__(self, task: str) -> TaskResult:
        """The result of one task, by its name."""
        return next(one for one in self.tasks if one.task == task)

    @property
    def mean(self) -> float:
        """The mean over tasks by their weights; what a search maximises."""
        total = math.fsum(one.weight for one in self.tasks)
        return (
            math.fsum(one.weight * one.score.mean for one in self.tasks) / total if total else 0.0
        )


def evaluate(
    subject: Subject,
    tasks: Sequence[Task],
    split: Split = "test",
    cache: ScoreCache | None = None,
    limit: int | None = None,
    advance: Advance = lambda _: None,
) -> Results:
    """Score a model on the first `limit` examples (None: all) of a split of every task.

    advance: told of every example, known ones too. DataError for a task without that split, and
    whatever is wrong with data or model as a whole; never for a single example.
    """
    found = []
    for task in tasks:
        examples = wanted(task, split, limit)
        scored = score_examples(subject, task, examples, cache, advance)
        found.append(TaskResult(task.name, task.unit, task.weight, task.solved_at, tuple(scored)))
    return Results(subject.name, split, tuple(found))


def wanted(task: Task, split: Split, limit: int | None = None) -> Sequence[Example]:
    """The first examples of a split; DataError when the task has no such split."""
    if split not in task.splits():
        raise DataError(
            f"task {task.name!r} has no {split!r} split. {suggest(split, task.splits())}"
        )
    return task.examples(split)[:limit]


def score_examples(
    subject: Subject,
    task: Task,
    examples: Sequence[Example],
    cache: ScoreCache | None = None,
    advance: Advance = lambda _: None,
) -> list[Scored]:
    """The scores of some examples of a task, in their order; arguments as in `evaluate`."""
    key = task.key if cache is not None and subject.weights else ""
    found: list[Scored | None] = [None] * len(examples)
    if cache is not None and key:
        found = cache.known(subject.weights, key, examples)
    missing = [i for i, one in enumerate(found) if one is None]
    advance(len(examples) - len(missing))
    size = max(1, subject.batch_size) * _PIECE
    for start in range(0, len(missing), size):
        piece = missing[start : start + size]
        asked = [examples[i] for i in piece]
        told = _Told(advance, len(asked))
        scored, crashed = _bravely(subject, task, asked, told)
        told.finish()
        for i, one in zip(piece, scored, strict=True):
            found[i] = one
        if cache is not None and key:
            # a crash may be the machine's fault: it is tried again the next time
            kept = [(e, s) for e, s in zip(asked, scored, strict=True) if s.id not in crashed]
            cache.add(subject.weights, key, [e for e, _ in kept], [s for _, s in kept])
    return [one for one in found if one is not None]


def _bravely(
    subject: Subject, task: Task, examples: Sequence[Example], advance: Callable[[int], Any]
) -> tuple[list[Scored], set[str]]:
    """Scores of all examples, and the ids of those whose scoring raised."""
    try:
        scored = task.score(subject, examples, advance)
        return [_finite(task, one) for one in scored], set()
    except UnconstrainedError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        failure = f"{type(error).__name__}: {told}" if told else type(error).__name__
        out_of_memory = _out_of_memory(error)
    # outside of `except`: the traceback holds what fills the memory
    if out_of_memory and subject.batch_size > 1:
        smaller = replace(subject, batch_size=subject.batch_size // 2)
        return _bravely(smaller, task, examples, advance)
    if len(examples) > 1:
        half = len(examples) // 2
        first, bad = _bravely(subject, task, examples[:half], advance)
        second, worse = _bravely(subject, task, examples[half:], advance)
        return first + second, bad | worse
    (example,) = examples
    return [Scored(example.id, _worst(task), failure=failure)], {example.id}


def _finite(task: Task, one: Scored) -> Scored:
    if math.isfinite(one.value):
        return one
    return replace(one, value=_worst(task), failure=one.failure or "the score is not finite")


def _worst(task: Task) -> float:
    return float(getattr(task, "worst", 0.0))


def _out_of_memory(error: Exception) -> bool:
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in said for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


class _Told:
    """Passes progress on, once for each example however often a piece is tried."""

    def __init__(self, advance: Advance, total: int) -> None:
        self._advance = advance
        self._left = total

    def __call__(self, count: int) -> None:
        count = min(count, self._left)
        self._left -= count
        if count:
            self._advance(count)

    def finish(self) -> None:
        """Tell of those of which nothing was said."""
        self(self._left)
