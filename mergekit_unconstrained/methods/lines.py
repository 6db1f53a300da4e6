"""LiNeS: task arithmetic that grows with depth.

Reference: Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
Merging", https://arxiv.org/abs/2410.17146.

    D[l]  = (alpha + beta l / (L - 1)) sum_i w_i d_i[l],   l = 0 ... L - 1                  (1)
    alpha = (1 / N) |sum_i d_i|_1 / |sum_i w_i d_i|_1      alpha: auto, over the model      (2)

l is the layer in the model that is written, whatever slices it is made of; tensors outside the
layers take alpha, as in the authors' code. The paper scales any merged task vector; here it is that
of task arithmetic, for which equal weights w make (2) 1 / (N |w|): other weights look at the whole
model first. The paper searches beta; beta: auto, 1 - alpha but not below zero, is ours.

A model of one layer takes alpha. Without a job (merge_tensors, mergekit-pytorch) L is not known,
and layers beyond the first are an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from mergekit_unconstrained.compat import PerNonBase, TensorGroup
from mergekit_unconstrained.engine.context import (
    depth_of,
    finish,
    measured,
    role_of,
    was_measured,
)
from mergekit_unconstrained.engine.footprint import always
from mergekit_unconstrained.engine.plan import PlannedTensor
from mergekit_unconstrained.engine.prepass import Chunk, Measure, Rows
from mergekit_unconstrained.engine.tensor_method import base_of, tensor_method
from mergekit_unconstrained.numerics import initial
from mergekit_unconstrained.numerics.operators import merge
from mergekit_unconstrained.numerics.settings import Expert, Settings

Finite = Annotated[float, Field(allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] | Literal["auto"]
SUMS = "sums of the task vectors"


@tensor_method("lines", "LiNeS")
def lines(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite] = 1.0,  # w_i
    alpha: Scale = "auto",
    beta: Scale = "auto",
    lambda_: Finite = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eq. (1) for one tensor in float32 or wider; the base's shape and dtype."""
    experts = [
        Expert(entry.tensor, weight[entry.id], model=str(entry.id)) for entry in group.non_base
    ]
    a = _alpha([e.weight for e in experts]) if alpha == "auto" else alpha
    b = max(0.0, 1 - a) if beta == "auto" else beta
    role = role_of(group.metadata)
    rises = role.layer and b
    scale = initial.depth(role.layer, depth_of(role), a, b) if rises else a
    settings = Settings("task_arithmetic", lambda_=lambda_ * scale)
    return finish(group, merge(base_of(group), experts, settings))


lines.entrywise = always


def needs(tensors: Sequence[PlannedTensor]) -> tuple[Measure, ...]:
    """The norms of Eq. (2), where the weights differ."""
    if all(t.parameters["alpha"] != "auto" for t in tensors):
        return ()
    weights = {own["weight"] for t in tensors for own in _experts(t.input_parameters)}
    return () if len(weights) < 2 else (Measure(SUMS, _sums),)


def _experts(parameters: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [own for own in parameters.values() if "weight" in own]


def _sums(chunk: Chunk) -> Rows:
    weights = chunk.per_model("weight")
    return {"plain": chunk.d.sum(dim=0), "weighted": chunk.d.mul(weights).sum(dim=0)}


def _alpha(weights: Sequence[float]) -> float:
    """Eq. (2), 1 / N where there is nothing to divide by."""
    if len(set(weights)) == 1 and not was_measured(SUMS):
        ratio = 1 / abs(weights[0]) if weights[0] else 1.0
    else:
        found = measured(SUMS)
        merged = found["weighted"].absolute
        ratio = found["plain"].absolute / merged if merged else 1.0
    return ratio / len(weights)
