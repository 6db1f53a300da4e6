"""log p(answer | prompt) of many pairs: left padding, and logits at the answers' positions only.

Let z_t be the logits that predict answer token a_t. Then log p = sum_t (z_t[a_t] - log sum_v
exp z_t[v]), in float32 (float64 for a model in float64), summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from mergekit_unconstrained.evaluation.batching import forward, left_padded, room
from mergekit_unconstrained.evaluation.generation import NOT_FINITE
from mergekit_unconstrained.evaluation.prompts import Pair
from mergekit_unconstrained.evaluation.subject import Advance

_LOGITS = 1 << 26
"""Logits of one forward pass: 256 MiB in float32. A single longer answer is more."""


class Found(NamedTuple):
    """Of one answer: nats, its tokens, and why there is none ("" when there is)."""

    nats: float
    tokens: int
    failure: str = ""


@torch.inference_mode()
def log_likelihoods(
    model: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    advance: Advance = lambda _: None,
) -> list[Found]:
    """One for each pair, in their order."""
    found = [Found(0.0, 0)] * len(pairs)
    longest = room(model)
    asked = []
    for index, pair in enumerate(pairs):
        size = len(pair.prompt) + len(pair.answer) - 1  # the last token is predicted, not read
        if longest is not None and size > longest:
            told = f"prompt and answer have {size + 1} tokens and the model reads {longest} at most"
            found[index] = Found(-math.inf, len(pair.answer), told)
        elif pair.answer:
            asked.append(index)
            continue
        advance(1)
    asked.sort(key=lambda i: -len(pairs[i].prompt) - len(pairs[i].answer))
    width = int(model.get_input_embeddings().weight.shape[0])
    for batch in _batches(asked, pairs, batch_size, width):
        for index, nats in zip(batch, _read(model, [pairs[i] for i in batch]), strict=True):
            failure = "" if math.isfinite(nats) else NOT_FINITE
            found[index] = Found(-math.inf if failure else nats, len(pairs[index].answer), failure)
        advance(len(batch))
    return found


def _batches(
    order: Sequence[int], pairs: Sequence[Pair], batch_size: int, width: int
) -> Iterator[list[int]]:
    """Indices of pairs, so many at a time that their logits stay within _LOGITS."""
    batch: list[int] = []
    keep = 0
    for index in order:
        more = max(keep, len(pairs[index].answer))
        full = len(batch) == batch_size or more * (len(batch) + 1) * width > _LOGITS
        if batch and full:
            yield batch
            batch, more = [], len(pairs[index].answer)
        batch.append(index)
        keep = more
    if batch:
        yield batch


def _read(model: Any, pairs: Sequence[Pair]) -> list[float]:
    """Nats of every answer, from one forward pass."""
    rows = [[*pair.prompt, *pair.answer][:-1] for pair in pairs]
    keep = max(len(pair.answer) for pair in pairs)
    logits = forward(model, left_padded(model, rows), keep).logits
    found = []
    for pair, row in zip(pairs, logits, strict=True):
        z = row[-len(pair.answer) :]  # [answer, V]: rows end in one column
        z = z if z.dtype == torch.float64 else z.float()
        answer = torch.tensor(pair.answer, device=z.device)
        log_p = z.gather(1, answer[:, None])[:, 0] - torch.logsumexp(z, dim=1)
        found.append(math.fsum(log_p.tolist()))
    return found
