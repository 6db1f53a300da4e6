"""Score a model on the demo's held-out sets: log-likelihood of the answer, and exact match.

The log-likelihood is the primary figure: it is smooth, needs one forward pass, and a 135M model
moves it long before its greedy answers become right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_unconstrained.demo.tasks import (
    GENERATED,
    TEST_SIZE,
    Example,
    Split,
    Task,
    prompt,
    token_ids,
)

BATCH = 32


@dataclass(frozen=True)
class Score:
    """Figures of one model on one task; standard errors over the examples."""

    log_likelihood: float  # nats per answer token: mean over the examples of each one's mean
    log_likelihood_se: float
    exact_match: float  # fraction of greedy answers that the verifier accepts
    exact_match_se: float
    n: int  # examples behind the log-likelihood
    n_generated: int  # examples behind the exact match: the first of them


def load(folder: Path, adapter: Path | None = None) -> tuple[Any, Any]:
    """A model folder in float32, an adapter folded into it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # float32: the same figures on processors with and without bfloat16 units
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def log_likelihoods(
    model: Any,
    pairs: Sequence[tuple[list[int], list[int]]],
    batch: int = BATCH,
    done: Callable[[int], object] = lambda _: None,
) -> list[float]:
    """log p(answer | prompt) / len(answer) in nats, for every (prompt ids, answer ids).

    Right padding: under causal attention no real token sees a later pad.
    """
    results = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    shared = _shared_beginning([asked for asked, _ in pairs])
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [(pairs[i][0] + pairs[i][1])[len(shared) :] for i in chosen]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = [[1] * (len(shared) + len(row)) + [0] * (length - len(row)) for row in rows]
        hidden = model.model(
            input_ids=ids,
            attention_mask=torch.tensor(mask),
            past_key_values=_read(model, shared, len(rows)),
        ).last_hidden_state
        for row, i in enumerate(chosen):
            first, answer = len(pairs[i][0]) - len(shared), pairs[i][1]
            # position t predicts token t + 1
            logits = model.lm_head(hidden[row, first - 1 : first - 1 + len(answer)])
            chances = torch.log_softmax(logits.double(), dim=-1)
            results[i] = chances[torch.arange(len(answer)), torch.tensor(answer)].mean().item()
        done(len(chosen))
    return results


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch: int = BATCH,
    done: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """Greedy continuations. Padding comes before what differs: new tokens must follow directly."""
    answers = [""] * len(prompts)
    asked: list[list[int]] = tokenizer(list(prompts))["input_ids"]
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    shared = _shared_beginning(asked)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [asked[i][len(shared) :] for i in chosen]
        length = max(map(len, rows))
        ids = [shared + [tokenizer.pad_token_id] * (length - len(row)) + row for row in rows]
        mask = [[1] * len(shared) + [0] * (length - len(row)) + [1] * len(row) for row in rows]
        output = model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            past_key_values=_read(model, shared, len(rows)),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        fresh = output[:, len(shared) + length :]
        texts = tokenizer.batch_decode(fresh, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text.strip()
        done(len(chosen))
    return answers


def _shared_beginning(rows: Sequence[list[int]]) -> list[int]:
    """The ids that all rows begin with, leaving each at least one of its own.

    System message and the task's instruction are two thirds of the demo's prompts: they are read
    once a batch.
    """
    # first and last in dictionary order differ earliest
    first, last = min(row[:-1] for row in rows), max(row[:-1] for row in rows)
    same = itertools.takewhile(lambda ids: ids[0] == ids[1], zip(first, last, strict=False))
    return [one for one, _ in same]


def _read(model: Any, shared: list[int], rows: int) -> Any:
    """The key-value cache after the shared beginning, for a batch of so many rows."""
    if not shared:
        return None
    cache = model.model(input_ids=torch.tensor([shared]), use_cache=True).past_key_values
    cache.batch_repeat_interleave(rows)
    return cache


def score(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    generated: int = GENERATED,
    done: Callable[[int], object] = lambda _: None,
) -> Score:
    """Both figures on one task; `done` is called with len(examples) + generated in sum."""
    pairs = [token_ids(tokenizer, example) for example in examples]
    likelihoods = log_likelihoods(model, pairs, done=done)
    asked = examples[:generated]
    prompts = [prompt(tokenizer, example) for example in asked]
    answers = greedy(model, tokenizer, prompts, task.max_new_tokens, done=done)
    right = [
        float(task.is_right(example, text)) for example, text in zip(asked, answers, strict=True)
    ]
    return Score(*_mean(likelihoods), *_mean(right), n=len(examples), n_generated=len(asked))


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    split: Split = "test",
    count: int = TEST_SIZE,
    done: Callable[[int], object] = lambda _: None,
) -> dict[str, Score]:
    """Score one model on every task."""
    return {
        name: score(model, tokenizer, task, task.examples(split, count), done=done)
        for name, task in tasks.items()
    }


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation / sqrt n)."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.fsum((value - mean) ** 2 for value in values) / max(n - 1, 1)
    return mean, math.sqrt(spread / n)
