"""SCE as its authors' code has it: the selected entries decide the shares, all are merged.

Reference: Wan et al., "FuseChat: Knowledge Fusion of Chat Models",
https://arxiv.org/abs/2408.07990, SCE, and the authors' code.

    S     = the fraction `select_topk` of the entries that vary over the experts, by variance  (1)
    eta_i = sum over S of d_i^2, divided by the sum of these over i                            (2)
    a_i   = [sign(d_i) = sign(sum_j d_j)], + for a sum of zero                                 (3)
    D     = sum_i eta_i a_i d_i / sum_i eta_i a_i                                              (4)

mergekit's `sce` merges the entries of S alone. All experts get 1 / N where (2) adds up to nothing
(ours). This is `layerwise` with its operator `sce_dense` (numerics/operators.py, Eq. 11) and every
weight 1.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mergekit_unconstrained.compat import TensorGroup
from mergekit_unconstrained.engine.context import finish
from mergekit_unconstrained.engine.footprint import per_entry
from mergekit_unconstrained.engine.tensor_method import base_of, tensor_method
from mergekit_unconstrained.numerics.operators import merge
from mergekit_unconstrained.numerics.settings import Expert, Settings


@tensor_method("sce_dense", "SCE as published")
def sce_dense(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    select_topk: Annotated[float, Field(ge=0, le=1)] = 0.1,  # the fraction of Eq. (1)
    lambda_: Annotated[float, Field(allow_inf_nan=False)] = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eqs. (1) to (4) for one tensor in float32 or wider; the base's shape and dtype."""
    experts = [Expert(entry.tensor, 1.0, model=str(entry.id)) for entry in group.non_base]
    settings = Settings("sce_dense", lambda_=lambda_, select_topk=select_topk)
    return finish(group, merge(base_of(group), experts, settings))


sce_dense.work = per_entry(12, 4)  # variances, to select from and to compare; squares
