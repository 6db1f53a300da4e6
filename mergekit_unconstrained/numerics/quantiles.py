"""Exact order statistics of numbers that can be read several times, but not held.

Floats of one sign are ordered as their bits are. A pass counts, over 65,536 bins, the next sixteen
bits of every number that may still be one of those wanted: two passes settle float32, four float64,
whatever the numbers are (equal ones too) and however many they are. Memory is half a MiB for every
number that is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

DIGIT = 16
BINS = 1 << DIGIT
_UNSIGNED: dict[torch.dtype, type[np.unsignedinteger]] = {
    torch.float32: np.uint32,
    torch.float64: np.uint64,
}


@dataclass(frozen=True)
class Summary:
    """What one row of numbers comes to.

    count: how many. total, absolute, squares: sums of x, |x|, x^2 in float64. least, greatest: 0
    for no numbers. entries: rank -> the number of that rank, 0 the smallest, for the ranks asked
    for.
    """

    count: int = 0
    total: float = 0.0
    absolute: float = 0.0
    squares: float = 0.0
    least: float = 0.0
    greatest: float = 0.0
    entries: Mapping[int, float] = field(default_factory=dict)


class Selection:
    """Numbers by rank. All of them are given to `add` in every pass, in any order and pieces.

    dtype: torch.float32 or torch.float64, of the numbers.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._unsigned = _UNSIGNED[dtype]
        self._bits = np.dtype(self._unsigned).itemsize * 8
        self._known = 0  # leading bits that are settled
        self._prefixes = np.zeros(1, self._unsigned)  # sorted: the values these bits still take
        self._counts = np.zeros((1, BINS), np.int64)
        self._places: dict[int, tuple[int, int]] = {}  # rank -> prefix, rank among its numbers

    @classmethod
    def passes(cls, dtype: torch.dtype) -> int:
        """How many passes settle numbers of a dtype."""
        return np.dtype(_UNSIGNED[dtype]).itemsize * 8 // DIGIT

    def add(self, numbers: torch.Tensor) -> None:
        """Count some numbers: [n], of the dtype, on the CPU, no NaN."""
        keys = _keys(numbers, self._unsigned)
        if not self._known:
            self._counts[0] += _count(keys >> (self._bits - DIGIT), BINS)
            return
        # Nearly all numbers fall out by their first sixteen bits.
        first = np.zeros(BINS, np.bool_)
        first[self._prefixes >> (self._known - DIGIT)] = True
        keys = keys[first[keys >> (self._bits - DIGIT)]]
        prefixes = keys >> (self._bits - self._known)
        slots = np.searchsorted(self._prefixes, prefixes)
        slots[slots == len(self._prefixes)] = 0
        mine = self._prefixes[slots] == prefixes
        keys, slots = keys[mine], slots[mine]
        digits = (keys >> (self._bits - self._known - DIGIT)) & (BINS - 1)
        total = _count(slots * BINS + digits.astype(np.int64), self._counts.size)
        self._counts += total.reshape(self._counts.shape)

    def next_pass(self, ranks: Iterable[int] = ()) -> bool:
        """End a pass; whether another one is needed.

        ranks: of the numbers wanted, at the end of the first pass, clamped to those there are.
        """
        if not self._known:
            last = int(self._counts.sum()) - 1
            self._places = {r: (0, min(max(r, 0), last)) for r in ranks if last >= 0}
        running = self._counts.cumsum(axis=1)
        slot_of = {int(prefix): slot for slot, prefix in enumerate(self._prefixes)}
        for rank, (prefix, place) in self._places.items():
            sums = running[slot_of[prefix]]
            digit = int(np.searchsorted(sums, place, side="right"))
            below = int(sums[digit - 1]) if digit else 0
            self._places[rank] = (prefix << DIGIT | digit, place - below)
        self._known += DIGIT
        found = sorted({prefix for prefix, _ in self._places.values()})
        self._prefixes = np.array(found, self._unsigned)
        self._counts = np.zeros((len(found), BINS), np.int64)
        return bool(found) and self._known < self._bits

    @property
    def entries(self) -> dict[int, float]:
        """rank -> number, once no further pass is needed; empty when there are no numbers."""
        return {r: _number(prefix, self._unsigned) for r, (prefix, _) in self._places.items()}


def _count(values: np.ndarray, bins: int) -> np.ndarray:
    return np.bincount(values.astype(np.int64), minlength=bins)


def _keys(numbers: torch.Tensor, unsigned: type[np.unsignedinteger]) -> np.ndarray:
    """Unsigned integers in the order of the numbers, -0 beside 0."""
    bits = (numbers + 0.0).numpy().view(unsigned)
    width = bits.itemsize * 8 - 1
    top = unsigned(1 << width)
    negative = bits >> unsigned(width)
    # All bits of a negative number are turned, of any other one the first alone.
    return bits ^ (top | (unsigned(0) - negative))


def _number(key: int, unsigned: type[np.unsignedinteger]) -> float:
    """The number of a key."""
    width = np.dtype(unsigned).itemsize * 8
    top = 1 << (width - 1)
    bits = key ^ top if key & top else key ^ ((1 << width) - 1)
    wide = np.float32 if width == 32 else np.float64
    return float(np.array([bits], unsigned).view(wide)[0])
