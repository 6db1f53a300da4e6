"""Consensus merging: keep what several experts need.

Reference: Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
https://arxiv.org/abs/2405.07813, TALL masks and Consensus Task Arithmetic.

    tau   = sum_i d_i                                                                       (1)
    m_i   = [ |d_i| > lambda_i |tau - d_i| ]                                                (2)
    D     = tau * [ sum_i m_i >= k ]                                                        (3)

m_i marks the entries that matter to expert i; those of fewer than k experts ("selfish", and
"catastrophic" ones of nobody) are dropped. The inequality is strict, so an entry that nobody
changed matters to nobody. The authors choose lambda_i for every expert on validation data, from 0.2
to 0.6, and lambda, which scales D, likewise; one default of 0.4 for all, and 0.3, are ours.

Ours: `weight` multiplies d_i before everything else. A tensor that fewer than k experts have is
judged by those it has.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mergekit_unconstrained.compat import PerNonBase, TensorGroup
from mergekit_unconstrained.engine.footprint import always
from mergekit_unconstrained.engine.task_vectors import add_entrywise
from mergekit_unconstrained.engine.tensor_method import base_of, tensor_method

Finite = Annotated[float, Field(allow_inf_nan=False)]


def consensus_vector(
    d: torch.Tensor,  # [N, ...], the task vectors
    tall_lambda: torch.Tensor,  # [N], lambda_i
    min_agreement: int,  # k
) -> torch.Tensor:
    """D of Eqs. (1) to (3), of the shape of one task vector."""
    tau = d.sum(dim=0)  # (1)
    agreement = torch.zeros(tau.shape, dtype=torch.int32, device=d.device)
    for d_i, lambda_i in zip(d, tall_lambda, strict=True):
        agreement += d_i.abs() > lambda_i * (tau - d_i).abs()  # (2)
    # Multiplied, not selected, so that NaN stays visible.
    return tau * (agreement >= min_agreement).to(tau.dtype)  # (3)


@tensor_method("consensus", "Consensus merging")
def consensus(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite] = 1.0,  # of an expert's task vector
    tall_lambda: PerNonBase[Annotated[float, Field(ge=0, le=10)]] = 0.4,  # lambda_i
    min_agreement: Annotated[int, Field(ge=0)] = 2,  # k
    lambda_: Finite = 0.3,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Entry by entry, in float32 or wider; returns the base's shape and dtype."""
    dtype = torch.promote_types(base_of(group).dtype, torch.float32)
    ids = [entry.id for entry in group.non_base]
    weights, lambdas = (
        torch.tensor([values[i] for i in ids], dtype=dtype, device=base_of(group).device)
        for values in (weight, tall_lambda)
    )
    k = min(min_agreement, len(ids))
    return add_entrywise(
        group, lambda_, lambda d: consensus_vector(d.mul_(weights[:, None]), lambdas, k)
    )


consensus.entrywise = always
