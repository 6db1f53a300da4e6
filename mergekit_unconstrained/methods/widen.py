"""Weight disentanglement: WIDEN.

Reference: Yu et al., "Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via
Weight Disentanglement", https://arxiv.org/abs/2408.03092, and the authors' code
`widen_merging`. For a matrix W, out x in, with columns of norm m and direction W / m:

    M_i = |m_i - m_0|,   C_i = 1 - cos(column of T_i, column of T0)                         (1)
    r(x)_i = 0, 1/in, 2/in, ... for the columns of expert i in ascending order of x_i       (2)
    p(x)_i = softmax over the experts of r(x)_i; `calibration` where r(x)_i > threshold *   (3)
             the mean of r(x)_i
    D = sum_i w_i (p(M)_i + p(C)_i) / 2 * d_i, column by column                             (4)

A vector (a norm, a bias) has no columns: p of |d_i| itself, without ranks. The embedding,
vocabulary x hidden, is transposed first, so that its "columns" are the tokens; the head is not.
Equal numbers are ranked in the order of the columns.

Ours: cosines in float64, whose differences from 1 would drown in float32; a column of zeros has
C_i = 0 (the code divides by zero); tensors of three and more dimensions are read as first x rest;
w_i is `weight`.

Cost: two passes over every parent, a sort of the columns, one pass for the sum. Memory, measured
with N = 2, parents included: 4 times the tensor in float32.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mergekit_unconstrained.compat import PerNonBase, TensorGroup
from mergekit_unconstrained.engine.context import role_of
from mergekit_unconstrained.engine.footprint import per_entry
from mergekit_unconstrained.engine.task_vectors import add, is_finite, task_vectors
from mergekit_unconstrained.engine.tensor_method import base_of, tensor_method
from mergekit_unconstrained.numerics.select import stable_order

Finite = Annotated[float, Field(allow_inf_nan=False)]
CHUNK = 1 << 17
"""Entries widened to float64 at a time, in whole rows as they are stored."""


def matrix_vector(
    t0: torch.Tensor,  # [out, in], the base
    d: torch.Tensor,  # [N, out, in], the task vectors
    weights: torch.Tensor,  # [N], w_i
    threshold: float,
    calibration: float,
) -> torch.Tensor:
    """D of Eq. (4), [out, in]."""
    M, C = disentangled(t0, d)
    p_M, p_C = (importance(ranks(x), threshold, calibration, M.shape[1]) for x in (M, C))
    score = (weights[:, None] * (p_M + p_C) / 2).to(d.dtype)
    merged = torch.zeros_like(d[0])
    for d_i, score_i in zip(d, score, strict=True):
        merged.addcmul_(d_i, score_i)
    return merged


def flat_vector(
    d: torch.Tensor,  # [N, n]
    weights: torch.Tensor,  # [N]
    threshold: float,
    calibration: float,
) -> torch.Tensor:
    """D of a tensor without columns, [n]."""
    return (d * importance(d.abs(), threshold, calibration) * weights[:, None]).sum(dim=0)


def disentangled(t0: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """M and C of Eq. (1), [N, in], float64; t0 and d as in `matrix_vector`."""
    step = max(1, CHUNK // t0.shape[0])
    if t0.stride(0) < t0.stride(1) and t0.shape[1] > step:  # transposed: some columns after others
        M, C = torch.empty((2, len(d), t0.shape[1]), dtype=torch.float64, device=t0.device)
        for start in range(0, t0.shape[1], step):
            some = slice(start, start + step)
            M[:, some], C[:, some] = disentangled(t0[:, some], d[:, :, some])
        return M, C
    size = torch.zeros(len(d), t0.shape[1], dtype=torch.float64, device=t0.device)
    base, dot = torch.zeros_like(size[0]), torch.zeros_like(size)
    step = max(1, CHUNK // t0.shape[1])
    for start in range(0, t0.shape[0], step):
        rows = slice(start, start + step)
        b = t0[rows].double()
        base += b.square().sum(dim=0)
        for i, d_i in enumerate(d):
            t = b + d_i[rows].double()
            size[i] += t.square().sum(dim=0)
            dot[i] += (t * b).sum(dim=0)
    product = (size * base).sqrt()  # of equal columns exactly their dot product
    cosine = torch.where(product > 0, dot / product, 1.0)
    return (size.sqrt() - base.sqrt()).abs(), 1 - cosine


def ranks(x: torch.Tensor) -> torch.Tensor:
    """Eq. (2) times in: the rank of every column within its expert, from 0; [N, in], float64."""
    steps = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    return torch.empty_like(x).scatter_(1, stable_order(x), steps.expand_as(x))


def importance(
    x: torch.Tensor, threshold: float, calibration: float, unit: int = 1
) -> torch.Tensor:
    """Eq. (3): p of significances x / unit, [N, n].

    Ranks come as whole numbers, whose mean is exact: of an odd number the middle one is not above.
    """
    above = x > threshold * x.mean(dim=1, keepdim=True)
    return torch.where(above, calibration, torch.softmax(x / unit, dim=0))


@tensor_method("widen", "WIDEN")
def widen(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite] = 1.0,  # w_i
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0,  # times the mean rank
    calibration: Finite = 1.0,  # the score of what lies above
    lambda_: Finite = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eqs. (1) to (4) for one tensor in float32 or wider; the base's shape and dtype."""
    shape = base_of(group).shape
    d = task_vectors(group)
    weights = d.new_tensor([weight[entry.id] for entry in group.non_base])
    if not d.numel() or not is_finite(d):  # no ranks among NaN: the sum shows where it is
        merged = torch.tensordot(weights, d, dims=1)
    elif len(shape) < 2:
        merged = flat_vector(d.reshape(len(d), -1), weights, threshold, calibration)
    else:
        t0 = base_of(group).flatten(1)
        d = d.flatten(2)
        if role_of(group.metadata).kind == "embedding":
            merged = matrix_vector(t0.T, d.mT, weights, threshold, calibration).T
        else:
            merged = matrix_vector(t0, d, weights, threshold, calibration)
    return add(group, merged.reshape(shape), lambda_)


widen.work = per_entry(8, 4)  # D, some columns in float64; the d_i
