"""The arithmetic of layer-wise merging: one core, eight operators.

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

Shared settings: `normalize` divides D by the sum of the weights that took part; `rescale` is what
`sparsify.apply_mask` does. Where a paper and mergekit differ we follow mergekit by default, so that
the same recipe means the same, and offer the paper's rule as a setting. Everything is computed in
float32 or wider, whatever the dtype of the files. Signs: a sum of exactly zero elects +, and a zero
entry agrees with nobody, as in mergekit.

Two passes over a tensor: the first finds out which entries of each expert are kept (nothing to do
at density 1), the second combines in pieces that stay in the processor's cache, so that no
full-size float32 copy of a bf16 parent is ever made for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from mergekit_unconstrained.numerics import sparsify
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
]


@dataclass(frozen=True)
class Operator:
    """What an operator does to the task vectors; the defaults are those of mergekit's method."""

    keep: Literal["all", "magnitude", "random", "outliers", "magprune", "variance"] = "all"
    elect_sign: bool = False
    normalize: bool = False
    rescale: sparsify.Rescale = "none"
    parameters: frozenset[str] = frozenset()  # which optional parameters mean something here


OPERATORS: dict[OperatorName, Operator] = {
    "task_arithmetic": Operator(),
    "ties": Operator(
        "magnitude", elect_sign=True, normalize=True, parameters=frozenset({"density", "rescale"})
    ),
    "dare_linear": Operator(
        "random", rescale="l1", parameters=frozenset({"density", "rescale", "seed"})
    ),
    "dare_ties": Operator(
        "random",
        elect_sign=True,
        rescale="l1",
        parameters=frozenset({"density", "rescale", "seed"}),
    ),
    "breadcrumbs": Operator("outliers", parameters=frozenset({"density", "rescale", "gamma"})),
    "della": Operator(
        "magprune",
        elect_sign=True,
        normalize=True,
        rescale="l1",
        parameters=frozenset({"density", "rescale", "seed", "epsilon"}),
    ),
    "sce": Operator("variance", normalize=True, parameters=frozenset({"select_topk"})),
    "linear": Operator(normalize=True),
}
assert tuple(OPERATORS) == get_args(OperatorName)


@dataclass(frozen=True)
class Expert:
    """One expert's share in one tensor.

    tensor: T_i, any float dtype, the shape of the base. weight: w_i. density: fraction of entries
    kept. gamma: fraction of outliers dropped (breadcrumbs). epsilon: half-width of the keeping
    probability (della). model: its name, which keys its random masks.
    """

    tensor: torch.Tensor
    weight: float
    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.15
    model: str = ""


@dataclass(frozen=True)
class Settings:
    """What all experts share. None for `normalize` and `rescale` is the operator's default.

    dtype is the arithmetic's; float64 inputs raise it to float64. name is the tensor's, and keys
    the random masks.
    """

    operator: OperatorName = "task_arithmetic"
    lambda_: float = 1.0
    normalize: bool | None = None
    rescale: sparsify.Rescale | None = None
    select_topk: float = 1.0
    seed: int = 0
    name: str = ""
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Kept:
    """What the first pass found for one expert: s_i = factor * d_i where mask is not False."""

    mask: torch.Tensor | None = None
    factor: float | torch.Tensor = 1.0


CHUNK = 1 << 17
"""Entries combined at a time on a CPU: half a MiB in float32, a few of which fit a core's cache."""


def merge(base: torch.Tensor, experts: Sequence[Expert], settings: Settings) -> torch.Tensor:
    """Eq. (1): one merged tensor.

    base: T0, any shape and float dtype. Returns a new tensor of its shape and dtype; no expert, or
    only zero task vectors, give the base.
    """
    if not experts or base.numel() == 0:
        return base.clone()
    operator = OPERATORS[settings.operator]
    normalize = operator.normalize if settings.normalize is None else settings.normalize
    dtype = torch.promote_types(base.dtype, settings.dtype)
    if operator.keep == "variance":
        return _sce(base.to(dtype), experts, settings, normalize).to(base.dtype)

    kept = [
        keep(e.tensor.to(dtype) - base, e, settings) if sparse(e, operator) else Kept()
        for e in experts
    ]
    masks = [k.mask.reshape(-1) if k.mask is not None else None for k in kept]
    weights = torch.tensor([e.weight for e in experts], dtype=dtype, device=base.device)
    flat, tensors = base.reshape(-1), [e.tensor.reshape(-1) for e in experts]
    out = torch.empty_like(flat)
    step = CHUNK if base.device.type == "cpu" else flat.numel()
    for start in range(0, flat.numel(), step):
        piece = slice(start, start + step)
        t0 = flat[piece].to(dtype)
        if settings.operator == "linear":
            d = average([t[piece].to(dtype) for t in tensors], weights, normalize)
            if settings.lambda_ == 1:
                out[piece] = d
                continue
            d.sub_(t0)
        else:
            terms = []
            for tensor, mask, k, expert in zip(tensors, masks, kept, experts, strict=True):
                term = tensor[piece].to(dtype, copy=True).sub_(t0)
                if mask is not None:
                    term.mul_(mask[piece])
                    if not (isinstance(k.factor, float) and k.factor == 1.0):
                        term.mul_(k.factor)
                # Multiplied and then added, never fused: bit-identical to mergekit's arithmetic.
                terms.append(term.mul_(expert.weight))
            combine = elect if operator.elect_sign else add
            d = combine(terms, weights, normalize)
        if settings.lambda_ != 1:
            d.mul_(settings.lambda_)
        out[piece] = d.add_(t0)
    return out.reshape(base.shape)


def sparse(expert: Expert, operator: Operator) -> bool:
    """Whether the operator drops entries of this expert one by one."""
    return operator.keep not in ("all", "variance") and expert.density < 1


def keep(delta: torch.Tensor, expert: Expert, settings: Settings) -> Kept:
    """Which entries of the task vector d_i the operator keeps, and by what they are rescaled."""
    operator = OPERATORS[settings.operator]
    keys = {"tensor": settings.name, "model": expert.model}
    if operator.keep == "magnitude":
        mask = sparsify.magnitude_mask(delta, expert.density)
    elif operator.keep == "outliers":
        mask = sparsify.outlier_mask(delta, expert.density, expert.gamma)
    elif operator.keep == "random":
        mask = sparsify.random_mask(delta, expert.density, seed=settings.seed, **keys)
    else:
        mask = sparsify.magprune_mask(
            delta, expert.density, expert.epsilon, seed=settings.seed, **keys
        )
    rescale = operator.rescale if settings.rescale is None else settings.rescale
    return Kept(mask, sparsify.rescale_factor(delta, mask, rescale, expert.density))


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


def elect(terms: list[torch.Tensor], weights: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Eq. (5): D from the w_i s_i; entries against the elected sign are dropped."""
    total = terms[0].clone()
    for term in terms[1:]:
        total.add_(term)
    majority = torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
    merged = torch.zeros_like(total)
    divisor = torch.zeros_like(total)
    for term, weight in zip(terms, weights, strict=True):
        agrees = torch.sign(term).eq_(majority)
        merged.add_(term.mul_(agrees))
        if normalize:
            divisor.add_(agrees.mul_(weight))
    if normalize:
        divisor[divisor == 0] = 1
        merged.div_(divisor)
    return merged


def average(
    tensors: Sequence[torch.Tensor], weights: torch.Tensor, normalize: bool
) -> torch.Tensor:
    """Eq. (9) without the base: sum_i w_i T_i, divided by sum_i w_i."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.addcmul_(tensor, weight)
    return total.div_(weights.sum()) if normalize else total


def _sce(
    base: torch.Tensor, experts: Sequence[Expert], settings: Settings, normalize: bool
) -> torch.Tensor:
    """Eq. (8), as mergekit has it: the task vectors are masked, not only the weights.

    Select the fraction `select_topk` of the entries whose variance over the experts is not zero, by
    variance; weigh each expert by the mean square of what is left of it (uniformly when the sum is
    below 1e-6, as in mergekit); erase entries against the sign of the sum. Multiplying d_i by
    `weight` first is ours, and changes nothing at the default weight of 1.
    """
    d = torch.stack([(e.tensor.to(base.dtype) - base).mul_(e.weight) for e in experts])
    if settings.select_topk < 1:
        variance = torch.var(d, dim=0, unbiased=False)
        count = int(torch.count_nonzero(variance) * settings.select_topk)
        d.mul_(extreme_mask(variance.reshape(-1), count, largest=True).reshape(base.shape))
    energy = d.square().reshape(len(experts), -1).mean(dim=1)
    eta = energy / energy.sum() if energy.sum() >= 1e-6 else energy.fill_(1).div_(len(experts))
    majority = torch.where(d.sum(dim=0) >= 0, 1.0, -1.0).to(d.dtype)
    weights = eta.reshape(-1, *[1] * base.ndim) * (torch.sign(d) == majority)
    merged = d.mul_(weights).sum(dim=0)
    if normalize:
        merged.div_(weights.sum(dim=0).clamp_(min=1e-6))
    return merged.mul_(settings.lambda_).add_(base)
