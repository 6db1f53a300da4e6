"""Rows of different lengths in one forward pass: left padding, and what a model can be asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mergekit_unconstrained.errors import ModelError


class Padded(NamedTuple):
    """ids, mask and positions, each [rows, longest]; the rows' last tokens stand in one column."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


def left_padded(model: Any, rows: Sequence[Sequence[int]]) -> Padded:
    """Rows of token ids for a model; ModelError for a token it does not embed."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    embedding = model.get_input_embeddings().weight
    if int(ids.max()) >= embedding.shape[0]:
        raise ModelError(
            f"the tokenizer makes token {int(ids.max())}, but the model embeds "
            f"{embedding.shape[0]} tokens only: the tokenizer of another model lies in its folder"
        )
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    device = "cpu" if embedding.is_meta else embedding.device
    return Padded(ids.to(device), mask.to(device), positions.to(device))


def forward(
    model: Any, padded: Padded, keep: int, cache: Any = None, use_cache: bool = False
) -> Any:
    """The model's output with logits [rows, keep, V] of the last columns only.

    cache: of what came before; the mask then covers that too.
    """
    known = _arguments(type(model).forward)
    given: dict[str, Any] = {"input_ids": padded.ids, "attention_mask": padded.mask}
    if "position_ids" in known:
        given["position_ids"] = padded.positions
    if "use_cache" in known:
        given["use_cache"] = use_cache
    if cache is not None:
        given["past_key_values"] = cache
    if "logits_to_keep" in known:
        given["logits_to_keep"] = keep
    out = model(**given)
    out.logits = out.logits[:, -keep:]
    return out


def keeps_a_cache(model: Any) -> bool:
    """Whether a model can go on from keys and values of what it read before."""
    return "past_key_values" in _arguments(type(model).forward)


def room(model: Any) -> int | None:
    """The longest input a model was made for; None when its configuration does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


@lru_cache(maxsize=32)
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
