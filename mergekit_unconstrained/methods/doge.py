"""DOGE: task vectors moved by projected gradient descent before they are added.

Reference: Wei et al., "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent",
https://arxiv.org/abs/2501.01230, DOGE TA, and the authors' code. For every matrix of attention and
MLP:

    l_i = eta / norm_F(d_i),   l = sum_i l_i                                                (1)
    B = the first int(min(m, n) / subspace) left singular vectors of [U_1 ... U_N],         (2)
        U_i the first int(min(m, n) / N) left singular vectors of d_i
    minimise over X, from X = 0, by Adam with the gradient g - B B' g,                      (3)
        sum_j sum_rows (sum_columns d_j * (d_j - sum_i l_i d_i - l X))^2
    mask_i = [ |d_i| >= the (n - int(n top))-th smallest of its n magnitudes ]              (4)
    D = sum_i l_i (d_i + X) * mask_i                                                        (5)

Every other tensor stays at the base. In (4) the authors take the magnitudes of all their matrices
together: scope `model`, for which every parent is read twice before the merge (engine/prepass.py).
With scope `tensor`, ours, they are those of one matrix. `>=` keeps one entry more than int(n top),
and all that are equal to the last.

Ours: an expert that did not change a matrix has l_i = 0, and directions of zero singular value are
none of (2); of a single U_i, whose singular values are all 1, B has the first columns; top 0 keeps
nothing.

Cost: N decompositions of m x n and one of m x min(m, n) (numerics/svd.py); a step reads every d_i
twice and makes two products of m x b by b x n, b = min(m, n) / subspace. Memory in a step: the d_i
and four more float32 matrices of the tensor's shape; measured with N = 2 and m = n = 2048, parents
included: 17 of them in the decompositions, 9 at 2048 x 5632.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from mergekit_unconstrained.compat import TensorGroup
from mergekit_unconstrained.engine.context import measured
from mergekit_unconstrained.engine.footprint import outside_matrices, per_matrix
from mergekit_unconstrained.engine.plan import PlannedTensor
from mergekit_unconstrained.engine.prepass import (
    Chunk,
    Measure,
    Rows,
    magnitudes,
    of_model,
    one_value,
)
from mergekit_unconstrained.engine.task_vectors import (
    add,
    add_mean,
    is_finite,
    is_matrix_role,
    may_be_matrix,
    step_bar,
    task_vectors,
)
from mergekit_unconstrained.engine.tensor_method import tensor_method
from mergekit_unconstrained.numerics.descent import adam
from mergekit_unconstrained.numerics.pieces import pieces
from mergekit_unconstrained.numerics.quantiles import Summary
from mergekit_unconstrained.numerics.sums import norm
from mergekit_unconstrained.numerics.svd import thin_svd

Finite = Annotated[float, Field(allow_inf_nan=False)]
MAGNITUDES = "doge: |d| of the matrices"
ROWS = 256
"""Of the residual without X that are taken at a time."""


class Disturbance:
    """The loss of Eq. (3) and its projected gradient.

    d: [N, m, n], the task vectors. l: [N], the l_i. B: [m, b], the shared subspace.

    The residual of a row is linear in X, so that the part without X is computed once and a step
    reads every d_j twice, without a matrix of the tensor's shape but the gradient.
    """

    def __init__(self, d: torch.Tensor, l: torch.Tensor, B: torch.Tensor) -> None:
        self.B, self.total = B, float(l.sum())
        self.rows = d.transpose(0, 1)  # [m, N, n], a view
        at_zero = []
        for part in d.split(ROWS, dim=1):
            merged = torch.tensordot(l, part, dims=1)
            at_zero.append((part * (part - merged)).sum(dim=2, dtype=torch.float64))
        self.at_zero = torch.cat(at_zero, dim=1).T[:, :, None].to(d.dtype)  # [m, N, 1]

    def __call__(self, X: torch.Tensor) -> tuple[float, torch.Tensor]:
        residuals = self.at_zero - self.total * torch.bmm(self.rows, X[:, :, None])
        gradient = torch.bmm(-2 * self.total * residuals.mT, self.rows)[:, 0]
        gradient.addmm_(self.B, self.B.T @ gradient, alpha=-1)
        return float(residuals.double().square().sum()), gradient


def shared_subspace(d: torch.Tensor, subspace: int) -> torch.Tensor:
    """B of Eq. (2), [m, b], orthonormal columns."""
    smaller = min(d.shape[1:])
    tops = [thin_svd(d_i, smaller // len(d)).U for d_i in d]
    tops = [U_i for U_i in tops if U_i.shape[1]] or tops[:1]
    if len(tops) == 1:
        return tops[0][:, : smaller // subspace].to(d.dtype)
    joined = torch.cat(tops, dim=1)
    del tops
    # The largest of so many unit vectors are not small: the Gram matrix has them to the last digit.
    return thin_svd(joined, smaller // subspace, by_gram=True).U.to(d.dtype)


def threshold_rank(top: float, n: int) -> int | None:
    """Which of n sorted magnitudes, 0 the smallest, is the least that Eq. (4) keeps.

    None for none of them; -1 where all are kept.
    """
    return n - int(n * top) - 1 if top > 0 else None


def own_threshold(d_i: torch.Tensor, top: float) -> float:
    """The least magnitude that Eq. (4) keeps of one task vector."""
    rank = threshold_rank(top, d_i.numel())
    if rank is None or rank < 0:
        return torch.inf if rank is None else 0.0
    magnitudes = d_i.abs().flatten().cpu().numpy()
    magnitudes.partition(rank)
    return float(magnitudes[rank])


def found_threshold(summary: Summary, top: float) -> float:
    """The same of all matrices of an expert, by the pre-pass."""
    rank = threshold_rank(top, summary.count)
    if rank is None or rank < 0:
        return torch.inf if rank is None else 0.0
    return summary.entries[rank]


def masked_sum(
    d: torch.Tensor,
    X: torch.Tensor,
    l: torch.Tensor,
    thresholds: list[float],
) -> torch.Tensor:
    """D of Eq. (5), [m, n]."""
    merged = torch.zeros_like(X)
    flat = X.reshape(-1)
    for piece in pieces(X):
        total = merged.view(-1)[piece]
        for d_i, l_i, threshold in zip(d, l, thresholds, strict=True):
            part = d_i.reshape(-1)[piece]
            total += l_i * (part + flat[piece]) * (part.abs() >= threshold).to(d.dtype)
    return merged


@tensor_method("doge", "DOGE TA")
def doge(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    eta: Annotated[float, Field(ge=0, le=100)] = 0.07,
    top: Annotated[float, Field(ge=0, le=1)] = 0.3,  # fraction of every expert's entries kept
    steps: Annotated[int, Field(ge=0)] = 400,
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-4,
    subspace: Annotated[int, Field(ge=1)] = 6,  # the shared one has min(m, n) / subspace dimensions
    scope: Literal["tensor", "model"] = "model",  # of the thresholds
    lambda_: Finite = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eqs. (1) to (5) for one tensor in float32 or wider; the base's shape and dtype."""
    if not may_be_matrix(group):
        return add_mean(group, 0.0)  # the base, and NaN of anybody
    d = task_vectors(group)
    if not is_finite(d):
        return add(group, d.mean(dim=0), lambda_)  # which shows where it is not
    if scope == "model":
        found = measured(MAGNITUDES)
        thresholds = [found_threshold(found[str(e.id)], top) for e in group.non_base]
    else:
        thresholds = [own_threshold(d_i, top) for d_i in d]
    sizes = [norm(d_i) for d_i in d]
    l = d.new_tensor([eta / size if size else 0.0 for size in sizes])
    loss = Disturbance(d, l, shared_subspace(d, subspace))
    with step_bar(group, steps) as count:
        name = group.metadata.name or ""
        X = adam(torch.zeros_like(d[0]), loss, steps, learning_rate, name=name, on_step=count)
    return add(group, masked_sum(d, X, l, thresholds), lambda_)


doge.entrywise = outside_matrices
doge.work = per_matrix(20, square=40)  # Adam's four; a decomposition


def needs(tensors: Sequence[PlannedTensor]) -> tuple[Measure, ...]:
    """With `scope: model`, the magnitude at which the matrices of every expert are cut."""
    if not of_model(tensors):
        return ()
    rank_of = functools.partial(threshold_rank, one_value(tensors, "top"))

    def ranks(_: str, n: int) -> set[int]:
        return {r for r in (rank_of(n),) if r is not None and r >= 0}

    def of_matrices(chunk: Chunk) -> Rows:
        return magnitudes(chunk) if len(chunk.shape) == 2 else {}  # not of a bias

    return (Measure(MAGNITUDES, of_matrices, ranks, covers=lambda t: is_matrix_role(t.role)),)
