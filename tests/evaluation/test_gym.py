"""reasoning-gym as tasks: its verifier judges, its splits share no question."""

from __future__ import annotations

import pytest

from mergekit_unconstrained.errors import DataError, RecipeError
from mergekit_unconstrained.evaluation.settings import load_tasks
from mergekit_unconstrained.evaluation.splits import check_disjoint

pytest.importorskip("reasoning_gym")


@pytest.fixture
def make_gym(write_tasks):
    def make(**settings):
        (task,) = load_tasks(write_tasks({"g": {"kind": "gym", **settings}}))
        return task

    return make


def test_the_verifier_judges(make_gym):
    task = make_gym(generator="leg_counting", size=3)
    for example in task.examples("test"):
        right = example.target
        assert task.judge(example, right) == 1.0
        assert task.judge(example, f"Three and one.\nAnswer: {right}.") == 1.0
        assert task.judge(example, f"**Answer:** {right}") == 1.0
        assert task.judge(example, f"{int(right) + 1}") == 0.0
        assert task.judge(example, "") == 0.0


def test_partial_credit_counts_where_it_is_asked_for(make_gym):
    strict, mild = (make_gym(generator="chain_sum", size=1, partial=p) for p in (False, True))
    example = strict.examples("test")[0]
    mild.examples("test")
    said = f"I say {example.target} it is"
    assert strict.judge(example, said) == 0.0
    assert 0.0 < mild.judge(example, said) < 1.0


def test_a_pattern_chooses_what_is_judged(make_gym):
    task = make_gym(generator="leg_counting", size=1, pattern=r"<(\d+)>")
    (example,) = task.examples("test")
    assert task.judge(example, f"<1> <{example.target}> 3") == 1.0
    assert task.judge(example, example.target) == 0.0


def test_splits_share_no_question_and_are_the_same_in_every_run(make_gym):
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    told = {"generator": "chain_sum", "size": 20, "config": config}
    task, again = make_gym(**told), make_gym(**told)
    found = {split: task.examples(split) for split in task.splits()}
    assert [len(examples) for examples in found.values()] == [20, 20, 20]
    check_disjoint([task])
    assert {split: list(again.examples(split)) for split in ("test", "search", "development")} == {
        split: list(examples) for split, examples in found.items()
    }
    small = make_gym(**told, limit=5)
    assert list(small.examples("search")) == list(found["search"][:5])
    assert small.key == task.key


def test_neighbouring_seeds_share_nothing(make_gym):
    """reasoning-gym's own seeds 1 and 2 share all but one of their questions."""
    questions = [
        {e.messages[0].content for e in make_gym(generator="chain_sum", seeds=s).examples("test")}
        for s in ({"test": 1}, {"test": 2})
    ]
    assert not questions[0] & questions[1]


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"generator": "leg_countin"}, RecipeError, "Did you mean 'leg_counting'"),
        ({"generator": "leg_counting", "config": {"x": 1}}, RecipeError, "`config` of leg_count"),
        (
            {
                "generator": "chain_sum",
                "size": 300,
                "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            },
            DataError,
            "has only .* questions left where 300 are wanted",
        ),
    ],
)
def test_what_cannot_be_is_one_clear_error(make_gym, settings, error, told):
    with pytest.raises(error, match=f"task 'g': .*{told}"):
        make_gym(**settings).examples("test")
