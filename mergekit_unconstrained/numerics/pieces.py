"""Tensors piece by piece, as many entries at a time as a processor's cache holds well.

No full-size float32 copy of a bf16 parent is ever made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch

CHUNK = 1 << 16
"""Entries combined at a time on a CPU: 256 KiB in float32, several of which fit a core's cache."""


class Behind(threading.local):
    """What a thread is told of the pieces it leaves behind: the entries of the tensor, the end."""

    tell: Callable[[int, int], None] | None = None


BEHIND = Behind()


def pieces(base: torch.Tensor) -> Iterator[slice]:
    """The flat entries of a tensor, as many at a time as the processor's cache holds well."""
    count = base.numel()
    step = CHUNK if base.device.type == "cpu" else count
    for start in range(0, count, step):
        yield slice(start, start + step)
        if BEHIND.tell is not None:
            BEHIND.tell(count, min(start + step, count))


def scratch(base: torch.Tensor, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Room for `count` pieces, of which every piece overwrites what the one before left.

    Memory that was in the processor's cache a moment ago; fresh one costs more than the arithmetic.
    """
    size = min(CHUNK, base.numel()) if base.device.type == "cpu" else base.numel()
    return torch.empty((count, size), dtype=dtype, device=base.device).unbind()


def widened(x: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Some entries in the arithmetic's dtype, which is that of the room (scratch)."""
    return x if x.dtype == room.dtype else room[: len(x)].copy_(x)


def offset(x: torch.Tensor, t0: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """d_i of some entries, from those of T_i and of T0 (widened), written to the room."""
    d = room[: len(x)]
    return torch.sub(x, t0, out=d) if x.dtype == d.dtype else d.copy_(x).sub_(t0)


def as_float(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as zeros and ones."""
    return mask.view(torch.uint8).to(dtype)
