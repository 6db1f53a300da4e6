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
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.numerics import sparsify
from mergekit_unconstrained.numerics.initial import energy, squared_change
from mergekit_unconstrained.numerics.masks import Coins
from mergekit_unconstrained.numerics.select import extreme_mask

OperatorName = Literal[
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "della",
    "sce",
    "linear",
    "varm",
    "sce_dense",
]


@dataclass(frozen=True)
class Operator:
    """What an operator does to the task vectors; the defaults are those of mergekit's method."""

    keep: Literal["all", "magnitude", "random", "outliers", "magprune", "variance"] = "all"
    combine: Literal["add", "elect", "erase", "erase_exactly", "weigh"] = "add"
    normalize: bool = False
    rescale: sparsify.Rescale = "none"
    parameters: frozenset[str] = frozenset()  # which optional parameters mean something here


OPERATORS: dict[OperatorName, Operator] = {
    "task_arithmetic": Operator(),
    "ties": Operator(
        "magnitude",
        combine="elect",
        normalize=True,
        parameters=frozenset({"density", "rescale", "scope"}),
    ),
    "dare_linear": Operator(
        "random", rescale="l1", parameters=frozenset({"density", "rescale", "seed"})
    ),
    "dare_ties": Operator(
        "random",
        combine="elect",
        rescale="l1",
        parameters=frozenset({"density", "rescale", "seed"}),
    ),
    "breadcrumbs": Operator(
        "outliers", parameters=frozenset({"density", "rescale", "gamma", "scope"})
    ),
    "della": Operator(
        "magprune",
        combine="elect",
        normalize=True,
        rescale="l1",
        parameters=frozenset({"density", "rescale", "seed", "epsilon"}),
    ),
    "sce": Operator(
        "variance", combine="erase", normalize=True, parameters=frozenset({"select_topk"})
    ),
    "linear": Operator(normalize=True),
    "varm": Operator(combine="weigh"),
    "sce_dense": Operator(
        "variance", combine="erase_exactly", normalize=True, parameters=frozenset({"select_topk"})
    ),
}
assert tuple(OPERATORS) == get_args(OperatorName)


@dataclass(frozen=True)
class Kept:
    """What the first pass found for one expert: s_i = factor * d_i where mask is not False.

    mask: [n] bool, None where every entry is kept.
    """

    mask: torch.Tensor | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Expert:
    """One expert's share in one tensor.

    tensor: T_i, any float dtype, the shape of the base. weight: w_i. density: fraction of entries
    kept. gamma: fraction of outliers dropped (breadcrumbs). epsilon: half-width of the keeping
    probability (della). model: its name, which keys its random masks. kept: what the first pass
    would find, where that is known already.
    """

    tensor: torch.Tensor
    weight: float
    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.15
    model: str = ""
    kept: Kept | None = None


@dataclass(frozen=True)
class Settings:
    """What all experts share. None for `normalize` and `rescale` is the operator's default.

    dtype is the arithmetic's; float64 inputs raise it to float64. name is the tensor's, and keys
    the random masks. zero_sign: what a sum of exactly zero elects in (5). granularity: whether (10)
    has one share a tensor or one an entry.
    """

    operator: OperatorName = "task_arithmetic"
    lambda_: float = 1.0
    normalize: bool | None = None
    rescale: sparsify.Rescale | None = None
    select_topk: float = 1.0
    seed: int = 0
    name: str = ""
    dtype: torch.dtype = torch.float32
    zero_sign: Literal[1, -1] = 1
    granularity: Literal["tensor", "element"] = "tensor"
    custom: Operator | None = None

    @property
    def rules(self) -> Operator:
        """What the operator does; `custom` where that is none of OPERATORS."""
        return self.custom or OPERATORS[self.operator]

    @classmethod
    def of(cls, name: str, parameters: Mapping[str, Any]) -> Settings:
        """For one tensor, from the parameters of a recipe of `layerwise` (validated)."""
        normalize, rescale = parameters["normalize"], parameters["rescale"]
        return cls(
            operator=parameters["operator"],
            lambda_=parameters["lambda"],
            normalize=None if normalize == "auto" else normalize == "true",
            rescale=None if rescale == "auto" else rescale,
            select_topk=parameters["select_topk"],
            seed=parameters["seed"],
            name=name,
            dtype=getattr(torch, parameters["precision"]),
        )


CHUNK = 1 << 16
"""Entries combined at a time on a CPU: 256 KiB in float32, several of which fit a core's cache."""


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


class Behind(threading.local):
    """What a thread is told of the pieces it leaves behind: the entries of the tensor, the end."""

    tell: Callable[[int, int], None] | None = None


BEHIND = Behind()


def pieces(base: torch.Tensor) -> Iterator[slice]:
    """The flat entries of a tensor, as many at a time as the processor's cache holds well."""
    count = base.numel()
    step = CHUNK if base.device.type == "cpu" else count
    for start in range(0, count, step):
        yield slice(start, start + step)
        if BEHIND.tell is not None:
            BEHIND.tell(count, min(start + step, count))


def scratch(base: torch.Tensor, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Room for `count` pieces, of which every piece overwrites what the one before left.

    Memory that was in the processor's cache a moment ago; fresh one costs more than the arithmetic.
    """
    size = min(CHUNK, base.numel()) if base.device.type == "cpu" else base.numel()
    return torch.empty((count, size), dtype=dtype, device=base.device).unbind()


def widened(x: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Some entries in the arithmetic's dtype, which is that of the room (scratch)."""
    return x if x.dtype == room.dtype else room[: len(x)].copy_(x)


def offset(x: torch.Tensor, t0: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """d_i of some entries, from those of T_i and of T0 (widened), written to the room."""
    d = room[: len(x)]
    return torch.sub(x, t0, out=d) if x.dtype == d.dtype else d.copy_(x).sub_(t0)


def as_float(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as zeros and ones."""
    return mask.view(torch.uint8).to(dtype)


# -- the first pass: what is kept -----------------------------------------------------------------


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


# -- the second pass: D of one piece --------------------------------------------------------------


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
