"""Task singular vectors, merged: TSV-M.

Reference: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging",
https://arxiv.org/abs/2412.00081, TSV-M. For every matrix of attention and MLP:

    U_i, S_i, V_i = the top k of svd(d_i),  k = max(1, int(min(m, n) / N))                   (1)
    U = [U_1 ... U_N],  S = diag(S_1, ..., S_N),  V = [V_1 ... V_N]                          (2)
    W_U, W_V = the polar factors of U and V (P Q' of their singular value decompositions)    (3)
    D = W_U S W_V'                                                                           (4)

and the mean of the d_i for every other tensor. The authors' code merges every 2-D tensor so; here
the embedding and the head are no matrices of that kind.

Where several experts share directions exactly, (3) leaves the choice of P and Q open; here they are
the canonical ones, which map the surplus to zero: N equal experts give the best approximation of
one of rank k. Directions of zero singular value (all beyond the rank of a LoRA) take no part. Both
are ours. `weight` multiplies d_i before everything else.

`reweight` is ours altogether, and off: entries of d_i beyond 3 times its root mean square are cut
off there, so that outliers do not own the leading directions, and the N k directions go to the
experts by need: the least rank that holds 95 % of an expert's squared singular values, scaled to
share N k in proportion.

Cost: N decompositions of an m x n matrix (numerics/svd.py), O(m n min(m, n)) each, and products of
the same order. Memory, measured with N = 2 and m = n = 2048, parents included: 18 times the tensor
in float32; 9 times at 2048 x 5632.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mergekit_unconstrained.compat import PerNonBase, TensorGroup
from mergekit_unconstrained.engine.footprint import outside_matrices, per_matrix
from mergekit_unconstrained.engine.task_vectors import (
    add,
    add_mean,
    is_finite,
    may_be_matrix,
    task_vectors,
)
from mergekit_unconstrained.engine.tensor_method import tensor_method
from mergekit_unconstrained.numerics.svd import Factors, polar_factor, thin_svd

Finite = Annotated[float, Field(allow_inf_nan=False)]
OUTLIER = 3.0
ENERGY = 0.95


def tsvm_vector(
    d: torch.Tensor,  # [N, m, n], the task vectors
    rank_fraction: float | None,  # k = max(1, int(min(m, n) * fraction)); None: 1 / N
    reweight: bool = False,
) -> torch.Tensor:
    """D of Eqs. (1) to (4), [m, n], of the dtype of d."""
    return orthogonalised(joined_factors(d, rank_fraction, reweight)).to(d.dtype)


def joined_factors(d: torch.Tensor, rank_fraction: float | None, reweight: bool) -> Factors:
    """U, S and V of Eq. (2); the rest as in `tsvm_vector`."""
    smaller = min(d.shape[1:])
    k = smaller // len(d) if rank_fraction is None else int(smaller * rank_fraction)
    k = max(1, k)
    if reweight:
        factors = [thin_svd(without_outliers(d_i)) for d_i in d]
        ranks = ranks_by_energy(factors, k)
        tops = [f.top(rank) for f, rank in zip(factors, ranks, strict=True)]
    else:
        tops = [thin_svd(d_i, k) for d_i in d]  # (1)
    return Factors(*(torch.cat(parts, dim=-1) for parts in zip(*tops, strict=True)))


def orthogonalised(f: Factors) -> torch.Tensor:
    """D of Eqs. (3) and (4), float64."""
    return polar_factor(f.U).mul_(f.S) @ polar_factor(f.V).T


def without_outliers(d_i: torch.Tensor) -> torch.Tensor:
    """A task vector with its entries cut off at OUTLIER times its root mean square; ours."""
    limit = OUTLIER * d_i.double().square().mean().sqrt().to(d_i.dtype)
    return d_i.clamp(-limit, limit)


def ranks_by_energy(factors: list[Factors], k: int) -> list[int]:
    """N k directions shared in proportion to the ranks that hold ENERGY of each expert; ours."""
    needs = []
    for f in factors:
        share = f.S.square().cumsum(0) / f.S.square().sum()
        needs.append(int((share < ENERGY).sum()) + 1 if len(f.S) else 0)
    total = sum(needs)
    return [max(1, k * len(needs) * need // max(total, 1)) for need in needs]


@tensor_method("tsvm", "Task singular vectors (TSV-M)")
def tsvm(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite] = 1.0,  # of an expert's task vector
    lambda_: Finite = 1.0,  # scales D; `lambda` in a recipe
    rank_fraction: Annotated[float, Field(gt=0, le=1)] | None = None,  # 1 / N where not set
    reweight: bool = False,  # outliers cut off, ranks by need
) -> torch.Tensor:
    """Eqs. (1) to (4) for one tensor, decomposed in float64; the base's shape and dtype."""
    if not may_be_matrix(group):
        return add_mean(group, lambda_, weight)
    d = task_vectors(group, weight)
    if not is_finite(d):
        return add(group, d.mean(dim=0), lambda_)  # which shows where it is not
    factors, dtype = joined_factors(d, rank_fraction, reweight), d.dtype
    del d
    return add(group, orthogonalised(factors).to(dtype), lambda_)


tsvm.entrywise = outside_matrices
tsvm.work = per_matrix(20, square=40)  # the factors; a decomposition
