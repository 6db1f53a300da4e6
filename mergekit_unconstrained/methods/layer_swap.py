"""Layer swapping: the outer layers of one expert around the inner ones of another.

Reference: Bandarkar et al., "Layer Swapping for Zero-Shot Cross-Lingual Transfer in Large Language
Models", https://arxiv.org/abs/2410.01335. For a language expert T_1 and a task expert T_2 of L
layers:

    T*[l] = T_1[l]                       l < bottom, or l >= L - top                            (1)
    T*[l] = (T_1[l] + T_2[l]) / 2        the `transition` layers next to these on each side     (2)
    T*[l] = T_2[l]                       the layers between                                     (3)

Read in the paper only. Ours: tensors outside the layers (embedding, final norm, head) are the
language expert's; transition layers are averaged with equal weights, none of them by default. The
first expert of the recipe is T_1, the second T_2. Nothing is subtracted from the base, which says
only where both come from.

Without a job (merge_tensors, mergekit-pytorch) L is not known, and layers above the lower
transition are an error.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from mergekit_unconstrained.compat import TensorGroup
from mergekit_unconstrained.engine.context import depth_of, finish, role_of
from mergekit_unconstrained.engine.footprint import always
from mergekit_unconstrained.engine.tensor_method import base_of, tensor_method
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.numerics.operators import merge
from mergekit_unconstrained.numerics.roles import Role
from mergekit_unconstrained.numerics.settings import Expert, Settings

Count = Annotated[int, Field(ge=0, le=1000)]


@tensor_method("layer_swap", "Layer swapping", experts=2)
def layer_swap(
    group: TensorGroup,  # one output tensor: base and two experts, any equal shape
    bottom: Count,  # layers at the input from the first expert
    top: Count,  # layers at the output from the first expert
    transition: Count = 0,  # averaged layers on each side
) -> torch.Tensor:
    """Eqs. (1) to (3) for one tensor in float32 or wider; the base's shape and dtype."""
    share = task_share(role_of(group.metadata), bottom, top, transition)
    shares = (1 - share, share)
    experts = [
        Expert(entry.tensor, s) for entry, s in zip(group.non_base, shares, strict=True) if s > 0
    ]
    return finish(group, merge(base_of(group), experts, Settings("linear")))


layer_swap.entrywise = always


def task_share(role: Role, bottom: int, top: int, transition: int) -> float:
    """What the second expert contributes to a tensor: 0, 1/2 or 1."""
    if role.depth and bottom + top + 2 * transition > role.depth:
        raise RecipeError(
            f"{bottom} layers at the bottom, {top} at the top and {transition} averaged on each "
            f"side are more than the {role.depth} layers of this model"
        )
    if role.layer is None or role.layer < bottom:
        return 0.0
    if role.layer < bottom + transition:
        return 0.5
    above = depth_of(role) - 1 - role.layer
    if above < top:
        return 0.0
    return 0.5 if above < top + transition else 1.0
