"""The few numbers a loss needs of the logits, and the one gradient that goes back into them.

For a temperature T and N rows of the logits z [M, V], each measured from its largest entry:

    total[n]     = log sum_v exp z[n, v]                                                    (1)
    warm[n]      = log sum_v exp(z[n, v] / T)                                               (2)
    values[n, c] = z[n, columns[n, c]]                                                      (3)
    mean[n]      = 1/V sum_v z[n, v]                                                        (4)
    others[n]    = log of the sum in (2) without the listed[n]                              (5)

Every loss of losses.py is ordinary differentiable arithmetic on these [N] and [N, C] tensors, and
blind to what a row is measured from; from its largest entry the numbers that matter are small and
round little, and the origin needs no gradient. Only the function here sees tokens x vocabulary. It
walks over the rows in chunks, widened to float32; its backward pass recomputes the exponentials and
writes the gradient once, in the logits' dtype. Beside the logits that gradient is the only tensor
of their size; torch's cross_entropy keeps a third.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_CPU = 1 << 18
"""Logits taken at a time on a CPU: 1 MiB in float32, which stays in a core's cache."""
CHUNK = 1 << 25
"""Logits taken at a time on an accelerator: 128 MiB in float32."""
BLOCK = 64
"""Columns of which only the largest is looked at when the top k are sought."""


@dataclass(frozen=True, eq=False)
class Readout:
    """Eqs. (1) to (5), float32 or wider; None for what was not asked for.

    total, warm (the same tensor at T = 1), mean, others [N]; values [N, C].
    """

    total: torch.Tensor
    warm: torch.Tensor
    values: torch.Tensor
    mean: torch.Tensor | None
    others: torch.Tensor | None


def read(
    logits: torch.Tensor,
    columns: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    temperature: float = 1.0,
    mean: bool = False,
    listed: torch.Tensor | None = None,
) -> Readout:
    """Eqs. (1) to (5), differentiable by losses that no constant added to a row of logits changes.

    logits: [M, V], any float dtype. columns: [N, C] int64 in [0, V). rows: [N] int64, which rows
    count, none of them twice; None for all. mean: whether (4) is wanted. listed: [N, K] int64, -1
    unused, for (5); None when it is not wanted.
    """
    total, warm, values, average, others = _Read.apply(
        logits, columns, rows, temperature, mean, listed
    )
    return Readout(total, total if warm is None else warm, values, average, others)


def top_columns(logits: torch.Tensor, k: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The k columns with the largest logits of every row that counts, by falling logit. [N, k]."""
    count = len(logits) if rows is None else len(rows)
    out = torch.empty(count, k, dtype=torch.long, device=logits.device)
    with torch.no_grad():
        for piece in _pieces(count, logits):
            out[piece] = _top(_take(logits, rows, piece), k)
    return out


class _Read(torch.autograd.Function):
    """`read`, forth and back."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        columns: torch.Tensor,
        rows: torch.Tensor | None,
        temperature: float,
        mean: bool,
        listed: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        count = len(columns)
        total = torch.empty(count, dtype=dtype, device=logits.device)
        largest = torch.empty_like(total)
        warm = torch.empty_like(total) if temperature != 1 else None
        average = torch.empty_like(total) if mean else None
        others = torch.empty_like(total) if listed is not None else None
        values = torch.empty(columns.shape, dtype=dtype, device=logits.device)
        for piece in _pieces(count, logits):
            z = _take(logits, rows, piece).to(dtype)
            largest[piece] = z.amax(dim=1)
            z = z - largest[piece, None]
            total[piece] = z.exp().sum(dim=1).log_()
            values[piece] = z.gather(1, columns[piece])
            if average is not None:
                average[piece] = z.mean(dim=1)
            if warm is not None:
                z.div_(temperature)
                warm[piece] = z.exp().sum(dim=1).log_()
            if listed is not None and others is not None:
                others[piece] = _log_sum_exp(_strike(z, listed[piece], -torch.inf))
        ctx.save_for_backward(logits, columns, rows, listed, largest, total, warm, others)
        ctx.temperature = temperature
        return total, warm, values, average, others

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_total: torch.Tensor,
        d_warm: torch.Tensor | None,
        d_values: torch.Tensor,
        d_mean: torch.Tensor | None,
        d_others: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        logits, columns, rows, listed, largest, total, warm, others = ctx.saved_tensors
        grad = torch.empty_like(logits) if rows is None else torch.zeros_like(logits)
        t = ctx.temperature
        for piece in _pieces(len(columns), logits):
            z = _take(logits, rows, piece).to(total.dtype)
            in_place = rows is None and grad.dtype == total.dtype
            g = grad[piece] if in_place else torch.empty_like(z)
            torch.sub(z, largest[piece, None], out=g)
            z = g / t if d_warm is not None or d_others is not None else g
            g.sub_(total[piece, None]).exp_().mul_(d_total[piece, None])
            if d_mean is not None:
                g.add_(d_mean[piece, None] / z.shape[1])
            if d_warm is not None:
                g.addcmul_((z - warm[piece, None]).exp_(), d_warm[piece, None] / t)
            if d_others is not None:
                # Where nothing is left over, others is -inf and its gradient 0: not 0 * inf.
                rest = others[piece].masked_fill(d_others[piece] == 0, torch.inf)
                share = _strike(z.sub_(rest[:, None]).exp_(), listed[piece], 0.0)
                g.addcmul_(share, d_others[piece, None] / t)
            g.scatter_add_(1, columns[piece], d_values[piece])
            if rows is not None:
                grad[rows[piece]] = g.to(grad.dtype)
            elif not in_place:
                grad[piece] = g
        return grad, None, None, None, None, None


def _pieces(count: int, logits: torch.Tensor) -> Iterator[slice]:
    """So many rows at a time that a chunk has its size."""
    size = CHUNK_CPU if logits.device.type == "cpu" else CHUNK
    step = max(1, size // max(1, logits.shape[1]))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _take(logits: torch.Tensor, rows: torch.Tensor | None, piece: slice) -> torch.Tensor:
    return logits[piece] if rows is None else logits[rows[piece]]


def _strike(z: torch.Tensor, listed: torch.Tensor, value: float) -> torch.Tensor:
    """Write `value` into the listed columns of z [C, V], in place; -1 lists nothing."""
    first = z[:, 0].clone()
    z.scatter_(1, listed.clamp(min=0), value)
    # An unused entry wrote to column 0: give that back where 0 itself is not listed.
    z[:, 0] = torch.where((listed == 0).any(dim=1), z[:, 0], first)
    return z


def _log_sum_exp(z: torch.Tensor) -> torch.Tensor:
    """Of every row, which is overwritten; -inf where nothing else is in it."""
    most = z.amax(dim=1).clamp_(min=torch.finfo(z.dtype).min)
    return z.sub_(most[:, None]).exp_().sum(dim=1).log_().add_(most)


def _top(z: torch.Tensor, k: int) -> torch.Tensor:
    """The columns of the k largest entries of every row, by falling value.

    They lie in the k blocks with the largest maxima, and those are found in one quick pass: a tenth
    of the time of sorting through everything.
    """
    blocks = z.shape[1] // BLOCK
    if blocks < 2 * k:
        return z.topk(k, dim=1).indices
    maxima = z[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(dim=2)
    start = maxima.topk(k, dim=1).indices[:, :, None] * BLOCK
    inside = (start + torch.arange(BLOCK, device=z.device)).flatten(1)
    left_over = torch.arange(blocks * BLOCK, z.shape[1], device=z.device).expand(len(z), -1)
    candidates = torch.cat([inside, left_over], dim=1)
    return candidates.gather(1, z.gather(1, candidates).topk(k, dim=1).indices)
