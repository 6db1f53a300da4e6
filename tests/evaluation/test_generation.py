"""Greedy continuations: the plain model's argmax, whatever the batch; and where they stop."""

from __future__ import annotations

import pytest
import torch

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.evaluation.records import Message
from mergekit_unconstrained.evaluation.subject import Continuation, Subject

PROMPTS = ["a", "What is two and two, and why?", "Hé 東京", "A rather short one", "b", "c"]


def asked(texts=PROMPTS):
    return [[Message("user", text)] for text in texts]


def by_hand(model, tokenizer, prompt, tokens):
    """The likeliest token after another, without cache, padding or batch."""
    ids = tokenizer(prompt)["input_ids"]
    said = []
    for _ in range(tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_they_are_the_plain_models(byte_tokenizer, random_model, architecture):
    settings = {
        "gemma3_text": {"head_dim": 16, "sliding_window": 8},
        "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    }.get(architecture, {})
    model, tokenizer = random_model(architecture, **settings), byte_tokenizer()
    if architecture == "mixtral":
        model = model.float()  # grouped products know no float64
    right = [by_hand(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(right)) > 3  # or the test could not tell rows apart
    for batch_size in (1, 6):
        subject = Subject("m", model, tokenizer, batch_size=batch_size)
        assert subject.generate(asked(), max_new_tokens=12, separator="") == right


def test_rows_that_end_early_leave_the_others_alone(byte_tokenizer, random_model):
    model, tokenizer = random_model(seed=3), byte_tokenizer()
    subject = Subject("m", model, tokenizer, batch_size=6)
    free = subject.generate(asked(), max_new_tokens=16, separator="")
    # a text that four of the six say early
    early = [text for text in free if len(text) > 3]
    stop = tuple({text[1] for text in early[:4]})
    cut = subject.generate(asked(), max_new_tokens=16, stop=stop, separator="")
    firsts = [min((text.find(s) for s in stop if s in text), default=None) for text in free]
    assert cut == [text[:at] for text, at in zip(free, firsts, strict=True)]
    assert sum(at is not None for at in firsts) >= 4


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_ends_with_the_turn(scripted, chat):
    subject = scripted({"2+2=": "4", "3+3=": "six, I say"}, chat=chat)
    found = subject.continuations(asked(["3+3=", "2+2="]), max_new_tokens=11)
    assert found == [Continuation("six, I say"), Continuation("4")]


def test_an_answer_is_cut_before_the_first_stop_text(scripted):
    subject = scripted({"Q": "one\nStop two", "R": "St\nop"})
    found = subject.continuations(asked(["Q", "R"]), max_new_tokens=40, stop=["Stop", "\n"])
    assert [one.text for one in found] == ["one", "St"]
    assert [one.failure for one in found] == ["", ""]
    (found,) = subject.continuations(asked(["Q"]), max_new_tokens=40, stop=["Stop"])
    assert found.text == "one\n"
    assert subject.model.calls < 25  # it does not write on to the limit


def test_an_answer_that_does_not_stop_is_told_and_kept(scripted):
    subject = scripted({"Q": "ab..."})
    (found,) = subject.continuations(asked(["Q"]), max_new_tokens=5)
    assert found == Continuation("ababa", "did not stop within 5 tokens")


def test_the_end_counts_within_the_limit(scripted):
    subject = scripted({"Q": "abc"})
    assert subject.continuations(asked(["Q"]), max_new_tokens=4) == [Continuation("abc")]
    (short,) = subject.continuations(asked(["Q"]), max_new_tokens=3)
    assert short == Continuation("abc", "did not stop within 3 tokens")


def test_logits_that_are_not_finite_fail_their_own_row(scripted):
    subject = scripted({"Q": "NAN", "R": "fine"})
    ill, well = subject.continuations(asked(["Q", "R"]), max_new_tokens=9)
    assert ill == Continuation("", "the logits are not finite")
    assert well == Continuation("fine")


def test_what_a_model_cannot_read_fails_by_itself(byte_tokenizer, random_model):
    subject = Subject("m", random_model("gpt2", seed=1), byte_tokenizer())
    prompts = asked(["x" * 128, "x" * 126])
    found = subject.continuations(prompts, max_new_tokens=9, separator="")
    assert found[0].failure == "the prompt has 128 tokens and the model reads 128 at most"
    assert found[1].failure in ("", "did not stop within 2 tokens")


def test_a_token_that_the_model_does_not_embed_is_one_clear_error(byte_tokenizer, random_model):
    subject = Subject("m", random_model(vocab_size=100, eos_token_id=1), byte_tokenizer())
    with pytest.raises(ModelError, match="embeds 100 tokens only"):
        subject.generate(asked(["é"]), max_new_tokens=2)


def test_sampling_settings_of_a_model_do_not_count(byte_tokenizer, random_model):
    model = random_model()
    right = Subject("m", model, byte_tokenizer()).generate(asked(), max_new_tokens=6)
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    assert Subject("m", model, byte_tokenizer()).generate(asked(), max_new_tokens=6) == right


def test_progress_counts_every_prompt(scripted):
    told = []
    subject = scripted({"Q": "a"}, batch_size=2)
    subject.continuations(asked(["Q"] * 5), max_new_tokens=3, advance=told.append)
    assert sum(told) == 5
