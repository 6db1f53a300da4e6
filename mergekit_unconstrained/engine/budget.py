"""What a merge will take of memory, reckoned from headers before anything is read.

The same as the engine reckons while it merges (engine/workers.py), which is on the safe side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mergekit_unconstrained import compat
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.engine.context import MergeContext, using
from mergekit_unconstrained.engine.layout import Output
from mergekit_unconstrained.engine.plan import Plan, PlannedTensor
from mergekit_unconstrained.engine.source import DTYPES
from mergekit_unconstrained.engine.workers import Job, cores, over_budget


@dataclass(frozen=True)
class Header:
    """What a Job asks of an input, without the file."""

    like: torch.Tensor
    has_rows: bool
    is_copied: bool


def most_memory(plan: Plan) -> int:
    """Bytes for tensors under way at once, at most, beside the program's own."""
    if plan.job.engine == "mergekit":
        # One output shard, of up to 5 billion parameters, and one tensor's inputs.
        largest = max((t.bytes for t in plan.tensors), default=0)
        return plan.out_bytes + largest * (len(plan.experts) + 4)
    with using(MergeContext(plan.roles)):
        found = sorted((job.footprint for job in _jobs(plan)), reverse=True)
    together = sum(found[: cores()])
    return max(*found[:1], min(together, plan.job.memory_budget or together), 0)


def warning(plan: Plan) -> str:
    """What to say where memory_budget does not hold every tensor; nothing otherwise."""
    if plan.job.engine == "mergekit":
        return ""
    with using(MergeContext(plan.roles)):
        return over_budget(_jobs(plan), plan.job)


def _jobs(plan: Plan) -> list[Job]:
    parents = {p.name: p for p in (plan.base, *plan.experts)}
    jobs = []
    for task, tensor in zip(plan.tasks, plan.tensors, strict=True):
        if tensor.shape is None:
            continue
        inputs = _inputs(tensor, parents, compat.dtype_from_name(plan.config.dtype))
        dtype = compat.dtype_from_name(tensor.dtype) or torch.float32
        output = Output(tensor.name, tensor.shape, dtype)
        jobs.append(Job(task, inputs, output))  # type: ignore[arg-type]
    return jobs


def _inputs(
    tensor: PlannedTensor, parents: Mapping[str, Parent], dtype: torch.dtype | None
) -> dict[compat.ModelReference, Header]:
    inputs = {}
    for model, stored in tensor.inputs.items():
        header = (parents[model].tensors or {}).get(stored or "")
        if header is None and model not in tensor.converted:
            continue  # an optional tensor that the model lacks
        kept = DTYPES.get(header.dtype) if header is not None else None
        shape = header.shape if header is not None else tensor.shape
        like = torch.empty(shape or (), dtype=dtype or kept or torch.float32, device="meta")
        copied = header is None or dtype not in (None, kept)
        inputs[parents[model].reference] = Header(like, header is not None, copied)
    return inputs
