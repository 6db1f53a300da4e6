"""The second pass of layer-wise merging: D of one piece, from what is kept of the task vectors.

The formulas stand in operators.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.numerics.pieces import pieces, scratch


def add(terms: list[torch.Tensor], weights: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Eq. (2): D = sum_i w_i s_i, from the w_i s_i; overwrites the first of them.

    normalize divides by sum_i w_i, unless that is below 1e-8 (mergekit's rule).
    """
    total = terms[0]
    for term in terms[1:]:
        total.add_(term)
    if normalize and (divisor := weights.sum()).abs() >= 1e-8:
        total.div_(divisor)
    return total


def elect(
    terms: list[torch.Tensor],
    weights: torch.Tensor,
    normalize: bool,
    zero_sign: Literal[1, -1] = 1,
) -> torch.Tensor:
    """Eq. (5): D from the w_i s_i; entries against the elected sign are dropped."""
    elected = elected_sign(terms, zero_sign)
    merged, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for term, weight in zip(terms, weights.tolist(), strict=True):
        agrees = torch.sign(term).eq_(elected)
        merged.addcmul_(agrees, term)
        if normalize:
            divisor.add_(agrees, alpha=weight)
    if normalize:
        merged.div_(divisor.add_(torch.eq(divisor, 0, out=elected)))  # nobody agrees: 0 / 1
    return merged


def erase(terms: list[torch.Tensor], eta: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Eq. (8), second pass: D from the selected w_i d_i, weighed by eta_i where the sign agrees.

    normalize divides by the sum of these eta_i, or by 1e-6 where that is less (mergekit's rule).
    """
    merged, divisor = agreeing(terms, eta)
    return merged.div_(divisor.clamp_(min=1e-6)) if normalize else merged


def erase_exactly(terms: list[torch.Tensor], eta: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Eq. (11), second pass: as `erase`, of all w_i d_i, and never divided by more than the sum."""
    merged, divisor = agreeing(terms, eta)
    return merged.div_(divisor.add_(divisor.clone().eq_(0))) if normalize else merged


def agreeing(terms: list[torch.Tensor], eta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The terms that have the elected sign, weighed by eta_i and added; and the eta_i added."""
    elected = elected_sign(terms)
    merged, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for term, share in zip(terms, eta.tolist(), strict=True):
        agrees = torch.sign(term).eq_(elected).mul_(share)
        merged.add_(term.mul_(agrees))
        divisor.add_(agrees)
    return merged, divisor


def weigh(terms: list[torch.Tensor], shares: torch.Tensor, normalize: bool) -> torch.Tensor:  # noqa: ARG001
    """Eq. (10): D from the w_i d_i; the shares sum to 1, so there is nothing to divide by."""
    total = terms[0].mul_(shares[0])
    for term, share in zip(terms[1:], shares[1:], strict=True):
        total.add_(term.mul_(share))
    return total


def weigh_entries(
    terms: list[torch.Tensor],
    _: torch.Tensor,
    normalize: bool,  # noqa: ARG001
) -> torch.Tensor:
    """Eq. (10) with a share for every entry: D = sum_i (w_i d_i)^3 / sum_j (w_j d_j)^2."""
    # Divided by the largest first: squares of small task vectors leave float32's range.
    largest = terms[0].abs()
    for term in terms[1:]:
        torch.maximum(largest, term.abs(), out=largest)
    scale = largest.add(largest.eq(0))
    merged, divisor = torch.zeros_like(scale), torch.zeros_like(scale)
    for term in terms:
        ratio = term.div_(scale)
        square = ratio.square()
        divisor.add_(square)
        merged.add_(square.mul_(ratio))
    return merged.div_(divisor.add_(divisor.eq(0))).mul_(largest)


COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "add": add,
    "elect": elect,
    "erase": erase,
    "erase_exactly": erase_exactly,
    "weigh": weigh,
}


def elected_sign(terms: list[torch.Tensor], zero_sign: Literal[1, -1] = 1) -> torch.Tensor:
    """The sign of the sum, `zero_sign` for a sum of zero."""
    total = terms[0].clone()
    for term in terms[1:]:
        total.add_(term)
    positive = total.ge_(0) if zero_sign > 0 else total.gt_(0)
    return positive.mul_(2).sub_(1)


def average_into(
    out: torch.Tensor, tensors: Sequence[torch.Tensor], weights: torch.Tensor, normalize: bool
) -> None:
    """Eq. (9) for lambda = 1: sum_i w_i T_i, divided by sum_i w_i, written to `out`.

    out, tensors: [n] of any float dtype; the sums are in the dtype of the weights, which for bf16
    is mergekit's own arithmetic, bit for bit.
    """
    divisor = _divisor(weights) if normalize else None
    shares = list(weights)
    total, wide, zeros = scratch(out, 3, weights.dtype)
    zeros.zero_()
    for piece in pieces(out):
        target = out[piece]
        size = len(target)
        mixed = target if out.dtype == weights.dtype else total[:size]
        before = zeros[:size]  # so that -0.0 becomes 0.0, as in mergekit
        for tensor, share in zip(tensors, shares, strict=True):
            x = tensor[piece]
            x = x if x.dtype == mixed.dtype else wide[:size].copy_(x)
            before = torch.addcmul(before, x, share, out=mixed)
        if divisor is not None:
            mixed.div_(divisor)
        if mixed is not target:
            target.copy_(mixed)


def average(
    tensors: Sequence[torch.Tensor], weights: torch.Tensor, normalize: bool
) -> torch.Tensor:
    """Eq. (9) without the base, of pieces in the dtype of the weights."""
    total = torch.empty_like(tensors[0])
    average_into(total, tensors, weights, normalize)
    return total


def _divisor(weights: torch.Tensor) -> torch.Tensor:
    total = weights.sum()
    if total == 0:
        raise RecipeError("linear divides by the sum of the weights, which is zero here")
    return total
