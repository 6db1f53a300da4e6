"""Trimming by magnitude over the whole model instead of tensor by tensor.

A density rho then means that share of all entries of an expert: those of ranks first <= r < end by
|d_i| over all tensors are kept, and with them whatever equals the first or the last of them, as in
the code of TIES' authors. A tensor may lose all its entries, or none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from mergekit_unconstrained.engine.context import measured
from mergekit_unconstrained.engine.plan import PlannedTensor
from mergekit_unconstrained.engine.prepass import Measure
from mergekit_unconstrained.numerics import keeping
from mergekit_unconstrained.numerics.quantiles import Summary
from mergekit_unconstrained.numerics.settings import Expert, Kept, Settings

MAGNITUDES = "|d| of every expert"

Span = Callable[[int], tuple[int, int]]
"""Entries of an expert -> first and end of the ranks kept, 0 the smallest magnitude."""


def thresholds(
    tensors: Sequence[PlannedTensor], span: Callable[[PlannedTensor, str], Span], dtype: torch.dtype
) -> Measure:
    """What the pre-pass must find: the magnitudes at both ends of every span that occurs.

    span: of an expert, in a tensor.
    """

    def ranks(model: str, count: int) -> set[int]:
        spans = {span(t, model)(count) for t in tensors if t.inputs.get(model) is not None}
        return {rank for first, end in spans if first < end for rank in (first, end - 1)}

    return Measure(MAGNITUDES, ranks=ranks, dtype=dtype)


def trimmed(
    base: torch.Tensor,
    expert: Expert,
    settings: Settings,
    span: Span,
    found_before: Mapping[str, Summary] | None = None,
) -> Expert:
    """An expert with what is kept of its tensor.

    found_before: what the pre-pass found, while it is still under way.
    """
    found = (found_before or measured(MAGNITUDES)).get(expert.model)
    if found is None or not found.count:
        return expert
    first, end = span(found.count)
    bounds = (found.entries[first], found.entries[end - 1]) if first < end else None
    kept = Kept() if bounds is not None and (first, end) == (0, found.count) else None
    return dataclasses.replace(
        expert, kept=kept or keeping.keep_between(base, expert, settings, bounds)
    )
