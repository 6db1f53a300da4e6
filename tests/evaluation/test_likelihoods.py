"""log p(answer | prompt), against the plain model's full logits and a loop of numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergekit_unconstrained.evaluation import likelihoods
from mergekit_unconstrained.evaluation.records import Message
from mergekit_unconstrained.evaluation.subject import Subject

PROMPTS = ["a", "What is two and two, and why?", "Hé 東京", "A rather short one"]
ANSWERS = ["b", "four", "é 😀!", "a much longer answer than all of the others"]


def asked(texts=PROMPTS):
    return [[Message("user", text)] for text in texts]


def by_hand(model, tokenizer, prompt, answer, end):
    """One token after another, from the model's own full logits of one unpadded row."""
    first = tokenizer(prompt + "\n")["input_ids"]
    rest = tokenizer(answer)["input_ids"] + ([tokenizer.eos_token_id] if end else [])
    with torch.no_grad():
        logits = model(torch.tensor([first + rest])).logits[0].double().numpy()
    nats = 0.0
    for t, token in enumerate(rest):
        z = logits[len(first) - 1 + t]
        nats += math.log(np.exp(z[token] - z.max()) / np.exp(z - z.max()).sum())
    return nats


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("end", [True, False])
def test_they_are_the_plain_models(byte_tokenizer, random_model, architecture, end):
    settings = {"head_dim": 16, "sliding_window": 8} if architecture == "gemma3_text" else {}
    model, tokenizer = random_model(architecture, **settings), byte_tokenizer()
    found = Subject("m", model, tokenizer).log_likelihoods(asked(), ANSWERS, end=end)
    for one, prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        right = by_hand(model, tokenizer, prompt, answer, end)
        assert one.nats == pytest.approx(right, rel=1e-9)
        assert one.bytes == len(answer.encode())
        assert one.tokens == len(answer.encode()) + end
        assert one.failure == ""


def test_they_do_not_depend_on_the_batch(byte_tokenizer, random_model, monkeypatch):
    model, tokenizer = random_model(), byte_tokenizer(chat=True)
    together = Subject("m", model, tokenizer, batch_size=4).log_likelihoods(asked(), ANSWERS)
    alone = Subject("m", model, tokenizer, batch_size=1).log_likelihoods(asked(), ANSWERS)
    monkeypatch.setattr(likelihoods, "_LOGITS", 272 * 12)
    bounded = Subject("m", model, tokenizer, batch_size=4).log_likelihoods(asked(), ANSWERS)
    for others in (alone, bounded):
        assert [o.nats for o in others] == pytest.approx([o.nats for o in together], rel=1e-12)


def test_logits_are_computed_at_the_answers_only(byte_tokenizer, random_model):
    model, tokenizer = random_model(), byte_tokenizer()
    seen = []
    model.lm_head.register_forward_hook(lambda _, inputs, out: seen.append(out.shape[1]))
    Subject("m", model, tokenizer).log_likelihoods(asked(["x" * 50]), ["yes"])
    assert seen == [4]


def test_probabilities_of_all_answers_of_one_token_sum_to_one(byte_tokenizer, random_model):
    model, tokenizer = random_model(), byte_tokenizer()
    subject = Subject("m", model, tokenizer)
    pair = subject.prompts.with_answer(asked()[1], "", None, end=False)
    every = [pair._replace(answer=[token]) for token in range(272)]
    found = likelihoods.log_likelihoods(model, every, batch_size=64)
    assert math.fsum(math.exp(one.nats) for one in found) == pytest.approx(1.0, abs=1e-12)


def test_logits_that_are_not_finite_fail_their_own_row_only(byte_tokenizer, random_model):
    model, tokenizer = random_model(), byte_tokenizer()
    right = Subject("m", model, tokenizer).log_likelihoods(asked(["ab", "zb"]), ["c", "c"])
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("z")["input_ids"][0]] = torch.nan
    well, ill = Subject("m", model, tokenizer).log_likelihoods(asked(["ab", "zb"]), ["c", "c"])
    assert well.nats == pytest.approx(right[0].nats, rel=1e-12)
    assert (ill.nats, ill.failure) == (-math.inf, "the logits are not finite")


def test_what_a_model_cannot_read_fails_by_itself(byte_tokenizer, random_model):
    subject = Subject("m", random_model("gpt2"), byte_tokenizer())
    prompts = asked(["x" * 127, "x"])
    fits, _ = subject.log_likelihoods(prompts, ["yz", "y"], end=False, separator="")
    assert fits.failure == ""  # its last token is predicted, never read
    long, short = subject.log_likelihoods(prompts, ["yz", "y"], end=True, separator="")
    assert long.failure == "prompt and answer have 130 tokens and the model reads 128 at most"
    assert (long.nats, short.failure) == (-math.inf, "")


def test_progress_counts_every_prompt(byte_tokenizer, random_model):
    told = []
    subject = Subject("m", random_model(), byte_tokenizer(), batch_size=3)
    subject.log_likelihoods(asked(["a", "b", "c", "x" * 200]), ["y"] * 4, advance=told.append)
    assert sum(told) == 4


def test_remembering_asks_for_no_answer_twice_and_forgets_at_the_end(byte_tokenizer, random_model):
    model, tokenizer = random_model(), byte_tokenizer()
    subject = Subject("m", model, tokenizer)
    read, ticks = [], []
    model.register_forward_pre_hook(
        lambda _, args, given: read.append(len(given["input_ids"])), with_kwargs=True
    )
    plain = subject.log_likelihoods(asked(), ANSWERS)
    with subject.remembering():
        first = subject.log_likelihoods(asked()[:3], ANSWERS[:3])
        again = subject.log_likelihoods(asked(), ANSWERS, advance=ticks.append)
        without_end = subject.log_likelihoods(asked(), ANSWERS, end=False)
    assert read == [4, 3, 1, 4]
    assert sum(ticks) == 4
    assert first == again[:3]
    assert [one.nats for one in again] == pytest.approx([one.nats for one in plain], rel=1e-12)
    assert without_end[0].nats > again[0].nats
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert subject.log_likelihoods(asked(), ANSWERS)[0].nats != again[0].nats


def test_tokens_that_are_kept_are_nobodys_to_change(byte_tokenizer, random_model):
    subject = Subject("m", random_model(), byte_tokenizer())
    pair = subject.prompts.with_answer(asked()[0], "b", None, end=True)
    pair.prompt.append(7)
    pair.answer.clear()
    again = subject.prompts.with_answer(asked()[0], "b", None, end=True)
    assert again.prompt == pair.prompt[:-1]
    assert len(again.answer) == 2
