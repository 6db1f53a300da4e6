"""Task arithmetic and its kin as mergekit computes them, rounding for rounding, by pieces.

mergekit works in the dtype of the tensors: for bf16 files every task vector, product and sum is
rounded to bf16. operators.py does not, and is closer to the truth; who wants exactly mergekit's
result, faster, gets it here. The order of the steps is therefore the definition:

    d_i = T_i - T0;  d_i times its mask;  times w_i;  summed over i, in float32 inside;
    elected: only entries with the sign of that sum, the divisor the sum of their w_i;
    divided, times lambda, plus T0.

Magnitudes are those of the rounded d_i. A bf16 or float16 tensor has at most 32,768 of them, so the
k-th largest is read off an exact histogram. Equal magnitudes: the lower index first, where
mergekit's unstable sort leaves it open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from mergekit_unconstrained.numerics import sparsify
from mergekit_unconstrained.numerics.operators import Expert, pieces

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
    masks = [_mask(base, e, keep) for e in experts]
    weights = torch.tensor([e.weight for e in experts], dtype=dtype)
    total = weights.sum()
    if total.abs() < 1e-8:
        total = torch.ones_like(total)
    flat, tensors = base.reshape(-1), [e.tensor.reshape(-1) for e in experts]
    out = torch.empty_like(flat)
    for piece in pieces(base):
        deltas = []
        for tensor, mask, weight in zip(tensors, masks, weights, strict=True):
            d = tensor[piece] - flat[piece]
            if mask is not None:
                d.mul_(mask[piece].view(torch.uint8).to(dtype))
            deltas.append(d.mul_(weight))
        if elect:
            mixed, divisor = _elected(deltas, weights)
            if normalize:
                mixed.div_(divisor)
        else:
            mixed = _sum(deltas)
            if normalize:
                mixed.div_(total)
        if lambda_ != 1:
            mixed.mul_(lambda_)
        torch.add(flat[piece], mixed, out=out[piece])
    return out.reshape(base.shape)


def _sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """As torch sums over an axis: in float32, rounded once."""
    total = terms[0].float()
    for term in terms[1:]:
        total.add_(term)
    return total.to(terms[0].dtype)


def _elected(
    deltas: Sequence[torch.Tensor], weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of what has the sign of the sum, and the sum of its weights, 1 for none."""
    sign = _sum(deltas).float().ge_(0).mul_(2).sub_(1)
    mixed, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights.tolist(), strict=True):
        d = delta.float()
        agrees = torch.sign(d).eq_(sign)
        mixed.addcmul_(agrees, d)
        divisor.add_(agrees, alpha=weight)
    rounded = divisor.to(deltas[0].dtype)
    return mixed.to(deltas[0].dtype), rounded.add_(rounded.eq(0))


# -- what is kept ---------------------------------------------------------------------------------


def _mask(base: torch.Tensor, expert: Expert, keep: Keep) -> torch.Tensor | None:
    """[n] bool, None for all."""
    if keep == "all" or expert.density >= 1:
        return None
    n = base.numel()
    keys = np.empty(n, dtype=np.uint16)
    counts = np.zeros(1 << 15, dtype=np.int64)
    flat, tensor = base.reshape(-1), expert.tensor.reshape(-1)
    for piece in pieces(base):
        d = tensor[piece] - flat[piece]
        part = keys[piece]
        # Without its sign a 16-bit float is an integer that sorts as its magnitude does.
        np.bitwise_and(d.view(torch.int16).numpy().view(np.uint16), 0x7FFF, out=part)
        counts += np.bincount(part, minlength=len(counts))
    below = np.cumsum(counts)
    if keep == "magnitude":
        lowest = n - sparsify.kept_count(n, expert.density)
        return torch.from_numpy(~_lowest(keys, below, lowest, first=False))
    start, end = sparsify.kept_span(n, expert.density, expert.gamma)
    mask = _lowest(keys, below, end, first=True)
    if start:
        mask &= ~_lowest(keys, below, start, first=True)
    return torch.from_numpy(mask)


def _lowest(keys: np.ndarray, below: np.ndarray, k: int, *, first: bool) -> np.ndarray:
    """[n] bool: the k lowest keys. below: how many are at most each key.

    first: whether of equal ones those of lower index are taken, or those of higher.
    """
    if k <= 0 or k >= len(keys):
        return np.full(len(keys), k > 0)
    threshold = int(np.searchsorted(below, k))  # the key of rank k - 1
    taken = keys <= threshold
    surplus = int(below[threshold]) - k
    if surplus:
        equal = np.flatnonzero(keys == threshold)
        taken[equal[-surplus:] if first else equal[:surplus]] = False
    return taken
