"""VaRM: every expert by its share in the squared change.

Reference: Wan et al., "Knowledge Fusion of Chat LLMs: A Preliminary Technical Report",
https://arxiv.org/abs/2402.16107, variation ratio merging.

    v_i = mean(d_i^2) / sum_j mean(d_j^2)        granularity: tensor, means over a tensor       (1)
    v_i = d_i^2 / sum_j d_j^2                    granularity: element, of every entry           (2)
    D   = sum_i v_i d_i                                                                         (3)

Where nothing changed, D is zero. (1) is `layerwise` with its operator `varm` and every weight 1.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from mergekit_unconstrained.compat import TensorGroup
from mergekit_unconstrained.engine.context import finish
from mergekit_unconstrained.engine.footprint import OneTensor, per_entry
from mergekit_unconstrained.engine.tensor_method import base_of, tensor_method
from mergekit_unconstrained.numerics.operators import merge
from mergekit_unconstrained.numerics.settings import Expert, Settings


@tensor_method("varm", "VaRM")
def varm(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    granularity: Literal["tensor", "element"] = "tensor",  # Eq. (1) or (2)
    lambda_: Annotated[float, Field(allow_inf_nan=False)] = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eq. (3) for one tensor in float32 or wider; the base's shape and dtype."""
    experts = [Expert(entry.tensor, 1.0, model=str(entry.id)) for entry in group.non_base]
    settings = Settings("varm", lambda_=lambda_, granularity=granularity)
    return finish(group, merge(base_of(group), experts, settings))


def entrywise(one: OneTensor) -> bool:
    """Whether a tensor can be merged by parts."""
    return bool(one.parameters["granularity"] == "element")


varm.entrywise = entrywise
varm.work = per_entry(0, 0)  # nothing but pieces
