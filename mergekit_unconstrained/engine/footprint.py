"""What a method takes of memory for one tensor, and whether it can be merged by parts.

A method says so by two attributes, functions of OneTensor: `work`, the bytes it takes beside the
inputs and the output, and `entrywise`, whether it merges every entry by itself. Where it says
nothing the engine guesses (engine/workers.py). The figures are counted from the methods' code, two
experts or more, and held against what they take by tests/engine/test_footprint.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_unconstrained.engine.task_vectors import is_matrix_role
from mergekit_unconstrained.numerics.roles import Role

KEPT_BY_ALLOCATOR = 64 << 20
"""Bytes that a kernel of several large blocks takes beside them, at most: what the allocator keeps
of freed blocks below 32 MiB, and the room of BLAS."""
PIECES = 24 << 20
"""Bytes that a kernel takes for the pieces it works on, at most; measured, 16 an entry before."""


@dataclass(frozen=True)
class OneTensor:
    """An output tensor before it is merged. parameters: resolved for it. experts: that have it."""

    role: Role
    shape: tuple[int, ...]
    experts: int
    parameters: Mapping[str, Any]

    @property
    def entries(self) -> int:
        """Their number."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is what papers on matrices mean (engine/task_vectors.may_be_matrix)."""
        return is_matrix_role(self.role) and len(self.shape) == 2


Work = Callable[[OneTensor], int | None]
"""Bytes of a method for a tensor in float32, None for the engine's guess; float64 takes double."""


def per_entry(fixed: int, expert: int, kept: int = 0) -> Work:
    """So many bytes an entry, so many more for each expert; as much again up to `kept` bytes."""

    def work(one: OneTensor) -> int:
        found = one.entries * (fixed + expert * one.experts)
        return found + min(found, kept) + min(16 * one.entries, PIECES)

    return work


def per_matrix(entry: int, expert: int = 4, square: int = 0, columns: int = 0) -> Work:
    """For methods that treat matrices as such.

    Bytes an entry; an entry for each expert; and for each entry of a square matrix of the smaller
    side (40: a Gram matrix, its eigenvectors and the room of LAPACK), and of the columns.
    """

    def work(one: OneTensor) -> int | None:
        if not one.is_matrix:
            return None
        found = one.entries * (entry + expert * one.experts)
        found += square * min(one.shape) ** 2 + columns * one.shape[1] ** 2
        return found + min(found, KEPT_BY_ALLOCATOR)

    return work


def always(_: OneTensor) -> bool:
    """Every tensor can be merged by parts."""
    return True


def outside_matrices(one: OneTensor) -> bool:
    """All but matrices of attention and MLP can be merged by parts."""
    return not one.is_matrix


def with_model_scope(one: OneTensor) -> bool:
    """All can be merged by parts where what is known of the whole model decides on an entry."""
    return bool(one.parameters["scope"] == "model")
