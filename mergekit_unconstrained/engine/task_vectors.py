"""The task vectors of one tensor, and the way back: what most method files begin and end with.

d_i = T_i - T0 is formed in float32 or wider, whatever the dtype of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from mergekit_unconstrained.compat import TensorGroup
from mergekit_unconstrained.engine.context import finish, is_quiet, role_of
from mergekit_unconstrained.numerics.pieces import offset, pieces, scratch, widened
from mergekit_unconstrained.numerics.roles import GROUPS, Role

MATRIX_KINDS = frozenset({*GROUPS["attention"], *GROUPS["mlp"], "other"})
SECONDS_WITHOUT_BAR = 3


@torch.no_grad()
def task_vectors(group: TensorGroup, weight: Mapping[Any, float] | None = None) -> torch.Tensor:
    """weight_i * d_i of every expert, [N, *shape], contiguous; weight: by the experts' ids."""
    assert group.base is not None
    t0 = group.base.tensor
    dtype = torch.promote_types(t0.dtype, torch.float32)
    d = offsets(t0, [entry.tensor for entry in group.non_base], dtype)
    for d_i, entry in zip(d, group.non_base, strict=True):
        if weight is not None and weight[entry.id] != 1:
            d_i.mul_(weight[entry.id])
    return d


def offsets(t0: torch.Tensor, experts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The T_i - T0, [N, *shape] of a dtype, without a copy of any T."""
    flat, tensors = t0.reshape(-1), [t.reshape(-1) for t in experts]
    d = torch.empty((len(tensors), flat.numel()), dtype=dtype, device=t0.device)
    (start,) = scratch(flat, 1, dtype)
    for piece in pieces(flat):
        base = widened(flat[piece], start)
        for d_i, t in zip(d, tensors, strict=True):
            offset(t[piece], base, d_i[piece])
    return d.reshape(len(tensors), *t0.shape)


@torch.no_grad()
def add(group: TensorGroup, merged: torch.Tensor, lambda_: float) -> torch.Tensor:
    """T0 + lambda * D in the dtype of the base, checked for NaN and infinity.

    merged: D, of the base's shape, float32 or wider.
    """
    assert group.base is not None
    t0 = group.base.tensor
    flat, d = t0.reshape(-1), merged.reshape(-1)
    out = torch.empty_like(flat)
    start, room = scratch(flat, 2, merged.dtype)
    for piece in pieces(flat):
        base = widened(flat[piece], start)
        scaled = torch.mul(d[piece], lambda_, out=room[: len(base)])
        out[piece] = scaled.add_(base)
    return finish(group, out.reshape(t0.shape))


@torch.no_grad()
def add_entrywise(
    group: TensorGroup, lambda_: float, merge: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """As `add`, for a method that merges entry by entry.

    merge: the d_i of some entries, [N, n], to their D, [n]; called with as many as the processor's
    cache holds well, so that no parent is copied in full.
    """
    assert group.base is not None
    base = group.base.tensor
    dtype = torch.promote_types(base.dtype, torch.float32)
    flat, experts = base.reshape(-1), [e.tensor.reshape(-1) for e in group.non_base]
    out = torch.empty_like(flat)
    for piece in pieces(base):
        t0 = flat[piece].to(dtype)
        d = torch.stack([t[piece].to(dtype) for t in experts]).sub_(t0)
        out[piece] = merge(d).mul_(lambda_).add_(t0)
    return finish(group, out.reshape(base.shape))


def add_mean(
    group: TensorGroup, lambda_: float, weight: Mapping[Any, float] | None = None
) -> torch.Tensor:
    """As `add`, of the mean of the weight_i * d_i, a few entries at a time."""
    base = group.base
    assert base is not None
    given = [1.0 if weight is None else weight[entry.id] for entry in group.non_base]
    dtype = torch.promote_types(base.tensor.dtype, torch.float32)
    weights = torch.tensor(given, dtype=dtype, device=base.tensor.device)[:, None]
    return add_entrywise(group, lambda_, lambda d: d.mul_(weights).mean(dim=0))


def may_be_matrix(group: TensorGroup) -> bool:
    """Whether a tensor is what papers on matrices mean: 2-D, of attention or MLP.

    Not the embedding, the head, norms and biases. Ours: matrices of unknown kind inside a layer and
    unnamed ones count. Whether it can be decomposed is known from its task vectors (`is_finite`).
    """
    assert group.base is not None
    shape = group.base.tensor.shape
    placed = not group.metadata.name or is_matrix_role(role_of(group.metadata))
    return placed and len(shape) == 2 and shape.numel() > 0


def is_matrix_role(role: Role) -> bool:
    """Whether a tensor with this role, where it is 2-D, is a matrix of attention or MLP."""
    return role.layer is not None and role.kind in MATRIX_KINDS


def is_finite(d: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinity; the sum of many finite ones may overflow."""
    return bool(d.sum().isfinite()) or bool(d.isfinite().all())


@contextmanager
def step_bar(group: TensorGroup, steps: int) -> Iterator[Callable[[], Any]]:
    """A bar over the steps of one tensor, once it takes seconds; gives what counts a step."""
    with tqdm(
        total=steps,
        desc=group.metadata.name or "steps",
        leave=False,
        delay=SECONDS_WITHOUT_BAR,
        disable=is_quiet() or None,
    ) as bar:
        yield bar.update
