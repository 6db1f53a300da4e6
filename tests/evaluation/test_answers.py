"""Answers in words: numbers as people and models write them, equality, regular expressions."""

from __future__ import annotations

from fractions import Fraction

import pytest

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.evaluation.kinds.answers import answer_number, normal, same_number

NUMBERS = {
    "1,234.50": Fraction(2469, 2),
    "-3": -3,
    "−7": -7,
    "1/2": Fraction(1, 2),
    "$5": 5,
    "-$5": -5,
    "$-5": -5,
    "$ 1,000.": 1000,
    "It is 12.": 12,
    "I have 5, then 7.": 7,
    "10-3": 3,
    "9 - 4": 4,
    "x = -3": -3,
    "(-4)": -4,
    "12,13": 13,
    "1,2345": 2345,
    "1.2.3": Fraction(6, 5),
    "No.5": 5,
    ".5": Fraction(1, 2),
    "2e-3": Fraction(1, 500),
    "3.5%": Fraction(7, 2),
    "5km": 5,
    "**42**": 42,
    "3 plus 4 is 7 #### 12": 12,
    "#### 1,200\nand 7": 1200,
    r"so \boxed{\frac{1}{2}}, from 3": Fraction(1, 2),
    r"\boxed{-\dfrac{3}{4}}": Fraction(-3, 4),
    r"it is 2\frac{1}{2}": Fraction(5, 2),
    "-3 1/4 of them": Fraction(-13, 4),
    r"\boxed{1{,}234}": 1234,
    r"$\boxed{10\%}$": 10,
    "Answer: 3 + 4 = 7 apples": 7,
    "the answer is 5 dollars. 3 are left": 5,
    "The answer is: 8": 8,
    "**Answer:** 17": 17,
    "**Answer**: 18 of 20": 18,
    "answer: 1. No, answer: 2": 2,
    "7. The answer: none": 7,
    "1/0": None,
    "x2 and H2O": None,
    "": None,
    "nothing": None,
    "9" * 5000: None,
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items(), ids=[t[:20] for t in NUMBERS])
def test_a_number_is_read(text, number):
    assert answer_number(text) == number


def test_an_exponent_cannot_hang_the_scorer():
    assert answer_number("1e999999999999") != 10  # read as something small, or not at all


@pytest.mark.parametrize(
    ("got", "right", "tolerance", "same"),
    [
        ("0.3333333", "1/3", 1e-6, True),
        ("0.333", "1/3", 1e-6, False),
        ("1000.9", "1000", 1e-3, True),
        ("1001.1", "1000", 1e-3, False),
        ("0.0009", "0", 1e-3, True),
        ("0.0011", "0", 1e-3, False),
        ("5", "-5", 1e-3, False),
    ],
)
def test_the_tolerance_is_absolute_up_to_one_and_relative_beyond(got, right, tolerance, same):
    assert same_number(answer_number(got), answer_number(right), tolerance) is same
    assert not same_number(None, answer_number(right), tolerance)


@pytest.mark.parametrize(
    ("text", "plain"),
    [("  a \n b. ", "a b"), ("Yes!?", "Yes"), ("...", "..."), ("1.5", "1.5"), ("a .", "a")],
)
def test_white_space_and_final_punctuation_do_not_count(text, plain):
    assert normal(text) == plain
    assert normal(text, fold=True) == plain.casefold()


def values(task, subject):
    return [one.value for one in task.score(subject, task.examples("test"))]


def test_exact(scripted, make_task):
    subject = scripted({"q1": " Paris. ", "q2": "paris", "q3": "Paris, I think"})
    rows = [{"prompt": q, "target": "Paris"} for q in ("q1", "q2", "q3")]
    assert values(make_task(rows, kind="exact"), subject) == [1, 0, 0]
    assert values(make_task(rows, kind="exact", ignore_case=True), subject) == [1, 1, 0]
    pattern = make_task(rows, kind="exact", pattern=r"^\s*(\w+)", ignore_case=True)
    assert values(pattern, subject) == [1, 1, 1]


def test_numeric(scripted, make_task):
    subject = scripted({"q1": "3+4 is 7. Answer: $7.00", "q2": "seven", "q3": "7, or 8"})
    rows = [{"prompt": q, "target": t} for q, t in [("q1", 7), ("q2", "7"), ("q3", "... #### 7")]]
    assert values(make_task(rows, kind="numeric"), subject) == [1, 0, 0]
    assert values(make_task(rows, kind="numeric", pattern="^[0-9]"), subject) == [0, 0, 1]


def test_regex(scripted, make_task):
    subject = scripted({"q1": "a cat!", "q2": "cat", "q3": "dog"})
    rows = [{"prompt": q, "target": "c.t"} for q in ("q1", "q2", "q3")]
    assert values(make_task(rows, kind="regex"), subject) == [0, 1, 0]
    assert values(make_task(rows, kind="regex", search=True), subject) == [1, 1, 0]
    extracted = make_task(rows, kind="regex", pattern=r"(\w+)!?$")
    assert values(extracted, subject) == [1, 1, 0]
    either = [{"prompt": "q1", "target": "cat|a cat!"}]  # an alternation is one, too
    assert values(make_task(either, kind="regex"), subject) == [1]


def test_an_answer_that_does_not_stop_is_scored_on_what_was_said(scripted, make_task):
    task = make_task([{"prompt": "q", "target": "7"}], kind="numeric", max_new_tokens=4)
    (one,) = task.score(scripted({"q": "7 ..."}), task.examples("test"))
    assert (one.value, one.said, one.failure) == (1.0, "7 7 ", "did not stop within 4 tokens")


def test_stop_texts_and_messages_are_used(scripted, make_task):
    chat = [{"role": "user", "content": "q"}]
    task = make_task(
        [{"talk": chat, "target": "yes"}], kind="exact", messages="talk", stop="\n", system="Sys."
    )
    (example,) = task.examples("test")
    assert [m.role for m in example.messages] == ["system", "user"]
    (one,) = task.score(scripted({"q": "yes\nno"}), [example])
    assert (one.value, one.said) == (1.0, "yes")


@pytest.mark.parametrize(
    ("kind", "row", "told"),
    [
        ("numeric", {"prompt": "q", "target": "many"}, r"t.jsonl:1: 'target' holds no number"),
        ("regex", {"prompt": "q", "target": "("}, r"t.jsonl:1: 'target' is not a regular expr"),
        ("exact", {"promt": "q", "target": "1"}, r"no column 'prompt' .* mean 'promt'\?"),
        ("exact", {"prompt": "q", "target": ""}, "'target' is empty"),
        ("exact", {"prompt": ["q"], "target": "1"}, r"must be text or a number, not \[\"q\"\]"),
        ("exact", {"prompt": "q", "target": None}, "must be text or a number, not null"),
    ],
)
def test_a_row_that_will_not_do_is_one_clear_error(make_task, kind, row, told):
    with pytest.raises(DataError, match=told):
        make_task([row], kind=kind).examples("test")
