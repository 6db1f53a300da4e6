"""A task: examples in up to three splits, and the rule by which answers to them are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from mergekit_unconstrained.evaluation.records import Example, Scored, Split
from mergekit_unconstrained.evaluation.subject import Subject

Advance = Callable[[int], Any]
"""Told how many more examples are done."""


class Task(ABC):
    """What `evaluate` and a search ask of a model."""

    name: str
    """As the tasks file calls it."""
    unit: str
    """Of the scores: "exact match", "nats per byte", ..."""
    weight: float
    """In the mean over tasks that a search maximises."""
    solved_at: float | None
    """The value from which an example counts as solved; None where nothing is ever "solved"."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Hash of everything but the examples that a score depends on; keys the score cache."""

    @abstractmethod
    def splits(self) -> tuple[Split, ...]:
        """The splits that the task has."""

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of a split, always in the same order; DataError when they cannot be read."""

    @abstractmethod
    def score(
        self, subject: Subject, examples: Sequence[Example], advance: Advance = lambda _: None
    ) -> list[Scored]:
        """The scores of some examples, in their order."""
