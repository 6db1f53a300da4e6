"""The score of a candidate, and when it is given up, against closed forms in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest

from mergekit_unconstrained.evaluation.records import Example, Message, Scored, Split
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.evaluation.task import Task
from mergekit_unconstrained.search.objective import Objective
from mergekit_unconstrained.search.settings import Racing

Rule = Callable[[int], float | Scored]
"""Example's index -> its score."""


class Told(Task):
    """A task whose scores are told beforehand."""

    unit = "points"
    solved_at = None
    key = "told"

    def __init__(self, name: str, count: int, weight: float = 1.0) -> None:
        self.name, self.weight = name, weight
        self._examples = [Example(str(i), (Message("user", str(i)),)) for i in range(count)]
        self.rule: Rule = float
        self.asked: list[list[str]] = []

    def splits(self) -> tuple[Split, ...]:
        return ("search",)

    def examples(self, split: Split) -> Sequence[Example]:
        assert split == "search"
        return self._examples

    def score(
        self,
        subject: Subject,
        examples: Sequence[Example],
        advance: Callable[[int], Any] = lambda _: None,
    ) -> list[Scored]:
        self.asked.append([e.id for e in examples])
        advance(len(examples))
        found = [self.rule(int(e.id)) for e in examples]
        return [
            one if isinstance(one, Scored) else Scored(e.id, one)
            for e, one in zip(examples, found, strict=True)
        ]


SUBJECT = Subject("nobody", None, None)
ALWAYS = Racing(slices=(0.1, 0.3, 1.0), z=2.0, least=2)


def random_scores(count: int, seed: int) -> list[float]:
    return [float(v) for v in np.random.default_rng(seed).normal(size=count)]


def scored(tasks: Sequence[Told], *rules: Rule) -> Any:
    for task, rule in zip(tasks, rules, strict=True):
        task.rule = rule
    return Objective(tasks, "search", 0)


def best_scores(objective: Objective, rules: Mapping[str, Rule]) -> dict[str, list[float]]:
    return {
        name: [float(rules[name](int(e.id))) for e in examples]  # type: ignore[arg-type]
        for name, examples in objective.examples.items()
    }


def test_the_value_is_the_weighted_mean_of_means() -> None:
    tasks = [Told("a", 7, weight=3.0), Told("b", 5, weight=0.5), Told("c", 1, weight=0.0)]
    a, b = random_scores(7, 1), random_scores(5, 2)
    objective = scored(tasks, lambda i: a[i], lambda i: b[i], lambda _: 99.0)
    outcome = objective.score(SUBJECT, Racing())
    assert outcome.value == pytest.approx((3 * np.mean(a) + 0.5 * np.mean(b)) / 3.5, rel=1e-14)
    assert objective.by_task(outcome.scores) == pytest.approx([np.mean(a), np.mean(b)])
    assert outcome.examples == objective.size == 12  # a task of weight 0 is only reported
    assert not outcome.dropped
    assert outcome.failure == ""


def test_the_difference_is_paired_and_its_error_that_of_a_weighted_mean() -> None:
    tasks = [Told("a", 40, weight=3.0), Told("b", 30)]
    objective = Objective(tasks, "search", 0)
    own = {"a": random_scores(11, 1), "b": random_scores(8, 2)}
    best = {"a": random_scores(40, 3), "b": random_scores(30, 4)}
    d_a = np.array(own["a"]) - np.array(best["a"])[:11]
    d_b = np.array(own["b"]) - np.array(best["b"])[:8]
    mean, error, least = objective.difference(own, best)
    assert mean == pytest.approx(0.75 * d_a.mean() + 0.25 * d_b.mean(), rel=1e-14)
    # Sample variances: sum (d - mean)^2 / (n - 1), over n.
    v_a = ((d_a - d_a.mean()) ** 2).sum() / 10 / 11
    v_b = ((d_b - d_b.mean()) ** 2).sum() / 7 / 8
    assert error == pytest.approx(math.sqrt(0.75**2 * v_a + 0.25**2 * v_b), rel=1e-12)
    assert least == 8


def test_tasks_of_the_same_examples_are_no_independent_ones() -> None:
    tasks = [Told("a", 40, weight=3.0), Told("b", 40)]
    objective = Objective(tasks, "search", 0)
    assert [e.digest for e in objective.examples["a"]] == [
        e.digest for e in objective.examples["b"]
    ]
    own, best = random_scores(11, 1), random_scores(40, 3)
    d = np.array(own) - np.array(best)[:11]
    mean, error, least = objective.difference({"a": own, "b": own}, {"a": best, "b": best})
    assert mean == pytest.approx(d.mean(), rel=1e-14)
    assert error == pytest.approx(math.sqrt(((d - d.mean()) ** 2).sum() / 10 / 11), rel=1e-12)
    assert least == 11


def test_a_hopeless_candidate_is_dropped_after_the_first_share() -> None:
    tasks = [Told("a", 100)]
    good = random_scores(100, 1)
    noise = random_scores(100, 2)
    objective = scored(tasks, lambda i: good[i] - 3.0 + 0.1 * noise[i])
    best = best_scores(objective, {"a": lambda i: good[i]})
    outcome = objective.score(SUBJECT, ALWAYS, best)
    assert outcome.dropped
    assert outcome.examples == 10
    used = [int(e.id) for e in objective.examples["a"][:10]]
    behind = np.mean([-3.0 + 0.1 * noise[i] for i in used])
    # An estimate from the share alone would carry the luck of its examples.
    assert outcome.value == pytest.approx(np.mean(good) + behind, rel=1e-12)


@pytest.mark.parametrize(("gap", "kept"), [(1.99, True), (2.01, False)])
def test_z_standard_errors_are_the_limit(gap: float, kept: bool) -> None:
    tasks = [Told("a", 100)]
    objective = Objective(tasks, "search", 0)
    first = [int(e.id) for e in objective.examples["a"][:30]]
    # Differences of +1 and -1 in turn, of mean -gap * error over the first share exactly.
    error = math.sqrt(30 / 29 / 30)
    place = {i: n for n, i in enumerate(first)}
    tasks[0].rule = lambda i: (-1.0) ** place.get(i, 0) - gap * error if i in place else 50.0
    best = best_scores(objective, {"a": lambda _: 0.0})
    outcome = objective.score(SUBJECT, Racing(slices=(0.3, 1.0), z=2.0), best)
    assert outcome.dropped is not kept


@pytest.mark.parametrize("seed", range(30))
def test_a_better_candidate_is_never_dropped(seed: int) -> None:
    tasks = [Told("a", 60), Told("b", 25, weight=2.0)]
    worse = random_scores(60, seed)
    better = [w + abs(d) for w, d in zip(worse, random_scores(60, 100 + seed), strict=True)]
    objective = scored(tasks, lambda i: better[i], lambda i: better[i])
    best = best_scores(objective, {"a": lambda i: worse[i], "b": lambda i: worse[i]})
    outcome = objective.score(SUBJECT, ALWAYS, best)
    assert not outcome.dropped
    assert outcome.examples == 85


def test_an_equal_candidate_is_not_dropped() -> None:
    tasks = [Told("a", 100)]
    objective = scored(tasks, lambda i: i % 2)
    best = best_scores(objective, {"a": lambda i: i % 2})
    assert not objective.score(SUBJECT, ALWAYS, best).dropped


def test_a_decision_needs_examples_of_every_task() -> None:
    tasks = [Told("a", 200), Told("b", 10)]
    objective = scored(tasks, lambda _: 0.0, lambda _: 0.0)
    best = best_scores(objective, {"a": lambda _: 1.0, "b": lambda _: 1.0})
    racing = Racing(slices=(0.25, 0.5, 1.0), least=5)
    outcome = objective.score(SUBJECT, racing, best)
    assert outcome.dropped
    assert outcome.examples == 100 + 5  # 3 of task b were too few
    assert not objective.score(SUBJECT, Racing(least=11), best).dropped


def test_racing_can_be_switched_off() -> None:
    tasks = [Told("a", 100)]
    objective = scored(tasks, lambda _: 0.0)
    best = best_scores(objective, {"a": lambda _: 1.0})
    outcome = objective.score(SUBJECT, Racing(enabled=False), best)
    assert not outcome.dropped
    assert tasks[0].asked == [[e.id for e in objective.examples["a"]]]


@pytest.mark.parametrize("slices", [(0.1, 0.5), (), (0.5, 0.2)])
def test_whoever_is_not_dropped_is_scored_in_full(slices: tuple[float, ...]) -> None:
    tasks = [Told("a", 40)]
    objective = scored(tasks, float)
    best = best_scores(objective, {"a": lambda _: 0.0})
    outcome = objective.score(SUBJECT, Racing(slices=slices), best)
    assert outcome.examples == 40
    assert outcome.value == pytest.approx(19.5)


def test_the_order_of_examples_is_the_same_for_every_candidate() -> None:
    tasks = [Told("a", 50)]
    objective = scored(tasks, float)
    best = best_scores(objective, {"a": lambda _: 0.0})
    objective.score(SUBJECT, ALWAYS, best)
    first = list(chain(*tasks[0].asked))
    assert [len(part) for part in tasks[0].asked] == [5, 10, 35]
    tasks[0].asked.clear()
    tasks[0].rule = lambda i: -i / 7
    objective.score(SUBJECT, Racing(), None)
    assert list(chain(*tasks[0].asked)) == first
    assert sorted(map(int, first)) == list(range(50)) != [int(i) for i in first]
    other = Objective(tasks, "search", 1)
    assert [e.id for e in other.examples["a"]] != first


def test_progress_is_told_for_every_example() -> None:
    told: list[int] = []
    objective = scored([Told("a", 50)], float)
    best = best_scores(objective, {"a": lambda _: 0.0})
    objective.score(SUBJECT, ALWAYS, best, told.append)
    assert sum(told) == 50


# -- failures -------------------------------------------------------------------------------------


def failing(reason: str, value: float = 0.0) -> Rule:
    return lambda i: Scored(str(i), value, failure=reason)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_a_failure(value: float) -> None:
    objective = scored([Told("a", 20)], lambda _: value)
    outcome = objective.score(SUBJECT, Racing())
    assert outcome.failure == "a: the score is not finite"
    assert math.isnan(outcome.value)
    objective = scored([Told("a", 20)], lambda i: value if i == 7 else 1.0)
    outcome = objective.score(SUBJECT, Racing())
    assert outcome.failure or outcome.value < 1.0
    assert all(math.isfinite(v) for v in outcome.scores["a"])


def test_a_task_that_breaks_down_is_a_failure() -> None:
    def crash(_: int) -> float:
        raise RuntimeError("no kernel image")

    outcome = scored([Told("a", 5)], crash).score(SUBJECT, Racing())
    assert outcome.failure == "a: RuntimeError: no kernel image"


def test_a_task_in_which_nothing_could_be_judged_is_a_failure() -> None:
    objective = scored([Told("a", 20), Told("b", 20)], float, failing("logits of NaN"))
    outcome = objective.score(SUBJECT, Racing())
    assert outcome.failure == "b: logits of NaN"
    assert math.isnan(outcome.value)


def test_a_broken_candidate_fails_in_the_first_share() -> None:
    objective = scored([Told("a", 100)], failing("logits of NaN"))
    best = best_scores(objective, {"a": lambda _: 1.0})
    assert objective.score(SUBJECT, ALWAYS, best).examples == 10


def test_one_answer_that_cannot_be_judged_counts_with_its_value() -> None:
    objective = scored([Told("a", 4)], lambda i: failing("bad")(i) if i == 2 else 1.0)
    outcome = objective.score(SUBJECT, Racing())
    assert outcome.failure == ""
    assert outcome.value == 0.75


def test_answers_that_do_not_end_are_bad_answers_and_no_failure() -> None:
    objective = scored([Told("a", 4)], failing("did not stop within 64 tokens"))
    outcome = objective.score(SUBJECT, Racing())
    assert outcome.failure == ""
    assert outcome.value == 0.0
