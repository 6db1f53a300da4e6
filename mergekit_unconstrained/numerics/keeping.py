"""The first pass of layer-wise merging: which entries of each task vector are kept.

The formulas stand in operators.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergekit_unconstrained.numerics import sparsify
from mergekit_unconstrained.numerics.masks import Coins
from mergekit_unconstrained.numerics.pieces import offset, pieces, scratch, widened
from mergekit_unconstrained.numerics.select import extreme_mask
from mergekit_unconstrained.numerics.settings import OPERATORS, Expert, Kept, OperatorName, Settings


def keep_all(
    base: torch.Tensor, experts: Sequence[Expert], settings: Settings, dtype: torch.dtype
) -> list[Kept]:
    """`keep` of every expert; random masks are drawn in one pass for all of them."""
    drawn: dict[int, Kept] = {}
    if settings.rules.keep == "random":
        places = [i for i, e in enumerate(experts) if e.kept is None and e.density < 1]
        found = keep_at_random(base, [experts[i] for i in places], settings, dtype)
        drawn = dict(zip(places, found, strict=True))
    return [e.kept or drawn.get(i) or keep(base, e, settings, dtype) for i, e in enumerate(experts)]


def keep(base: torch.Tensor, expert: Expert, settings: Settings, dtype: torch.dtype) -> Kept:
    """Which entries of the task vector d_i the operator keeps, and by what they are rescaled."""
    operator = settings.rules
    if operator.keep == "all" or expert.density >= 1:
        return Kept()
    if operator.keep == "random":
        return keep_at_random(base, [expert], settings, dtype)[0]
    rescale = operator.rescale if settings.rescale is None else settings.rescale
    keys = {"tensor": settings.name, "model": expert.model}
    size = magnitudes(base, expert.tensor, dtype)
    size = size if base.ndim else size.reshape(1)
    if operator.keep == "magnitude":
        mask = sparsify.magnitude_mask(size, expert.density)
    elif operator.keep == "outliers":
        mask = sparsify.outlier_mask(size, expert.density, expert.gamma)
    else:
        mask = sparsify.magprune_mask(
            size, expert.density, expert.epsilon, seed=settings.seed, **keys
        )
    mask = mask.to(base.device)
    return Kept(mask.reshape(-1), sparsify.rescale_factor(size, mask, rescale, expert.density))


def keep_at_random(
    base: torch.Tensor, experts: Sequence[Expert], settings: Settings, dtype: torch.dtype
) -> list[Kept]:
    """`keep` for random masks: drawn, compared and summed while a piece is in the cache."""
    rescale = settings.rules.rescale if settings.rescale is None else settings.rescale
    flat, tensors = base.reshape(-1), [e.tensor.reshape(-1) for e in experts]
    kept = [torch.empty(flat.shape, dtype=torch.bool) for _ in experts]
    coins = [
        Coins(e.density, seed=settings.seed, tensor=settings.name, model=e.model) for e in experts
    ]
    before, after = [0.0] * len(experts), [0.0] * len(experts)
    start, row, share = scratch(base, 3, dtype)
    for piece in pieces(base):
        for coin, mask in zip(coins, kept, strict=True):
            coin.toss(mask[piece].numpy())
        if rescale != "l1":
            continue
        t0 = widened(flat[piece], start)
        for i, (tensor, mask) in enumerate(zip(tensors, kept, strict=True)):
            d = offset(tensor[piece], t0, row).abs_()
            before[i] += float(d.sum())
            after[i] += float(torch.dot(d, share[: len(d)].copy_(mask[piece].view(torch.uint8))))
    factors = [1.0] * len(experts)
    if rescale == "l1":
        factors = [sparsify.l1_factor(b, a) for b, a in zip(before, after, strict=True)]
    elif rescale == "inverse":
        factors = [1.0 / e.density if e.density > 0 else 1.0 for e in experts]
    return [Kept(m.to(base.device), f) for m, f in zip(kept, factors, strict=True)]


def keep_between(
    base: torch.Tensor, expert: Expert, settings: Settings, bounds: tuple[float, float] | None
) -> Kept:
    """Which entries are kept where low <= |d_i| <= high are, None: no entry."""
    operator = settings.rules
    rescale = operator.rescale if settings.rescale is None else settings.rescale
    size = magnitudes(base, expert.tensor, torch.promote_types(base.dtype, settings.dtype))
    low, high = bounds or (1.0, 0.0)
    mask = size.ge(low).logical_and_(size.le(high))
    factor = sparsify.rescale_factor(size, mask, rescale, expert.density)
    return Kept(mask.reshape(-1), factor)


def kept_ranks(operator: OperatorName, n: int, density: float, gamma: float) -> tuple[int, int]:
    """What `ties` and `breadcrumbs` keep of n entries by rank: first <= r < end, 0 the smallest."""
    if OPERATORS[operator].keep == "outliers":
        return sparsify.kept_span(n, density, gamma) if density < 1 else (0, n)
    return n - sparsify.kept_count(n, density), n


@torch.no_grad()
def magnitudes(base: torch.Tensor, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """|d_i| in full, of the base's shape."""
    flat, other = base.reshape(-1), tensor.reshape(-1)
    out = torch.empty(flat.shape, dtype=dtype, device=base.device)
    (start,) = scratch(base, 1, dtype)
    for piece in pieces(base):
        offset(other[piece], widened(flat[piece], start), out[piece]).abs_()
    return out.reshape(base.shape)


def select(
    base: torch.Tensor, experts: Sequence[Expert], settings: Settings, dtype: torch.dtype
) -> tuple[list[Kept], torch.Tensor]:
    """Eqs. (8) and (11), first pass: what is merged of all experts, and their shares eta, [N].

    Select the fraction `select_topk` of the entries whose variance over the experts is not zero, by
    variance; eta_i is the share of expert i in the mean square of what is left, 1 / N when they sum
    to nothing. `sce` merges the selected entries alone, and takes 1 / N below a sum of 1e-6 already
    (mergekit's rules).
    """
    published = settings.rules.combine == "erase_exactly"
    mask = None
    if settings.select_topk < 1:
        variance = variances(base, experts, dtype)
        count = int(torch.count_nonzero(variance) * settings.select_topk)
        mask = extreme_mask(variance, count, largest=True)
    means = mean_squares(base, experts, mask, dtype)
    total = means.sum()
    enough = total > 0 if published else total >= 1e-6
    eta = means / total if enough else torch.full_like(means, 1 / len(experts))
    return [Kept(None if published else mask)] * len(experts), eta


def variances(base: torch.Tensor, experts: Sequence[Expert], dtype: torch.dtype) -> torch.Tensor:
    """Of the w_i d_i of every entry, [n]."""
    flat, tensors = base.reshape(-1), [e.tensor.reshape(-1) for e in experts]
    out = torch.empty(flat.shape, dtype=dtype, device=base.device)
    # float64 as inside torch.var; files of 16 bits need no more digits than float32 has.
    wide = dtype if base.dtype.itemsize == 2 else torch.float64
    start, *rows = scratch(base, len(experts) + 1, dtype)
    for piece in pieces(base):
        t0 = widened(flat[piece], start)
        d = [
            offset(tensor[piece], t0, row).mul_(e.weight)
            for tensor, row, e in zip(tensors, rows, experts, strict=True)
        ]
        out[piece] = population_variance(d, wide)
    return out


def mean_squares(
    base: torch.Tensor, experts: Sequence[Expert], mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Of the w_i d_i of every expert, [N]; entries that are not in the mask count as zero."""
    flat, tensors = base.reshape(-1), [e.tensor.reshape(-1) for e in experts]
    n, half = flat.numel(), base.dtype.itemsize == 2
    means = torch.zeros(len(experts), dtype=torch.float64)
    # Squares of files of more than 16 bits are summed as torch sums a whole tensor: to mergekit's
    # last bit.
    squares = torch.empty((0 if half else len(experts), n), dtype=dtype, device=base.device)
    start, row, share = scratch(base, 3, dtype)
    for piece in pieces(base):
        t0 = widened(flat[piece], start)
        chosen = None if mask is None else share[: len(t0)].copy_(mask[piece].view(torch.uint8))
        for i, (tensor, expert) in enumerate(zip(tensors, experts, strict=True)):
            d = offset(tensor[piece], t0, row).mul_(expert.weight)
            if chosen is not None:
                d.mul_(chosen)
            if half:
                means[i] += torch.dot(d, d).to(means)
            else:
                torch.square(d, out=squares[i, piece])
    return (means / n).to(base.device, dtype) if half else squares.mean(dim=1)


def population_variance(
    tensors: Sequence[torch.Tensor], dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Of every entry over the tensors: Welford's recurrence in a dtype.

    Over whole tensors at a time it takes a thirtieth of the time of torch.var.
    """
    mean = tensors[0].to(dtype, copy=True)
    squares = torch.zeros_like(mean)
    for count, tensor in enumerate(tensors[1:], start=2):
        d = torch.sub(tensor, mean)
        squares.addcmul_(d, d, value=(count - 1) / count)
        mean.add_(d, alpha=1 / count)
    return squares.div_(len(tensors))
