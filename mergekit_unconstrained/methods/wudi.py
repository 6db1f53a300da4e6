"""WUDI merging: a task vector that disturbs no expert in the subspace of its own inputs.

Reference: Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model
Merging via Task Vectors", https://arxiv.org/abs/2503.08099, and the authors' code. For every matrix
of attention and MLP, from m = sum_i d_i by Adam,

    minimise over m   sum_i norm_F((m - d_i) d_i')^2 / norm_F(d_i)^2                        (1)
    D = m after `steps` steps                                                               (2)

and the mean of the d_i for every other tensor. With the Gram matrices

    G_i = d_i' d_i / norm_F(d_i)^2,   G = sum_i G_i,   R = sum_i d_i G_i                    (3)

the loss is tr(m G m') - 2 tr(m R') + constant and its gradient 2 (m G - R): one product of matrices
a step, however many the experts. The start and the number of steps are part of the method; 300
steps of 1e-5 stop far from the optimum.

Ours: an expert that did not change a matrix takes no part in it; a start that is the optimum but
for rounding (one expert alone) is the result. `weight` multiplies d_i before everything else.

Cost: `steps` products of m x n by n x n, and N of n x m by m x n. Memory, measured with N = 2 and
m = n = 2048, parents included: 10 times the tensor in float32; for other tensors next to none.
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
    step_bar,
    task_vectors,
)
from mergekit_unconstrained.engine.tensor_method import tensor_method
from mergekit_unconstrained.numerics.descent import Quadratic, adam
from mergekit_unconstrained.numerics.sums import dot, norm

Finite = Annotated[float, Field(allow_inf_nan=False)]


def interference(d: torch.Tensor) -> Quadratic:
    """The loss of Eq. (1), from the task vectors, [N, m, n]."""
    G = d.new_zeros(d.shape[2], d.shape[2])
    R = torch.zeros_like(d[0])
    constant = 0.0
    for d_i in d:
        size = norm(d_i)
        if size == 0:
            continue
        unit = d_i / size
        G_i = unit.T @ unit  # (3)
        del unit
        G += G_i
        R_i = d_i @ G_i
        del G_i
        R += R_i
        constant += dot(d_i, R_i)
    return Quadratic(G, R, constant)


@tensor_method("wudi", "WUDI-Merging")
def wudi(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite] = 1.0,  # of an expert's task vector
    steps: Annotated[int, Field(ge=0)] = 300,
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5,
    lambda_: Finite = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eqs. (1) to (3) for one tensor in float32 or wider; the base's shape and dtype."""
    if not may_be_matrix(group):
        return add_mean(group, lambda_, weight)
    d = task_vectors(group, weight)
    if not is_finite(d):
        return add(group, d.mean(dim=0), lambda_)  # which shows where it is not
    loss, start = interference(d), d.sum(dim=0)
    del d  # before Adam takes as much
    if loss.at_optimum(start):
        return add(group, start, lambda_)
    with step_bar(group, steps) as count:
        name = group.metadata.name or ""
        merged = adam(start, loss, steps, learning_rate, name=name, on_step=count)
    return add(group, merged, lambda_)


wudi.entrywise = outside_matrices
wudi.work = per_matrix(20, columns=8)  # R and Adam's four; G and G_i
