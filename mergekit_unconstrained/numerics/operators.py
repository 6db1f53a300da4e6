"""The arithmetic of layer-wise merging: one core, ten operators.

Notation: T0 the base, T_i the experts, d_i = T_i - T0 the task vectors, w_i the weights, s_i the
sparsified task vectors, D the merged task vector. Always

    result = T0 + lambda * D                                                              (1)

    task_arithmetic   D = sum_i w_i d_i                              arXiv 2212.04089     (2)
    dare_linear       (2) over randomly kept entries s_i             arXiv 2311.03099     (3)
    breadcrumbs       (2) without smallest entries and outliers      arXiv 2312.06795     (4)
    ties              sign election over the largest entries,        arXiv 2306.01708     (5)
                      D = sum_i m_i w_i s_i / sum_i m_i w_i,
                      m_i = [sign(s_i w_i) = sign(sum_j s_j w_j)]
    dare_ties         (5) over randomly kept entries                 arXiv 2311.03099     (6)
    della             (5) over entries kept by rank                  arXiv 2406.11617     (7)
    sce               variance selects, energy weighs, signs erase   arXiv 2408.07990     (8)
    linear            D = sum_i w_i T_i / sum_i w_i - T0             arXiv 2203.05482     (9)
    varm              D = sum_i v_i w_i d_i, v_i the share of        arXiv 2402.16107    (10)
                      expert i in sum_j mean((w_j d_j)^2)
    sce_dense         (8), where the selection decides the shares,   arXiv 2408.07990    (11)
                      and all entries are merged

(11) is what the authors of SCE run in their code for FuseChat; (8) is mergekit's, which merges the
selected entries alone, and calls shares equal that are small. FuseChat takes select_topk 0.1.
(10) is VaRM, one weight per tensor; with it every weight 1 is the published method.

Shared settings: `normalize` divides D by the sum of the weights that took part; `rescale` is what
`sparsify.rescale_factor` does. Where a paper and mergekit differ we follow mergekit by default, so
that the same recipe means the same, and offer the paper's rule as a setting. Everything is computed
in float32 or wider, whatever the dtype of the files. Signs: a sum of exactly zero elects +, and a
zero entry agrees with nobody, as in mergekit.

Two passes over a tensor: the first finds out which entries of each expert are kept (nothing to do
at density 1), the second combines in pieces that stay in the processor's cache, so that no
full-size float32 copy of a bf16 parent is ever made for it. Masks are multiplied by, never selected
with, so that NaN and infinity reach the result and are seen; and they are widened from bytes, since
a product of bool and float takes torch four times as long.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from mergekit_unconstrained.numerics.combining import (
    COMBINE,
    average,
    average_into,
    elect,
    weigh_entries,
)
from mergekit_unconstrained.numerics.initial import energy, squared_change
from mergekit_unconstrained.numerics.keeping import keep_all, select
from mergekit_unconstrained.numerics.pieces import as_float, offset, pieces, scratch, widened
from mergekit_unconstrained.numerics.settings import Expert, Kept, Settings


@torch.no_grad()
def merge(base: torch.Tensor, experts: Sequence[Expert], settings: Settings) -> torch.Tensor:
    """Eq. (1): one merged tensor.

    base: T0, any shape and float dtype. Returns a new tensor of its shape and dtype; no expert, or
    only zero task vectors, give the base.
    """
    if not experts or base.numel() == 0:
        return base.clone()
    operator = settings.rules
    normalize = operator.normalize if settings.normalize is None else settings.normalize
    dtype = torch.promote_types(base.dtype, settings.dtype)
    shares = torch.tensor([e.weight for e in experts], dtype=dtype, device=base.device)
    if operator.keep == "variance":
        kept, shares = select(base, experts, settings, dtype)
    else:
        kept = keep_all(base, experts, settings, dtype)
    combine = COMBINE[operator.combine]
    if operator.combine == "elect":
        combine = functools.partial(elect, zero_sign=settings.zero_sign)
    elif operator.combine == "weigh" and settings.granularity == "element":
        combine = weigh_entries
    elif operator.combine == "weigh":
        squares = [e.weight**2 * squared_change(e.tensor, base) for e in experts]
        shares = shares.new_tensor(energy(squares))

    flat, tensors = base.reshape(-1), [e.tensor.reshape(-1) for e in experts]
    out = torch.empty_like(flat)
    if settings.operator == "linear" and settings.lambda_ == 1:
        average_into(out, tensors, shares, normalize)
        return out.reshape(base.shape)
    start, *rows = scratch(base, len(experts) + 1, dtype)
    for piece in pieces(base):
        t0 = widened(flat[piece], start)
        if settings.operator == "linear":
            d = average([t[piece].to(dtype) for t in tensors], shares, normalize)
            d.sub_(t0)
        else:
            terms = [
                weighted(offset(tensor[piece], t0, row), expert, k, piece)
                for tensor, row, expert, k in zip(tensors, rows, experts, kept, strict=True)
            ]
            d = combine(terms, shares, normalize)
        if settings.lambda_ != 1:
            d.mul_(settings.lambda_)
        if out.dtype == dtype:
            torch.add(d, t0, out=out[piece])
        else:
            out[piece] = d.add_(t0)
    return out.reshape(base.shape)


def weighted(term: torch.Tensor, expert: Expert, kept: Kept, piece: slice) -> torch.Tensor:
    """w_i s_i of some entries, from their d_i, which it overwrites."""
    if kept.mask is not None:
        term.mul_(as_float(kept.mask[piece], term.dtype))
    if kept.factor != 1:
        term.mul_(kept.factor)
    # One by one, and added afterwards, never fused: bit-identical to mergekit's arithmetic.
    return term.mul_(expert.weight)


@torch.no_grad()
def sum_signs(base: torch.Tensor, experts: Sequence[Expert], settings: Settings) -> torch.Tensor:
    """The sign of sum_i w_i s_i, 0 for a sum of zero: [n], the flat entries of a tensor."""
    dtype = torch.promote_types(base.dtype, settings.dtype)
    kept = keep_all(base, experts, settings, dtype)
    flat = base.reshape(-1)
    out = torch.zeros(flat.shape, dtype=dtype, device=base.device)
    start, row = scratch(base, 2, dtype)
    for piece in pieces(base):
        t0 = widened(flat[piece], start)
        for e, k in zip(experts, kept, strict=True):
            out[piece] += weighted(offset(e.tensor.reshape(-1)[piece], t0, row), e, k, piece)
    return out.sign_()
