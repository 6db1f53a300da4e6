"""OPCM: experts merged one after the other, each projected away from what is there.

Reference: Tang et al., "Merging Models on the Fly Without Retraining: A Sequential Approach to
Scalable Continual Model Merging", https://arxiv.org/abs/2501.09522, and the authors' code. Over the
experts in their order, from D_1 = d_1 and lambda_1 = 1:

    E_t      = lambda_(t-1) D_(t-1) + P(d_t; D_(t-1))                                       (1)
    lambda_t = norm(E_t) / mean of norm(d_1) ... norm(d_t),  norms of the whole model       (2)
    D_t      = E_t / lambda_t                                                               (3)

For a matrix of attention or MLP with D = U diag(s) V' and r the first index at which the sum of s_0
to s_r is more than `threshold` of the sum of all,

    P(d; D)  = U C V',  C = U' d V with C_ii = 0, and C_ij = 0 for i, j < r                 (4)
             = d - U_r U_r' d V_r V_r' - sum_(i >= r) u_i (u_i' d v_i) v_i'                 (5)

where U and V are square in (4) and thin in (5). P(d; D) = d for every other tensor.

Since lambda_(t-1) D_(t-1) = E_(t-1), and (4) asks for directions only, no norm but the last enters:
E_N is the sum of the P(d_t; E_(t-1)), tensor by tensor, and the result is T0 + E_N / lambda_N.

scope `model` is the paper's; with scope `tensor`, ours, the norms of (2) are those of the tensor.
order: shuffled draws one order for all tensors by `seed`. Ours too: vectors of singular values
below 1e-7 of the largest are none of D's, so that (5) does not depend on an arbitrary basis; where
E_N is zero, D is.

Cost: N - 1 decompositions of every matrix (numerics/svd.py), in the pre-pass and in the merge.
Memory, measured with N = 2 and m = n = 2048, parents included: 15 times the tensor in float32.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from mergekit_unconstrained.compat import TensorGroup
from mergekit_unconstrained.engine.context import measured
from mergekit_unconstrained.engine.footprint import OneTensor, per_matrix
from mergekit_unconstrained.engine.plan import PlannedTensor
from mergekit_unconstrained.engine.prepass import Chunk, Measure, Rows, of_model
from mergekit_unconstrained.engine.task_vectors import (
    add,
    add_entrywise,
    is_finite,
    is_matrix_role,
    may_be_matrix,
    task_vectors,
)
from mergekit_unconstrained.engine.tensor_method import tensor_method
from mergekit_unconstrained.numerics.sums import norm
from mergekit_unconstrained.numerics.svd import thin_svd

Order = Literal["recipe", "shuffled"]
NORMS = "squared norms of the task vectors and of E_N"
COLUMNS = 256
"""Singular vectors whose share in a task vector is taken at a time."""
MERGED = ""
"""The row of E_N, beside those of the experts."""


def projected(d: torch.Tensor, merged: torch.Tensor, threshold: float) -> torch.Tensor:
    """P(d; D) of Eq. (5), [m, n] float64, for the D that `merged` is a multiple of."""
    U, s, V = thin_svd(merged)
    d = d.to(torch.float64, copy=True)
    if not len(s):
        return d
    shares = s.cumsum(0) / s.sum()
    r = int((shares <= threshold).sum())
    inside = U[:, :r].T @ d @ V[:, :r]
    diagonal = [((u.T @ d) * v.T).sum(dim=1) for u, v in zip(
        U[:, r:].split(COLUMNS, dim=1), V[:, r:].split(COLUMNS, dim=1), strict=True)]  # fmt: skip
    d.addmm_(U[:, :r], inside @ V[:, :r].T, alpha=-1)
    if diagonal:
        d.addmm_(U[:, r:].mul_(torch.cat(diagonal)), V[:, r:].T, alpha=-1)
    return d


def accumulated(d: torch.Tensor, threshold: float, *, matrix: bool) -> torch.Tensor:
    """E_N of Eq. (1), of the shape of one task vector; d: [N, ...], in the order of merging."""
    if not matrix:
        return d.sum(dim=0)
    merged = d[0].to(torch.float64, copy=True)
    for d_t in d[1:]:
        merged.add_(projected(d_t, merged.to(d.dtype), threshold))
    return merged.to(d.dtype)


def in_order(d: torch.Tensor, order: Order, seed: int) -> torch.Tensor:
    """Task vectors, [N, ...], in the order of merging."""
    indices = order_of(len(d), order, seed)
    return d if indices == sorted(indices) else d[indices]


def order_of(count: int, order: Order, seed: int) -> list[int]:
    """The experts' indices in the order of merging."""
    indices = list(range(count))
    if order == "shuffled":
        random.Random(seed).shuffle(indices)
    return indices


def inverse_scale(norms: Sequence[float], merged: float) -> float:
    """1 / lambda_N of Eq. (2), 0 where E_N is zero. norms: of the d_i."""
    return sum(norms) / len(norms) / merged if merged else 0.0


@tensor_method("opcm", "OPCM")
def opcm(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5,  # share of s that is protected
    order: Order = "recipe",
    seed: int = 0,  # of a shuffled order
    scope: Literal["model", "tensor"] = "model",  # of the norms
    lambda_: Annotated[float, Field(allow_inf_nan=False)] = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eqs. (1) to (5) for one tensor, matrices in float64; the base's shape and dtype."""
    matrix = may_be_matrix(group)
    if scope == "model":
        found = measured(NORMS)
        norms = [s.squares**0.5 for label, s in found.items() if label != MERGED]
        total = found[MERGED].squares ** 0.5
        if not matrix:
            scale = lambda_ * inverse_scale(norms, total)
            return add_entrywise(group, scale, lambda d: d.sum(dim=0))
    d = task_vectors(group)
    turned = in_order(d, order, seed)
    merged = accumulated(turned, threshold, matrix=matrix and is_finite(d))
    if scope == "tensor":
        norms = [norm(d_i) for d_i in d]
        total = norm(merged)
    del d, turned
    return add(group, merged.mul_(inverse_scale(norms, total)), lambda_)


def entrywise(one: OneTensor) -> bool:
    """Whether a tensor can be merged by parts."""
    return one.parameters["scope"] == "model" and not one.is_matrix


opcm.entrywise = entrywise
opcm.work = per_matrix(28, square=40)  # E, d_t and the factors in float64; a decomposition


def needs(tensors: Sequence[PlannedTensor]) -> tuple[Measure, ...]:
    """The norms of Eq. (2)."""
    return (Measure(NORMS, _norms, whole=_may_be_matrix),) if of_model(tensors) else ()


def _may_be_matrix(tensor: PlannedTensor) -> bool:
    return is_matrix_role(tensor.role)


def _norms(chunk: Chunk) -> Rows:
    own, d = chunk.tensor.parameters, chunk.d
    if matrix := _may_be_matrix(chunk.tensor) and len(chunk.shape) == 2:
        d = d.reshape(-1, *chunk.shape)
        matrix = is_finite(d)
    merged = accumulated(in_order(d, own["order"], own["seed"]), own["threshold"], matrix=matrix)
    return {MERGED: merged.reshape(-1), **dict(zip(chunk.models, chunk.d, strict=True))}
