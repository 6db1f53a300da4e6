"""Task arithmetic and its kin as mergekit computes them, rounding for rounding, by pieces.

mergekit works in the dtype of the tensors: for bf16 files every task vector, product and sum is
rounded to bf16. operators.py does not, and is closer to the truth; who wants exactly mergekit's
result, faster, gets it here. The order of the steps is therefore the definition:

    d_i = T_i - T0;  d_i times its mask;  times w_i;  summed over i, in float32 inside;
    elected: only entries with the sign of that sum, the divisor the sum of their w_i;
    divided, times lambda, plus T0.

Magnitudes are those of the rounded d_i. Equal magnitudes: the lower index first, where mergekit's
unstable sort leaves it open. What is kept is decided again, entry by entry, in the pass that
merges: of the size of a tensor there are only the magnitudes of one expert at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from mergekit_unconstrained.numerics import sparsify
from mergekit_unconstrained.numerics.pieces import pieces, scratch
from mergekit_unconstrained.numerics.select import Extreme
from mergekit_unconstrained.numerics.settings import Expert

Keep = Literal["all", "magnitude", "outliers"]
HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def merge(
    base: torch.Tensor,
    experts: Sequence[Expert],
    *,
    keep: Keep = "all",
    elect: bool = False,
    normalize: bool = False,
    lambda_: float = 1.0,
) -> torch.Tensor:
    """One merged tensor. base, experts: of one 16-bit dtype, on the CPU."""
    dtype = base.dtype
    assert dtype in HALF
    weights = torch.tensor([e.weight for e in experts], dtype=dtype)
    factors = _factors(base, experts, weights, keep)
    total = weights.sum()
    if total.abs() < 1e-8:
        total = torch.ones_like(total)
    flat, tensors = base.reshape(-1), [e.tensor.reshape(-1) for e in experts]
    out = torch.empty_like(flat)
    rows = scratch(flat, len(experts) + 2, dtype)
    wide = scratch(flat, 5, torch.float32)
    for piece in pieces(base):
        size = len(flat[piece])
        t0, mixed, *deltas = (row[:size] for row in rows)
        sums, *room = (row[:size] for row in wide)
        t0.copy_(flat[piece])
        for tensor, factor, d in zip(tensors, factors, deltas, strict=True):
            # Copied first: 16-bit arithmetic on what is not in the cache takes twice the time.
            d.copy_(tensor[piece]).sub_(t0)
            d.mul_(factor.of(d))
        _sum(deltas, sums)
        if elect:
            divisor = _elected(deltas, weights, sums, room)
        mixed.copy_(sums)
        if normalize:
            mixed.div_(divisor if elect else total)
        if lambda_ != 1:
            mixed.mul_(lambda_)
        torch.add(t0, mixed, out=out[piece])
    return out.reshape(base.shape)


def _sum(terms: Sequence[torch.Tensor], total: torch.Tensor) -> None:
    """As torch sums over an axis: in float32, to be rounded once."""
    total.copy_(terms[0])
    for term in terms[1:]:
        total.add_(term)


def _elected(
    deltas: Sequence[torch.Tensor],
    weights: torch.Tensor,
    sums: torch.Tensor,
    room: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The sum of what has the sign of the sum, in its place; gives the sum of its weights.

    The weights' sum is 1 where there is nothing.
    """
    sign, d, agrees, divisor = room
    torch.ge(sums, 0, out=sign).mul_(2).sub_(1)
    sums.zero_()
    divisor.zero_()
    for delta, weight in zip(deltas, weights.tolist(), strict=True):
        torch.sign(d.copy_(delta), out=agrees).eq_(sign)
        sums.addcmul_(agrees, d)
        divisor.add_(agrees, alpha=weight)
    return divisor.add_(torch.eq(divisor, 0, out=sign)).to(deltas[0].dtype)


# -- what is kept ---------------------------------------------------------------------------------


class _Factor:
    """What the task vector of one expert is multiplied by: its weight, or 0 for what is dropped."""

    def __init__(self, weight: torch.Tensor, upper: Extreme | None, lower: Extreme | None) -> None:
        """weight: w_i, of no axis. upper: what is kept, None for all; lower: but for these."""
        self._weight = weight
        self._upper, self._lower = upper, lower
        bits = int(weight.reshape(1).view(torch.int16).numpy().view(np.uint16)[0])
        self._bits, self._sign = np.uint16(bits & 0x7FFF), np.uint16(bits & 0x8000)

    def of(self, d: torch.Tensor) -> torch.Tensor:
        """Of the next entries d_i, [m]."""
        if self._upper is None:
            return self._weight
        keys = _keys(d, np.empty(len(d), np.uint16))
        kept = self._upper.take(keys, np.empty(len(d), np.bool_))
        if self._lower is not None:
            kept &= ~self._lower.take(keys, np.empty(len(d), np.bool_))
        # The bits of the weight times 0 or 1; a zero has the sign that w_i * 0 has.
        np.multiply(kept, self._bits, out=keys)
        if self._sign:
            np.bitwise_or(keys, self._sign, out=keys)
        return torch.from_numpy(keys.view(np.int16)).view(d.dtype)


def _keys(d: torch.Tensor, out: np.ndarray) -> np.ndarray:
    """Without its sign a 16-bit float is an integer that sorts as its magnitude does."""
    return np.bitwise_and(d.view(torch.int16).numpy().view(np.uint16), np.uint16(0x7FFF), out=out)


def _factors(
    base: torch.Tensor, experts: Sequence[Expert], weights: torch.Tensor, keep: Keep
) -> list[_Factor]:
    """One for each expert."""
    n = base.numel()
    flat = base.reshape(-1)
    keys = np.empty(n if any(e.density < 1 for e in experts) and keep != "all" else 0, np.uint16)
    room = scratch(flat, 2, base.dtype)
    factors = []
    for expert, weight in zip(experts, weights, strict=True):
        if keep == "all" or expert.density >= 1:
            factors.append(_Factor(weight, None, None))
            continue
        tensor = expert.tensor.reshape(-1)
        for piece in pieces(base):
            t0, d = (row[: len(flat[piece])] for row in room)
            d.copy_(tensor[piece]).sub_(t0.copy_(flat[piece]))
            _keys(d, keys[piece])
        if keep == "magnitude":
            count = sparsify.kept_count(n, expert.density)
            factors.append(_Factor(weight, Extreme(keys, count, largest=True), None))
            continue
        start, end = sparsify.kept_span(n, expert.density, expert.gamma)
        upper = Extreme(keys, end, largest=False)
        lower = Extreme(keys, start, largest=False) if start else None
        factors.append(_Factor(weight, upper, lower))
    return factors
