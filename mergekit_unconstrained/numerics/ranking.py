"""Magnitudes ranked once, so that every later density costs one comparison per entry.

For searches, which merge the same parents hundreds of times at other densities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mergekit_unconstrained.numerics import sparsify
from mergekit_unconstrained.numerics.keeping import magnitudes
from mergekit_unconstrained.numerics.select import stable_order
from mergekit_unconstrained.numerics.settings import OPERATORS, Expert, Kept, Settings


@dataclass(frozen=True)
class Ranking:
    """The rank of every entry of a tensor by magnitude, 0 the first; equal ones by index.

    ranks: [n] int32. The masks are those of `select.extreme_mask`, bit for bit.
    """

    ranks: torch.Tensor

    @classmethod
    def of(cls, magnitudes: torch.Tensor, *, largest: bool) -> Ranking:
        """largest: whether the largest entry is the first. magnitudes: [n], non-negative."""
        n = magnitudes.numel()
        order = stable_order(magnitudes.reshape(1, -1), largest=largest)[0]
        ranks = torch.empty(n, dtype=torch.int32, device=magnitudes.device)
        ranks[order] = torch.arange(n, dtype=torch.int32, device=magnitudes.device)
        return cls(ranks)

    def between(self, first: int, end: int) -> torch.Tensor:
        """[n] bool: the entries of rank first <= r < end."""
        if first <= 0:
            return self.ranks < end
        return (self.ranks >= first) & (self.ranks < end)


def ranking(base: torch.Tensor, tensor: torch.Tensor, settings: Settings) -> Ranking | None:
    """The magnitudes of a task vector, ranked as the operator asks; None where it asks not."""
    keep = OPERATORS[settings.operator].keep
    if keep not in ("magnitude", "outliers"):
        return None
    dtype = torch.promote_types(base.dtype, settings.dtype)
    flat = magnitudes(base, tensor, dtype).reshape(-1)
    return Ranking.of(flat, largest=keep == "magnitude")


def kept(found: Ranking, expert: Expert, settings: Settings) -> Kept | None:
    """What `operators.keep` finds; None where it must look at the magnitudes themselves."""
    operator = OPERATORS[settings.operator]
    rescale = operator.rescale if settings.rescale is None else settings.rescale
    if expert.density >= 1:
        return Kept()
    if rescale == "l1":
        return None
    n = found.ranks.numel()
    if operator.keep == "magnitude":
        mask = found.between(0, sparsify.kept_count(n, expert.density))
    else:
        mask = found.between(*sparsify.kept_span(n, expert.density, expert.gamma))
    inverse = rescale == "inverse" and expert.density > 0
    return Kept(mask, 1.0 / expert.density if inverse else 1.0)
