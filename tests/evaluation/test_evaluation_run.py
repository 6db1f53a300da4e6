"""One model on some tasks: order, cache, progress, and examples that go wrong."""

from __future__ import annotations

import pytest
import torch

from mergekit_unconstrained.errors import DataError, ModelError
from mergekit_unconstrained.evaluation.cache import ScoreCache
from mergekit_unconstrained.evaluation.records import Example, Message, Scored
from mergekit_unconstrained.evaluation.run import Results, TaskResult, evaluate
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.evaluation.task import Task


class Counting(Task):
    """Worth a tenth of the example's number; some raise as they are told to."""

    name, unit, weight, solved_at, key = "counting", "tenths", 1.0, 1.0, "k"

    def __init__(self, n=40, raises=None, most=None):
        self.n, self.raises, self.most = n, dict(raises or {}), most
        self.asked, self.batches = [], []

    def splits(self):
        return ("search", "test")

    def examples(self, split):
        return [Example(str(i), (Message("user", f"q{i}"),)) for i in range(self.n)]

    def score(self, subject, examples, advance=lambda _: None):
        ids = [int(example.id) for example in examples]
        for i in ids:
            advance(1)
            if i in self.raises:
                raise self.raises[i]
        if self.most is not None and subject.batch_size > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.asked += ids
        self.batches.append(subject.batch_size)
        return [Scored(str(i), i / 10) for i in ids]


def subject(weights="w", batch_size=2):
    return Subject("m", None, None, weights, batch_size)


def test_scores_are_in_the_examples_order():
    told = []
    found = evaluate(subject(), [Counting()], advance=told.append)
    assert [one.id for one in found["counting"].scored] == [str(i) for i in range(40)]
    assert found["counting"].values == [i / 10 for i in range(40)]
    assert sum(told) == 40
    assert (found.model, found.split) == ("m", "test")


def test_a_limit_takes_the_first():
    assert evaluate(subject(), [Counting()], limit=3)["counting"].values == [0.0, 0.1, 0.2]


def test_known_scores_are_not_had_again(tmp_path):
    cache, task = ScoreCache(tmp_path), Counting()
    first = evaluate(subject(), [task], "test", cache, 10)
    told = []
    second = evaluate(subject(), [task], "test", ScoreCache(tmp_path), 12, told.append)
    assert task.asked == list(range(12))
    assert sum(told) == 12
    assert second["counting"].values[:10] == first["counting"].values
    evaluate(subject("other"), [task], "test", cache, 1)
    evaluate(subject(""), [task], "test", cache, 1)
    assert task.asked[12:] == [0, 0]


def test_a_killed_run_loses_a_piece_at_most(tmp_path):
    cache = ScoreCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate(subject(), [Counting(raises={39: KeyboardInterrupt()})], "test", cache)
    task = Counting()
    evaluate(subject(), [task], "test", cache)
    assert task.asked == list(range(32, 40))


def test_what_crashes_fails_alone_and_is_tried_again_the_next_time(tmp_path):
    cache, told = ScoreCache(tmp_path), []
    task = Counting(raises={3: ValueError("no\n such  thing"), 17: AssertionError()})
    found = evaluate(subject(), [task], "test", cache, None, told.append)["counting"]
    assert [one.id for one in found.scored] == [str(i) for i in range(40)]
    assert found.failures == 2
    assert found.scored[3] == Scored("3", 0.0, failure="ValueError: no such thing")
    assert found.scored[17] == Scored("17", 0.0, failure="AssertionError")
    assert found.scored[4] == Scored("4", 0.4)
    assert sum(told) == 40
    healed = Counting()
    evaluate(subject(), [healed], "test", cache)
    assert healed.asked == [3, 17]


def test_where_memory_runs_out_batches_become_smaller():
    task = Counting(most=4)
    found = evaluate(subject(batch_size=16), [task])["counting"]
    assert (found.failures, set(task.batches)) == (0, {4})
    hopeless = evaluate(subject(batch_size=2), [Counting(n=2, most=0)])["counting"]
    assert [one.failure for one in hopeless.scored] == ["OutOfMemoryError: CUDA out of memory"] * 2


def test_what_the_user_can_mend_ends_the_run():
    with pytest.raises(ModelError, match="mend me"):
        evaluate(subject(), [Counting(raises={1: ModelError("mend me")})])
    with pytest.raises(DataError, match="'counting' has no 'development' split"):
        evaluate(subject(), [Counting()], "development")


def test_a_score_that_is_no_number_is_a_failure():
    class Odd(Counting):
        worst = -7.0

        def score(self, subject, examples, advance=lambda _: None):
            return [Scored(example.id, float("nan")) for example in examples]

    (one,) = evaluate(subject(), [Odd(n=1)])["counting"].scored
    assert one == Scored("0", -7.0, failure="the score is not finite")


def test_a_model_that_fails_on_some_examples_goes_on(scripted, make_task):
    script = {"one": "1", "two": "NAN", "three": "CRASH", "four": "4..."}
    rows = [{"prompt": p, "target": str(i)} for i, p in enumerate(script, 1)]
    task = make_task(rows, kind="numeric", max_new_tokens=3)
    found = evaluate(scripted(script), [task])["t"]
    assert found.values == [1, 0, 0, 0]
    assert [one.failure for one in found.scored] == [
        "",
        "the logits are not finite",
        "RuntimeError: the model fell over",
        "did not stop within 3 tokens",
    ]


def test_the_mean_over_tasks_is_weighted():
    def result(name, weight, *values):
        scored = tuple(Scored(str(i), v) for i, v in enumerate(values))
        return TaskResult(name, "u", weight, 1.0, scored)

    found = Results("m", "test", (result("a", 3.0, 1.0, 0.0), result("b", 1.0, 0.9)))
    assert found.mean == pytest.approx((3 * 0.5 + 0.9) / 4)
    assert Results("m", "test", (result("a", 0.0, 1.0),)).mean == 0.0
