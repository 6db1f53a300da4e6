"""Sums in float64 over numbers of any float dtype, of which only a few are widened at a time."""

from __future__ import annotations

import math

import torch

PIECE = 1 << 17
"""Entries widened at a time: 1 MiB in float64, which stays in a core's cache."""


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """sum of a * b; a, b: any equal shape."""
    x, y = a.reshape(-1), b.reshape(-1)
    pieces = (slice(start, start + PIECE) for start in range(0, x.numel(), PIECE))
    return sum(float(torch.dot(x[p].double(), y[p].double())) for p in pieces)


def norm(a: torch.Tensor) -> float:
    """The square root of the sum of squares; entries whose square leaves float64 count as zero."""
    return math.sqrt(dot(a, a))
