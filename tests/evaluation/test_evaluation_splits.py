"""No question in two splits; no search on a benchmark's test split."""

from __future__ import annotations

import pytest

from mergekit_unconstrained.errors import DataError, RecipeError
from mergekit_unconstrained.evaluation.settings import load_tasks
from mergekit_unconstrained.evaluation.splits import (
    benchmark_named,
    check_disjoint,
    fitness_refused,
)


def rows(*prompts):
    return [{"prompt": prompt, "target": "t"} for prompt in prompts]


def task(**data):
    return {"kind": "exact", "data": {split: f"{name}.jsonl" for split, name in data.items()}}


def test_disjoint_splits_pass(write_tasks):
    path = write_tasks(
        {"a": task(search="one", test="two"), "b": task(search="one", development="three")},
        one=rows("x", "x", "y"),
        two=rows("z"),
        three=rows("w"),
    )
    check_disjoint(load_tasks(path))


def test_a_question_in_two_splits_of_one_task_is_told(write_tasks):
    path = write_tasks(
        {"a": task(search="one", test="two")}, one=rows("w", "x  Y"), two=rows("z", "v", " X y ")
    )
    told = (
        "example 2 of the test split of task 'a' is also example 1 of the search split of task 'a' "
        r"\(1 such in all\): 'x y'"
    )
    with pytest.raises(DataError, match=told):
        check_disjoint(load_tasks(path))


def test_a_question_in_splits_of_two_tasks_is_told(write_tasks):
    """Other target, other system message: the question is the same."""
    path = write_tasks(
        {"a": task(search="one"), "b": {**task(development="two"), "system": "Be brief."}},
        one=rows("x", "y"),
        two=[{"prompt": p, "target": "u"} for p in ("x", "y")],
    )
    with pytest.raises(DataError, match=r"development split of task 'b'.*task 'a' \(2 such"):
        check_disjoint(load_tasks(path))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("data/gsm8k/test.jsonl", "gsm8k"),
        ("humaneval_test.jsonl", "humaneval"),
        ("MMLU-Pro.test.jsonl", "mmlu"),
        ("gsm-hard/test.jsonl", "gsm_hard"),
        ("math_test.jsonl", "math"),
        ("math/test.jsonl", None),  # a folder of that name may hold anything
        ("gsm8k/train.jsonl", None),
        ("gsm8k.jsonl", None),
        ("test.jsonl", None),
        ("latest/race.jsonl", None),
    ],
)
def test_a_benchmarks_test_split_is_known_by_its_name(file, name):
    assert benchmark_named(file) == name


def test_a_search_on_a_benchmarks_test_split_is_refused(write_tasks):
    settings = {"kind": "exact", "data": {"search": "gsm8k/test.jsonl"}}
    forced = {**settings, "allow_test_split": True}
    only_reported = {"kind": "exact", "data": {"test": "gsm8k/test.jsonl"}}
    path = write_tasks({"a": settings, "b": forced, "c": only_reported})
    refused, allowed, reported = load_tasks(path)
    with pytest.raises(RecipeError, match="task 'a' looks like the test split of gsm8k"):
        fitness_refused(refused)
    fitness_refused(allowed)
    fitness_refused(reported)
