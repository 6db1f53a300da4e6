"""Parameter competition balancing: PCB-Merging.

Reference: Du et al., "Parameter Competition Balancing for Model Merging",
https://arxiv.org/abs/2410.02396, and the authors' code `PCB_merge`.

    A_i     = |d_i|, clamped to its own quantiles q and 1 - q                               (1)
    self_i  = exp(N minmax(A_i)^2)                                                          (2)
    inter_i = tanh(d_i * sum_j d_j)                                                         (3)
    beta_i  = self_i * inter_i                                                              (4)
    s_i     = minmax(beta_i clamped from below at its quantile 1 - density)                 (5)
    D       = sum_i w_i sign(d_i) A_i s_i / max(sum_i s_i, 1e-12)                           (6)

w_i is `weight`, the paper's lambda_i. variant: language has q = 1e-4; vision has q = 1e-2 and

    n_i     = sign(d_i) minmax(A_i),   inter_i = sum_j tanh(n_i n_j)                        (7)

as in the authors' code for either. The paper takes a softmax in (2) and (3); their code does not,
and we follow the code. It puts the whole model into one vector: scope `model`, for which every
parent is read four times before the merge (engine/prepass.py). With scope `tensor`, ours, quantiles
and extremes are those of each tensor.

A quantile is a sorted entry, not an interpolation: of n entries, number int(n q) for a lower bound,
number int(n (1 - q) - 1) for an upper one. minmax of equal entries is zero (the code divides by
zero), and so is D where no s_i is positive.

Cost: two selections by rank for every task vector and two for its scores, and about ten passes over
the entries. Memory of scope `tensor`, measured with N = 2, parents included: 4 times the tensor in
float32; of scope `model`, next to none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mergekit_unconstrained.compat import PerNonBase, TensorGroup
from mergekit_unconstrained.engine.context import measured
from mergekit_unconstrained.engine.footprint import KEPT_BY_ALLOCATOR, per_entry, with_model_scope
from mergekit_unconstrained.engine.plan import PlannedTensor
from mergekit_unconstrained.engine.prepass import Chunk, Measure, Rows, of_model, one_value
from mergekit_unconstrained.engine.task_vectors import (
    add,
    add_entrywise,
    is_finite,
    task_vectors,
)
from mergekit_unconstrained.engine.tensor_method import base_of, tensor_method
from mergekit_unconstrained.numerics.pieces import pieces
from mergekit_unconstrained.numerics.quantiles import Summary

Finite = Annotated[float, Field(allow_inf_nan=False)]
Variant = Literal["language", "vision"]
QUANTILE: dict[str, float] = {"language": 1e-4, "vision": 1e-2}
MAGNITUDES, SCORES = "pcb: |d|", "pcb: beta"


@dataclass(frozen=True)
class Range:
    """Bounds of numbers x, [N, n], for every expert; each [N, 1]."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, x: Iterable[torch.Tensor], ranks: tuple[int, int]) -> Range:
        """The numbers of two ranks of every expert's x, [n], 0 the smallest; x is reordered."""
        bounds = []
        for row in x:
            values = row.cpu().numpy()
            values.partition(sorted(ranks))  # a selection, not a sort
            bounds.append(row.new_tensor([values[rank] for rank in ranks]))
            del row, values  # before the next one takes as much
        return cls(*torch.stack(bounds, dim=1)[:, :, None])

    @classmethod
    def found(
        cls,
        summaries: Sequence[Summary],
        ranks: Callable[[int], tuple[int, int]],
        like: torch.Tensor,
    ) -> Range:
        """The same of every expert's whole model. ranks: two of so many."""
        bounds = [[s.entries.get(rank, 0.0) for rank in ranks(s.count)] for s in summaries]
        return cls(*(like.new_tensor(column)[:, None] for column in zip(*bounds, strict=True)))

    def minmax(self, x: torch.Tensor) -> torch.Tensor:
        """The clamped x, low to 0 and high to 1; zero where low is high."""
        width = self.high - self.low
        return (x.clamp(self.low, self.high) - self.low) / torch.where(width > 0, width, torch.inf)


def magnitude_ranks(variant: Variant, n: int) -> tuple[int, int]:
    """Which of n sorted magnitudes are the bounds of Eq. (1)."""
    q = QUANTILE[variant]
    return int(n * q), int(n * (1 - q) - 1)


def score_ranks(density: float, n: int) -> tuple[int, int]:
    """Which of n sorted scores are the bounds of Eq. (5); density 0 leaves nothing between them."""
    return min(int(n * (1 - density)), n - 1), n - 1


def scores(d: torch.Tensor, magnitudes: Range, variant: Variant) -> torch.Tensor:
    """beta_i of Eq. (4), [N, n]."""
    normed = magnitudes.minmax(d.abs())
    itself = torch.exp(len(d) * normed.square())  # (2)
    if variant == "language":
        return itself * torch.tanh(d * d.sum(dim=0))  # (3), (4)
    n = normed.mul_(d.sign())
    return itself * torch.stack([torch.tanh(n_i * n).sum(dim=0) for n_i in n])  # (7), (4)


def own_bounds(d: torch.Tensor, density: float, variant: Variant) -> tuple[Range, Range]:
    """Of the magnitudes and of the scores, from these task vectors alone, [N, n]."""
    magnitudes = Range.of((d_i.abs() for d_i in d), magnitude_ranks(variant, d.shape[1]))
    beta = torch.empty_like(d)
    for piece in pieces(d[0]):
        beta[:, piece] = scores(d[:, piece], magnitudes, variant)
    return magnitudes, Range.of(beta, score_ranks(density, d.shape[1]))


def pcb_vector(
    d: torch.Tensor,  # [N, n], task vectors or some of their entries
    weights: torch.Tensor,  # [N], w_i
    variant: Variant,
    magnitudes: Range,
    beta: Range,
) -> torch.Tensor:
    """D of Eq. (6), [n]."""
    clamped = d.abs().clamp(magnitudes.low, magnitudes.high) * d.sign()  # (1)
    s = beta.minmax(scores(d, magnitudes, variant))  # (5)
    return (weights[:, None] * clamped * s).sum(dim=0) / s.sum(dim=0).clamp(min=1e-12)


@tensor_method("pcb", "PCB-Merging")
def pcb(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite] = 1.0,  # w_i
    variant: Variant = "language",
    density: Annotated[float, Field(ge=0, le=1)] = 0.1,  # fraction of entries that compete
    scope: Literal["tensor", "model"] = "tensor",  # of quantiles and extremes
    lambda_: Finite = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eqs. (1) to (7) for one tensor in float32 or wider; the base's shape and dtype."""
    t0, ids = base_of(group), [entry.id for entry in group.non_base]
    w = torch.tensor(
        [weight[i] for i in ids],
        dtype=torch.promote_types(t0.dtype, torch.float32),
        device=t0.device,
    )

    def merged_between(magnitudes: Range, beta: Range) -> torch.Tensor:
        return add_entrywise(group, lambda_, lambda d: pcb_vector(d, w, variant, magnitudes, beta))

    if scope == "model":
        ranks = {
            MAGNITUDES: functools.partial(magnitude_ranks, variant),
            SCORES: functools.partial(score_ranks, density),
        }
        magnitudes, beta = (
            Range.found([measured(name)[str(i)] for i in ids], f, w) for name, f in ranks.items()
        )
        return merged_between(magnitudes, beta)
    d = task_vectors(group).reshape(len(ids), -1)
    if not d.numel() or not is_finite(d):  # no quantiles among NaN: the mean shows where it is
        return add(group, (w[:, None] * d).mean(dim=0).reshape(t0.shape), lambda_)
    magnitudes, beta = own_bounds(d, density, variant)
    del d
    return merged_between(magnitudes, beta)


pcb.entrywise = with_model_scope
pcb.by_pieces = False  # its selections are of whole tensors
pcb.work = per_entry(4, 8, KEPT_BY_ALLOCATOR)  # magnitudes of one; d_i and beta_i


def needs(tensors: Sequence[PlannedTensor]) -> tuple[Measure, ...]:
    """With `scope: model`, the bounds of all magnitudes, and then of all scores."""
    if not of_model(tensors):
        return ()
    variant, density = one_value(tensors, "variant"), one_value(tensors, "density")
    ranks = functools.partial(magnitude_ranks, variant)

    def beta(chunk: Chunk) -> Rows:
        found = [chunk.earlier[MAGNITUDES][model] for model in chunk.models]
        rows = scores(chunk.d, Range.found(found, ranks, chunk.d), variant)
        return dict(zip(chunk.models, rows, strict=True))

    return (
        Measure(MAGNITUDES, ranks=lambda _, n: ranks(n)),
        Measure(SCORES, beta, ranks=lambda _, n: score_ranks(density, n)),
    )
