"""The score of a candidate on the search split, and when to stop scoring one that cannot win.

A candidate is scored on growing shares of every task's examples. After each share it is compared
with the best finished candidate on the same examples, one by one; when it lies more than z standard
errors below, it is dropped, and its score is taken to be the best one's plus the difference (ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergekit_unconstrained.evaluation.records import Example, Split
from mergekit_unconstrained.evaluation.run import score_examples
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.evaluation.task import Task
from mergekit_unconstrained.search.settings import Racing

UNENDED = "did not stop"
Scores = Mapping[str, Sequence[float]]
"""Task -> the values of its first examples, in the objective's order."""


@dataclass(frozen=True)
class Outcome:
    """What came of one candidate. value: the weighted mean over tasks, an estimate if dropped.

    examples: how many were scored. failure: why there is no value, "" otherwise.
    """

    value: float
    scores: dict[str, list[float]] = field(default_factory=dict)
    dropped: bool = False
    failure: str = ""

    @property
    def examples(self) -> int:
        """So many example evaluations were spent."""
        return sum(map(len, self.scores.values()))


class Objective:
    """The weighted mean of task scores over one split, for a live model.

    Tasks of weight 0 are left out: they are only reported at the end. seed: of the order in which
    examples are scored, which is the same for every candidate.
    """

    def __init__(self, tasks: Sequence[Task], split: Split, seed: int) -> None:
        self.tasks = [t for t in tasks if split in t.splits() and t.weight > 0]
        self.split = split
        self.examples: dict[str, list[Example]] = {}
        for task in self.tasks:
            examples = list(task.examples(split))
            # of their number alone: tasks that measure the same examples read them together
            order = np.random.default_rng((seed, len(examples))).permutation(len(examples))
            self.examples[task.name] = [examples[i] for i in order]

    @property
    def size(self) -> int:
        """Examples of all tasks."""
        return sum(map(len, self.examples.values()))

    def value(self, scores: Scores) -> float:
        """The weighted mean over tasks of the mean over examples."""
        weights = [t.weight for t in self.tasks]
        means = [math.fsum(scores[t.name]) / len(scores[t.name]) for t in self.tasks]
        return math.fsum(w * m for w, m in zip(weights, means, strict=True)) / math.fsum(weights)

    def by_task(self, scores: Scores) -> list[float]:
        """The mean of every task, in their order: what is kept apart in a search for trade-offs."""
        return [math.fsum(scores[t.name]) / len(scores[t.name]) for t in self.tasks]

    def score(
        self,
        subject: Subject,
        racing: Racing,
        best: Scores | None = None,
        advance: Callable[[int], Any] = lambda _: None,
    ) -> Outcome:
        """Score the model as it is now. best: the scores of the best finished candidate."""
        scores: dict[str, list[float]] = {t.name: [] for t in self.tasks}
        race = racing.enabled and best is not None
        early = sorted(s for s in racing.slices if s < 1) if race else ()
        for share in (*early, 1.0):
            for task in self.tasks:
                failure = self._extend(subject, task, scores[task.name], share, advance)
                if failure:
                    return Outcome(math.nan, scores, failure=failure)
            if race and best is not None and share < 1:
                behind, error, least = self.difference(scores, best)
                if least >= racing.least and behind + racing.z * error < 0:
                    return Outcome(self.value(best) + behind, scores, dropped=True)
        return Outcome(self.value(scores), scores)

    def _extend(
        self,
        subject: Subject,
        task: Task,
        scores: list[float],
        share: float,
        advance: Callable[[int], Any],
    ) -> str:
        """Score a task's examples up to a share of them; why that says nothing, or ""."""
        examples = self.examples[task.name]
        end = max(1, math.ceil(share * len(examples) - 1e-9))
        fresh = examples[len(scores) : end]
        if not fresh:
            return ""
        found = score_examples(subject, task, fresh, None, advance)
        scores += [one.value for one in found]
        # An answer that does not end is a bad answer; anything else is no answer at all.
        broken = [one for one in found if one.failure and not one.failure.startswith(UNENDED)]
        if len(broken) == len(found):
            return f"{task.name}: {broken[0].failure}"
        if not all(math.isfinite(one.value) for one in found):
            return f"{task.name}: a score is not finite"
        return ""

    def difference(self, scores: Scores, best: Scores) -> tuple[float, float, int]:
        """Mean difference from the best on the examples scored so far, its standard error, and n.

        n: examples of the task with the fewest. The error is that of a weighted mean of
        independent means of paired differences; tasks that measure the same examples are no
        independent ones, and are added up example by example first.
        """
        total = math.fsum(t.weight for t in self.tasks)
        differences: dict[tuple[str, ...], np.ndarray] = {}
        for task in self.tasks:
            own = np.asarray(scores[task.name])
            d = own - np.asarray(best[task.name][: len(own)])
            asked = tuple(e.digest for e in self.examples[task.name][: len(own)])
            differences[asked] = differences.get(asked, 0.0) + task.weight / total * d
        mean = math.fsum(float(d.mean()) for d in differences.values())
        variance = math.fsum(
            float(d.var(ddof=1)) / len(d) for d in differences.values() if len(d) > 1
        )
        return mean, math.sqrt(variance), min(map(len, differences.values()))
