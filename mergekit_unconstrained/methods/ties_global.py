"""TIES as published: trimmed over the whole model.

Reference: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models",
https://arxiv.org/abs/2306.01708, and the authors' code.

    t_i     = the (n - int(rho n))-th smallest of the n magnitudes |d_i| of the model       (1)
    s_i     = d_i where |d_i| >= t_i, else 0                                                (2)
    gamma   = sign(sum_i w_i s_i); where that is zero, the sign of the sum of all of them   (3)
    D       = sum_i m_i w_i s_i / sum_i m_i w_i,  m_i = [sign(w_i s_i) = gamma]             (4)

The paper has every w_i = 1, so that (4) is the mean over those who agree. `>=` keeps one entry more
than int(rho n), and all that are equal to the last, as the authors' code does. Ours: density 0
keeps nothing; where (3) adds up to exactly zero, gamma is +.

scope `tensor`, ours: the largest max(1, int(rho n)) entries of each tensor, as mergekit's `ties`
has it, equal ones by index; and the sign of all sums of the tensor. mergekit lets sums of zero
elect +.

Cost: two passes over the parents for (1), another one for (3), one for the merge.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from mergekit_unconstrained.compat import PerNonBase, TensorGroup
from mergekit_unconstrained.engine.context import finish, measured
from mergekit_unconstrained.engine.footprint import OneTensor, per_entry, with_model_scope
from mergekit_unconstrained.engine.plan import PlannedTensor
from mergekit_unconstrained.engine.prepass import Chunk, Measure, Rows, of_model
from mergekit_unconstrained.engine.tensor_method import base_of, tensor_method
from mergekit_unconstrained.engine.thresholds import MAGNITUDES, Span, thresholds, trimmed
from mergekit_unconstrained.numerics.keeping import keep
from mergekit_unconstrained.numerics.operators import merge, sum_signs
from mergekit_unconstrained.numerics.settings import Expert, Settings

Finite = Annotated[float, Field(allow_inf_nan=False)]
SIGNS = "signs of the sums of what is kept"
SETTINGS = Settings("ties")


def kept_ranks(n: int, density: float) -> tuple[int, int]:
    """Eqs. (1) and (2): the ranks kept of n entries, first <= r < end, 0 the smallest."""
    if density >= 1:
        return 0, n
    return (max(0, n - int(density * n) - 1), n) if density > 0 else (n, n)


@tensor_method("ties_global", "TIES-Merging, trimmed over the whole model")
def ties_global(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite] = 1.0,  # w_i
    density: PerNonBase[Annotated[float, Field(ge=0, le=1)]] = 0.2,  # rho
    scope: Literal["model", "tensor"] = "model",  # of which rho is a share
    lambda_: Finite = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eqs. (1) to (4) for one tensor in float32 or wider; the base's shape and dtype."""
    base = base_of(group)
    experts = [
        Expert(e.tensor, weight[e.id], density[e.id], model=str(e.id)) for e in group.non_base
    ]
    if scope == "model":
        experts = [trimmed(base, e, SETTINGS, _span(e.density)) for e in experts]
        majority = measured(SIGNS)["sum"].total
    else:
        dtype = torch.promote_types(base.dtype, SETTINGS.dtype)
        experts = [dataclasses.replace(e, kept=keep(base, e, SETTINGS, dtype)) for e in experts]
        majority = float(sum_signs(base, experts, SETTINGS).sum())
    settings = dataclasses.replace(SETTINGS, lambda_=lambda_, zero_sign=-1 if majority < 0 else 1)
    return finish(group, merge(base, experts, settings))


def work(one: OneTensor) -> int | None:
    """Bytes for a tensor: magnitudes, to select from and to compare; masks."""
    return None if with_model_scope(one) else per_entry(12, 1)(one)


ties_global.entrywise = with_model_scope
ties_global.work = work


def needs(tensors: Sequence[PlannedTensor]) -> tuple[Measure, ...]:
    """The thresholds of Eq. (1), and the signs of Eq. (3)."""
    if not of_model(tensors):
        return ()

    def span(tensor: PlannedTensor, model: str) -> Span:
        return _span(tensor.input_parameters[model]["density"])

    return thresholds(tensors, span, torch.float32), Measure(SIGNS, _signs)


def _signs(chunk: Chunk) -> Rows:
    """Eq. (3) of some entries."""
    zero = torch.zeros_like(chunk.d[0])
    experts = []
    for model, d in zip(chunk.models, chunk.d, strict=True):
        own = chunk.tensor.input_parameters[model]
        expert = Expert(d, own["weight"], own["density"], model=model)
        span = _span(own["density"])
        experts.append(trimmed(zero, expert, SETTINGS, span, chunk.earlier[MAGNITUDES]))
    return {"sum": sum_signs(zero, experts, SETTINGS)}


def _span(density: float) -> Span:
    return functools.partial(kept_ranks, density=density)
