"""A study and its journal: what was scored is never lost, repeated, or mixed with another's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from mergekit_unconstrained.errors import OutputError, UnconstrainedError
from mergekit_unconstrained.search.genome import Gene, Genome, Values
from mergekit_unconstrained.search.objective import Outcome, Scores
from mergekit_unconstrained.search.samplers import Sampler, counted, make_sampler
from mergekit_unconstrained.search.settings import SearchSettings
from mergekit_unconstrained.search.study import HOPELESS, Study, best_of, open_storage, ranked

GENOME = Genome(
    tuple(Gene(("m", f"p{i}", None, ""), 0.0, 1.0, 0.5, called="m") for i in range(2)), ()
)
SETTINGS = SearchSettings(recipe={}, population=4)


class Killed(BaseException):
    """Stands for the death of the process."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(level)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "work" / "journal.log"


def opened(journal: Path, job: str = "job", sampler: str = "cma", objectives: int = 1) -> Study:
    """A study, its storage read anew from the disk."""
    settings = SETTINGS.model_copy(update={"sampler": sampler})
    return Study(
        open_storage(None, journal), "search", make_sampler(GENOME, settings), job, objectives
    )


def by_values(values: Values) -> Outcome:
    """Highest, 0, at (0.3, 0.3); of four examples each."""
    value = -sum((v - 0.3) ** 2 for v in values.values())
    return Outcome(value, {"task": [value - 1, value + 1, value, value]})


def evaluate(values: Values, best: Scores | None) -> Outcome:
    return by_values(values)


def kept(study: Study) -> list[tuple[dict[str, float], float]]:
    return [(f.values, f.value) for f in study.finished]


# -- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["cma", "tpe", "random", "nsga2"])
def test_a_study_that_was_killed_goes_on_as_if_it_had_not(tmp_path: Path, sampler: str) -> None:
    calm = opened(tmp_path / "calm.log", sampler=sampler)
    calm.run(16, evaluate)
    asked: list[Values] = []

    def dying(values: Values, best: Scores | None) -> Outcome:
        asked.append(values)
        if len(asked) in (1, 6, 7, 14):
            raise Killed
        return evaluate(values, best)

    while True:
        study = opened(tmp_path / "rough.log", sampler=sampler)
        study.abandon()
        try:
            study.run(16, dying)
        except Killed:
            continue
        break
    assert kept(study) == kept(calm)
    assert len(study.raw_trials) == 20
    # Nothing that was scored was scored again.
    assert len(asked) <= 20


def test_a_trial_that_nobody_finished_is_drawn_again(journal: Path) -> None:
    calm = opened(journal.with_name("calm.log"))
    calm.run(9, evaluate)
    opened(journal).run(3, evaluate)
    lost = opened(journal)
    trial = lost._study.ask()  # and then the power fails
    study = opened(journal)
    assert study.unfinished == 1
    assert study.abandon() == 1
    assert study.unfinished == 0
    study.run(9, evaluate)
    assert kept(study) == kept(calm)
    assert trial.number not in [f.number for f in study.finished]


def test_only_the_dead_are_abandoned(journal: Path) -> None:
    study = opened(journal)
    study._study.ask()
    assert study.abandon(lambda _: False) == 0
    assert study.unfinished == 1


@pytest.mark.parametrize("torn", [b"{", b'{"op_code": 5, "worker', b'{"a": 1}', b"\n"])
def test_a_torn_last_line_is_mended(journal: Path, torn: bytes) -> None:
    calm = opened(journal.with_name("calm.log"))
    calm.run(8, evaluate)
    opened(journal).run(5, evaluate)
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    study = opened(journal)
    assert journal.read_bytes()[: len(whole)] == whole
    study.run(8, evaluate)
    assert kept(study) == kept(calm)
    assert kept(opened(journal)) == kept(calm)


def test_every_cut_of_a_journal_can_be_gone_on_with(journal: Path) -> None:
    opened(journal).run(3, evaluate)
    whole = journal.read_bytes()
    for end in np.linspace(0, len(whole), 8).astype(int):
        journal.write_bytes(whole[:end])
        study = opened(journal)
        study.abandon()
        study.run(4, evaluate)
        assert len(study.finished) == 4
        assert study.finished[0].values == GENOME.start


def test_the_lock_is_given_back(journal: Path) -> None:
    opened(journal).run(1, evaluate)
    open_storage(None, journal)
    assert [p.name for p in journal.parent.iterdir()] == ["journal.log"]


def test_a_storage_of_another_job_is_refused(journal: Path) -> None:
    opened(journal).run(2, evaluate)
    with pytest.raises(OutputError, match="of other models, tasks or settings"):
        opened(journal, job="other")
    assert len(opened(journal).finished) == 2


def test_a_storage_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot open the storage nobody://nowhere/db") as found:
        open_storage("nobody://me:s3cret@nowhere/db", tmp_path / "journal.log")
    assert "s3cret" not in str(found.value)


def test_any_storage_of_optuna_will_do(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    sampler = make_sampler(GENOME, SETTINGS)
    for budget in (2, 5):
        study = Study(open_storage(url, tmp_path / "none.log"), "search", sampler, "job")
        study.run(budget, evaluate)
    calm = opened(tmp_path / "calm.log")
    calm.run(5, evaluate)
    assert kept(study) == kept(calm)
    assert not (tmp_path / "none.log").exists()


# -- budgets --------------------------------------------------------------------------------------


def test_two_studies_on_one_journal_share_a_budget(journal: Path) -> None:
    one, two = opened(journal), opened(journal)
    calm = opened(journal.with_name("calm.log"))
    calm.run(10, evaluate)

    def interrupting(values: Values, best: Scores | None) -> Outcome:
        if one.unfinished == 1:
            two.run(len(one.trials) + 1, evaluate)  # while this one is being scored
        return evaluate(values, best)

    one.run(10, interrupting)
    two.run(10, evaluate)
    assert len(one.trials) == len(two.trials) == 10
    assert kept(one) == kept(two)
    assert len({f.number for f in one.finished}) == 10
    draws = [tuple(f.values.values()) for f in one.finished]
    assert len(set(draws)) == 10  # no index twice
    assert {tuple(f.values.values()) for f in calm.finished[:4]} == set(draws[:4])


def test_a_larger_budget_goes_on(journal: Path) -> None:
    told: list[int] = []
    opened(journal).run(3, evaluate, done=lambda f: told.append(f.number))
    opened(journal).run(5, evaluate, done=lambda f: told.append(f.number))
    opened(journal).run(4, evaluate, done=lambda f: told.append(f.number))
    assert told == [0, 1, 2, 3, 4]


def test_a_worker_begins_nothing_after_the_leader_has_closed_the_study(journal: Path) -> None:
    leader, worker = opened(journal), opened(journal)

    def until_the_fifth(values: Values, best: Scores | None) -> Outcome:
        if len(leader.trials) == 5:
            leader.close()
        return by_values(values)

    worker.run(20, until_the_fifth)
    assert len(worker.finished) == 5
    leader.open()
    worker.run(20, evaluate)
    assert len(leader.finished) == 20


def test_nothing_is_begun_after_the_deadline(journal: Path) -> None:
    study = opened(journal)
    study.run(5, evaluate, deadline=0.0)
    assert study.trials == []


# -- what a candidate was worth -------------------------------------------------------------------


class Fixed:
    """A study whose candidates and outcomes are given."""

    def __init__(self, journal: Path, values: list[float], outcomes: list[Outcome]) -> None:
        self.asked: list[float] = []
        self.best: list[Scores | None] = []

        def draw(_: Any, __: Any, index: int) -> Values:
            return {"m p0": values[index], "m p1": 0.0}

        def evaluate(values: Values, best: Scores | None) -> Outcome:
            self.asked.append(values["m p0"])
            self.best.append(best)
            return outcomes[len(self.asked) - 1]

        self.study = Study(open_storage(None, journal), "s", Sampler(GENOME, draw), "job")
        self.evaluate: Callable[[Values, Scores | None], Outcome] = evaluate

    def run(self, budget: int) -> Study:
        self.study.run(budget, self.evaluate)
        return self.study


def good(value: float) -> Outcome:
    return Outcome(value, {"task": [value, value]})


BAD = Outcome(math.nan, {"task": [0.0]}, failure="task: logits of NaN")


def test_a_candidate_seen_before_is_not_scored_again(journal: Path) -> None:
    outcomes = [good(1.0), BAD, good(2.0)]
    found = Fixed(journal, [0.1, 0.2, 0.1, 0.2, 0.3], outcomes)
    study = found.run(5)
    assert found.asked == [0.1, 0.2, 0.3]
    same = study.finished
    assert [f.value for f in same if not f.failure] == [1.0, 1.0, 2.0]
    assert [f.examples for f in same] == [2, 1, 0, 0, 2]
    assert same[3].failure == same[1].failure == "task: logits of NaN"
    assert same[2].scores == same[0].scores


def test_a_dropped_candidate_has_no_score_to_repeat(journal: Path) -> None:
    dropped = Outcome(-1.0, {"task": [0.0]}, dropped=True)
    found = Fixed(journal, [0.1, 0.2, 0.2], [good(1.0), dropped, good(0.5)])
    study = found.run(3)
    assert found.asked == [0.1, 0.2, 0.2]
    assert [(f.value, f.dropped) for f in study.finished] == [
        (1.0, False),
        (-1.0, True),
        (0.5, False),
    ]


def test_candidates_race_against_the_best_that_was_scored_in_full(journal: Path) -> None:
    dropped = Outcome(9.0, {"task": [9.0]}, dropped=True)
    outcomes = [good(1.0), dropped, BAD, good(3.0), good(2.0)]
    found = Fixed(journal, [0.1, 0.2, 0.3, 0.4, 0.5], outcomes)
    study = found.run(5)
    assert [b and b["task"][0] for b in found.best] == [None, 1.0, 1.0, 1.0, 3.0]
    assert study.best is not None
    assert study.best.number == 3
    assert [t.state for t in study.trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]
    assert [f.value for f in ranked(study.finished, 9)] == [3.0, 2.0, 1.0]
    assert [f.value for f in ranked(study.finished, 2)] == [3.0, 2.0]


def test_equal_candidates_are_one_finalist_and_the_first_wins_a_tie(journal: Path) -> None:
    outcomes = [good(1.0), good(2.0), good(2.0)]
    study = Fixed(journal, [0.1, 0.2, 0.2, 0.3], outcomes).run(4)
    assert [f.number for f in ranked(study.finished, 5)] == [1, 3, 0]
    best = best_of(study.finished)
    assert best is not None
    assert best.number == 1
    assert best_of([]) is None


def test_a_study_without_hope_ends(journal: Path) -> None:
    found = Fixed(journal, [0.1 * i for i in range(9)], [BAD] * 9)
    with pytest.raises(UnconstrainedError, match=r"every candidate of s failed: task: logits of N"):
        found.run(9)
    assert len(found.asked) == HOPELESS


def test_one_success_is_hope(journal: Path) -> None:
    outcomes = [BAD] * (HOPELESS - 1) + [good(1.0)] + [BAD] * 4
    found = Fixed(journal, [0.1 * i for i in range(9)], outcomes)
    found.run(9)
    assert len(found.asked) == 9
    assert len(counted(found.study.raw_trials)) == 9


def test_what_is_stored_comes_back_to_the_last_bit(journal: Path) -> None:
    scores = [float(v) for v in np.random.default_rng(0).normal(size=50)]
    outcome = Outcome(math.fsum(scores) / 50, {"task": scores})
    (before,) = Fixed(journal, [0.1234], [outcome]).run(1).finished
    (after,) = Fixed(journal, [0.1234], []).study.finished
    assert before == after
    assert after.scores == {"task": scores}
    assert after.values == {"m p0": 0.1234, "m p1": 0.0}


def test_tasks_kept_apart_have_a_front(journal: Path) -> None:
    study = opened(journal, sampler="nsga2", objectives=2)

    def two(values: Values, best: Scores | None) -> Outcome:
        assert best is None  # there is no single best to race against
        x = values["m p0"]
        return Outcome(0.5, {"a": [x], "b": [1.0 - x, -values["m p1"]]})

    study.run(12, two)
    front = [f for f in study.finished if f.number in study.front]
    assert front
    points = [(f.values["m p0"], 1.0 - f.values["m p0"] - f.values["m p1"]) for f in front]
    assert not any(a[0] > b[0] and a[1] > b[1] for a in points for b in points)


@pytest.mark.parametrize(
    ("age", "longest", "stale"),
    [(599, 1, False), (601, 1, True), (1900, 100, False), (2100, 100, True)],
)
def test_a_trial_is_stale_after_ten_minutes_and_twenty_times_the_longest(
    journal: Path, age: float, longest: float, stale: bool
) -> None:
    study = opened(journal)
    study.run(1, evaluate)
    study = opened(journal)  # that has not read how long it took
    study.trials[0].user_attrs["seconds"] = longest
    study._study.ask()
    running = study.trials[-1]
    running.datetime_start = datetime.now() - timedelta(seconds=age)
    assert study.stale(running) is stale


def test_nothing_is_stale_before_anything_was_finished(journal: Path) -> None:
    study = opened(journal)
    study._study.ask()
    (running,) = study.trials
    running.datetime_start = datetime.now() - timedelta(days=9)
    assert not study.stale(running)
