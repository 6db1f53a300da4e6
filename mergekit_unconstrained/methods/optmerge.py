"""OptMerge: WUDI's descent with denoised task vectors.

Reference: Wei et al., "Unifying Multimodal Large Language Model Capabilities and Modalities via
Model Merging", https://arxiv.org/abs/2505.19892, and the authors' code `wudi_merging2` for fully
fine-tuned experts. For every matrix of attention and MLP, k = int(min(m, n) / N):

    dbar = mean_i d_i,   h_i = dbar + the best rank-k approximation of d_i - dbar           (1)
    L_i  = the first k rows of S V' of svd(d_i)                                             (2)
    minimise over m, from m = sum_i d_i,
        sum_i norm_F((m - h_i) L_i')^2 / norm_F(d_i)^2                                      (3)
    D = m                                                                                   (4)

Embedding, norms, head and biases stay at the base. solver: adam is the authors', `steps` steps of
Adam, which stop far from the optimum of (3): the start and the number of steps are part of the
method. solver: exact is ours, the minimiser of (3) nearest to the start, in closed form, which
forgets the start wherever an expert has an opinion. The authors start LoRA experts from dbar and
descend by SGD; that is not built.

Ours: an expert that did not change a matrix has no term in (3), nor have directions of no singular
value; `weight` multiplies d_i before everything else; a start that is the optimum but for rounding
is the result.

Cost: 2 N decompositions of an m x n matrix (numerics/svd.py), then a product of m x n by n x n a
step, as in wudi; exact: one eigendecomposition of n x n instead. Memory of adam, measured with
N = 2 and m = n = 2048, parents included: 20 times the tensor in float32.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from mergekit_unconstrained.compat import PerNonBase, TensorGroup
from mergekit_unconstrained.engine.footprint import OneTensor, outside_matrices, per_matrix
from mergekit_unconstrained.engine.task_vectors import (
    add,
    add_mean,
    is_finite,
    may_be_matrix,
    step_bar,
    task_vectors,
)
from mergekit_unconstrained.engine.tensor_method import tensor_method
from mergekit_unconstrained.numerics.descent import Quadratic, adam
from mergekit_unconstrained.numerics.sums import dot, norm
from mergekit_unconstrained.numerics.svd import thin_svd

Finite = Annotated[float, Field(allow_inf_nan=False)]
ROWS = 256
"""Of a product in float64 that is rounded at a time."""


def denoised_interference(d: torch.Tensor) -> Quadratic:
    """The loss of Eq. (3), from the task vectors, [N, m, n]."""
    k = min(d.shape[1:]) // len(d)
    dbar = d.mean(dim=0)
    G = d.new_zeros(d.shape[2], d.shape[2])
    R = torch.zeros_like(dbar)
    constant = 0.0
    for d_i in d:
        size = norm(d_i)
        if size == 0:
            continue
        _, S, V = thin_svd(d_i, k)
        L_i = ((S / size) * V).T.to(d.dtype)  # (2), divided by the norm of (3)
        del V
        U, S, V = thin_svd(d_i - dbar, k)
        hL = denoised(dbar, U * S, V) @ L_i.T
        del U, V
        G += L_i.T @ L_i
        R += hL @ L_i
        constant += dot(hL, hL)
    return Quadratic(G, R, constant)


def denoised(dbar: torch.Tensor, US: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    """h_i of Eq. (1), [m, n], of the dtype of dbar; US, V: float64 factors, [m, k] and [n, k]."""
    h = torch.empty_like(dbar)
    for row, us, mean in zip(h.split(ROWS), US.split(ROWS), dbar.split(ROWS), strict=True):
        torch.add(mean, (us @ V.T).to(h.dtype), out=row)
    return h


@tensor_method("optmerge", "OptMerge")
def optmerge(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite] = 1.0,  # of an expert's task vector
    solver: Literal["adam", "exact"] = "adam",
    steps: Annotated[int, Field(ge=0)] = 300,  # of Adam
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5,
    lambda_: Finite = 0.1,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eqs. (1) to (4) for one tensor; the base's shape and dtype."""
    if not may_be_matrix(group):
        return add_mean(group, 0.0)  # the base, and NaN of anybody
    d = task_vectors(group, weight)
    if not is_finite(d):
        return add(group, d.mean(dim=0), lambda_)  # which shows where it is not
    if solver == "exact":
        d = d.double()  # in float32, rounding would pass for directions in which G is not zero
    loss, start = denoised_interference(d), d.sum(dim=0)
    del d  # before Adam takes as much
    if loss.at_optimum(start):
        return add(group, start, lambda_)
    if solver == "exact":
        return add(group, loss.nearest_minimiser(start), lambda_)
    with step_bar(group, steps) as count:
        name = group.metadata.name or ""
        merged = adam(start, loss, steps, learning_rate, name=name, on_step=count)
    return add(group, merged, lambda_)


def work(one: OneTensor) -> int | None:
    """Bytes for a tensor (engine/footprint.py)."""
    found = _work(one)
    return 2 * found if found is not None and one.parameters["solver"] == "exact" else found


_work = per_matrix(24, square=40, columns=8)  # R, dbar and Adam's four; a decomposition; G
optmerge.entrywise = outside_matrices
optmerge.work = work
