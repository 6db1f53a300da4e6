"""Multiple choice and likelihoods as tasks, against the subject's own log-likelihoods."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.evaluation.kinds.likelihood import WORST
from mergekit_unconstrained.evaluation.records import Message
from mergekit_unconstrained.evaluation.subject import Likelihood, Subject

ROWS = [
    {"prompt": "Which one?", "choices": ["é", "a very much longer one"], "target": 1},
    {"prompt": "And now?", "choices": ["x", "yy", "zzz"], "target": "yy"},
    {"prompt": "Digits?", "choices": ["1", "0"], "target": "0"},
]


class Fixed:
    """A subject whose likelihoods are given."""

    def __init__(self, *likely):
        self.likely = list(likely)

    def log_likelihoods(self, prompts, answers, **_):
        self.asked = list(zip((p[-1].content for p in prompts), answers, strict=True))
        return self.likely


@pytest.mark.parametrize(
    ("normalise", "chosen"), [("none", "aa"), ("bytes", "bbbbbb"), ("tokens", "ccc")]
)
def test_lengths_are_divided_by(make_task, normalise, chosen):
    row = {"prompt": "q", "choices": ["aa", "bbbbbb", "ccc"], "target": 0}
    task = make_task([row], kind="choice", normalise=normalise, before=" ")
    likely = [Likelihood(-4.0, 1, 2), Likelihood(-6.0, 3, 6), Likelihood(-5.0, 4, 3)]
    subject = Fixed(*likely)
    (one,) = task.score(subject, task.examples("test"))
    assert (one.said, one.value) == (chosen, float(chosen == "aa"))
    assert subject.asked == [("q", " aa"), ("q", " bbbbbb"), ("q", " ccc")]


@pytest.mark.parametrize(
    ("kind", "settings", "read"),
    [
        ("likelihood", {}, "Q\n"),
        ("likelihood", {"separator": ""}, "Q"),
        ("choice", {}, "Q\n"),
        ("choice", {"separator": ""}, "Q"),
        ("choice", {"before": " "}, "Q"),  # its white space takes the newline's place
        ("choice", {"before": "a"}, "Q\n"),
        ("choice", {"before": " ", "separator": "="}, "Q="),
    ],
)
def test_what_stands_before_a_choice_or_target(make_task, byte_tokenizer, kind, settings, read):
    row = {"prompt": "Q", "choices": ["x", "y"], "target": "x"}
    subject = Subject("m", None, byte_tokenizer())
    seen = []

    def note(*asked, **_):
        seen.append(subject.tokenizer.decode(subject.prompts.with_answer(*asked).prompt))
        return [Likelihood(-1.0, 1, 1)]

    def likely(prompts, answers, *, chat, end, separator, **_):
        return [
            one
            for messages, answer in zip(prompts, answers, strict=True)
            for one in note(messages, answer, chat, end, separator)
        ]

    subject.log_likelihoods = likely
    task = make_task([row], kind=kind, **settings)
    task.score(subject, task.examples("test"))
    assert set(seen) == {read}


def test_the_likeliest_choice_is_taken(make_task, byte_tokenizer, random_model):
    task = make_task(ROWS, kind="choice")
    subject = Subject("m", random_model(), byte_tokenizer())
    told = []
    found = task.score(subject, task.examples("test"), told.append)
    assert sum(told) == len(ROWS)
    for row, one in zip(ROWS, found, strict=True):
        likely = subject.log_likelihoods(
            [[Message("user", row["prompt"])]] * len(row["choices"]), row["choices"], end=False
        )
        best = max(zip(likely, row["choices"], strict=True), key=lambda p: p[0].nats / p[0].bytes)
        right = row["target"] if isinstance(row["target"], str) else row["choices"][row["target"]]
        assert (one.said, one.value) == (best[1], float(best[1] == right))


def test_a_text_that_is_a_choice_is_no_index(make_task):
    assert [e.target for e in make_task(ROWS, kind="choice").examples("test")] == ["1", "1", "1"]


def test_a_choice_without_likelihood_is_a_failure(make_task):
    task = make_task([ROWS[2]], kind="choice")
    bad = Likelihood(-math.inf, 1, 1, "the logits are not finite")
    (one,) = task.score(Fixed(Likelihood(-1.0, 1, 1), bad), task.examples("test"))
    assert (one.value, one.failure) == (0.0, "the logits are not finite")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"choices": ["a"], "target": 0}, "two choices at least"),
        ({"choices": "ab", "target": 0}, "must be a list of texts"),
        ({"choices": ["a", "b"], "target": 2}, "neither one of the choices nor an index from 0"),
        ({"choices": ["a", "b"], "target": "c"}, "neither one of the choices nor an index from 0"),
        ({"choices": ["a", "b"], "target": True}, "neither one of the choices nor an index from 0"),
        ({"choice": ["a", "b"], "target": 0}, "no column 'choices' .* mean 'choice'"),
    ],
)
def test_a_row_that_will_not_do_is_one_clear_error(make_task, row, told):
    with pytest.raises(DataError, match=f"t.jsonl:1: .*{told}"):
        make_task([{"prompt": "q", **row}], kind="choice").examples("test")


def test_a_likelihood_is_nats_per_byte_of_the_answer(make_task, byte_tokenizer, random_model):
    rows = [{"prompt": "q", "target": "né"}, {"prompt": "r", "target": "a"}]
    task = make_task(rows, kind="likelihood")
    subject = Subject("m", random_model(), byte_tokenizer())
    found = task.score(subject, task.examples("test"))
    asked = [[Message("user", row["prompt"])] for row in rows]
    likely = subject.log_likelihoods(asked, ["né", "a"], end=True)
    assert [one.value for one in found] == pytest.approx(
        [likely[0].nats / 3, max(WORST, likely[1].nats)]
    )
    assert likely[0].nats / 3 > WORST
    assert (task.solved_at, task.unit) == (None, "nats per byte")


def test_the_probability_of_an_answer_is_that_of_all_its_tokens(
    make_task, byte_tokenizer, random_model
):
    rows = [{"prompt": "q", "target": "né"}, {"prompt": "r", "target": "a"}]
    task = make_task(rows, kind="likelihood", measure="probability")
    subject = Subject("m", random_model(), byte_tokenizer())
    with torch.no_grad():
        subject.model.lm_head.weight.zero_()  # every token is as likely as every other
    width = subject.model.lm_head.weight.shape[0]
    found = task.score(subject, task.examples("test"))
    # three bytes and one, and the end of turn
    assert [one.value for one in found] == pytest.approx([width**-4, width**-2])
    assert (task.solved_at, task.unit, task.worst) == (None, "probability", 0.0)
    with torch.no_grad():
        subject.model.lm_head.weight.fill_(torch.nan)
    (ill, _) = task.score(subject, task.examples("test"))
    assert (ill.value, ill.failure) == (0.0, "the logits are not finite")


def test_no_failure_is_better_than_an_honest_answer(make_task, byte_tokenizer, random_model):
    task = make_task([{"prompt": "q", "target": "a"}] * 2, kind="likelihood")
    subject = Subject("m", random_model(), byte_tokenizer())
    with torch.no_grad():
        subject.model.lm_head.weight.mul_(1e4)
    honest = task.score(subject, task.examples("test"))
    assert all(one.value >= WORST and not one.failure for one in honest)
    with torch.no_grad():
        subject.model.lm_head.weight.fill_(torch.nan)
    (ill, _) = task.score(subject, task.examples("test"))
    assert (ill.value, ill.failure) == (WORST, "the logits are not finite")
