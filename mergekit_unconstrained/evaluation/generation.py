"""Greedy continuations of many prompts: left padding, longest first, keys and values kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mergekit_unconstrained.evaluation.batching import (
    Padded,
    forward,
    keeps_a_cache,
    left_padded,
    room,
)
from mergekit_unconstrained.evaluation.subject import Advance, Continuation

NOT_FINITE = "the logits are not finite"


@dataclass(frozen=True)
class Stop:
    """When an answer is over.

    ends: tokens that end it. texts: before the first of which it is cut. limit: tokens, the end
    included.
    """

    tokenizer: Any
    ends: frozenset[int]
    texts: tuple[str, ...]
    limit: int

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether a stop text has just been written; a look at the last tokens is enough."""
        if not self.texts:
            return False
        # a token has a byte at least, but the first token of a character of several shows nothing
        last = max(len(text.encode()) for text in self.texts) + 8
        tail = self.decode(ids[-last:])
        return any(text in tail for text in self.texts)

    def cut(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The text up to the first stop text, and whether there was one."""
        text = self.decode(ids)
        first = min((at for at in map(text.find, self.texts) if at >= 0), default=None)
        return (text, False) if first is None else (text[:first], True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


@dataclass
class _Row:
    """One answer while it is written. budget: tokens it may take."""

    index: int
    prompt: list[int]
    budget: int
    said: list[int] = field(default_factory=list)
    ended: bool = False
    failure: str = ""

    @property
    def over(self) -> bool:
        return self.ended or bool(self.failure)


@torch.inference_mode()
def greedy(
    model: Any,
    prompts: Sequence[list[int]],
    stop: Stop,
    *,
    batch_size: int,
    advance: Advance = lambda _: None,
) -> list[Continuation]:
    """What a model says after each prompt, always its likeliest token."""
    found = [Continuation("")] * len(prompts)
    longest = room(model)
    rows = []
    for index, prompt in enumerate(prompts):
        budget = stop.limit if longest is None else min(stop.limit, longest - len(prompt))
        if budget > 0:
            rows.append(_Row(index, prompt, budget))
            continue
        told = f"the prompt has {len(prompt)} tokens and the model reads {longest} at most"
        found[index] = Continuation("", told)
        advance(1)
    # Longest first: what does not fit into memory shows at once, not at the end.
    rows.sort(key=lambda row: -len(row.prompt))
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        _speak(model, batch, stop)
        for row in batch:
            text, _ = stop.cut(row.said)
            found[row.index] = Continuation(text, row.failure)
        advance(len(batch))
    return found


def _speak(model: Any, rows: list[_Row], stop: Stop) -> None:
    """Write the answers of one batch; rows that are over leave it when half of them are."""
    caching = keeps_a_cache(model)
    padded, cache = left_padded(model, [row.prompt for row in rows]), None
    while True:
        out = forward(model, padded, keep=1, cache=cache, use_cache=caching)
        logits = out.logits[:, -1]
        chosen = logits.argmax(dim=-1)
        finite = torch.isfinite(logits.amax(dim=-1))  # the largest is NaN where any is
        for row, token, fine in zip(rows, chosen.tolist(), finite.tolist(), strict=True):
            if not row.over:
                _take(row, token, fine, stop)
        left = [i for i, row in enumerate(rows) if not row.over]
        if not left:
            return
        cache = getattr(out, "past_key_values", None) if caching else None
        padded = _further(padded, chosen, cache is not None)
        if 2 * len(left) <= len(rows):
            kept = torch.tensor(left, device=padded.ids.device)
            padded = Padded(*(part[kept] for part in padded))
            if cache is not None:
                cache.batch_select_indices(kept)
            rows = [rows[i] for i in left]


def _take(row: _Row, token: int, finite: bool, stop: Stop) -> None:
    if not finite:
        row.failure = NOT_FINITE
        return
    if token in stop.ends:
        row.ended = True
        return
    row.said.append(token)
    if stop.reached(row.said) and stop.cut(row.said)[1]:
        row.ended = True
    elif len(row.said) >= row.budget:
        row.failure = f"did not stop within {row.budget} tokens"


def _further(padded: Padded, chosen: torch.Tensor, cached: bool) -> Padded:
    """The next input: the new tokens alone behind a cache, else everything so far."""
    fresh = chosen[:, None]
    mask = torch.cat([padded.mask, torch.ones_like(fresh)], dim=1)
    after = padded.positions[:, -1:] + 1
    if cached:
        return Padded(fresh, mask, after)
    ids = torch.cat([padded.ids, fresh], dim=1)
    return Padded(ids, mask, torch.cat([padded.positions, after], dim=1))
