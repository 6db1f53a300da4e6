"""Rows of sparse distributions while they are being put together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergekit_unconstrained.fusion.records import Floats, Ints


@dataclass
class Rows:
    """n distributions, changed in place.

    source_ids, ids, probs [n, K]: each entry as the source and as the pivot names it (-1: no
    counterpart); tail, unmapped [n]; scale [n]: what an absolute probability of the source is
    multiplied by in this row.
    """

    source_ids: Ints
    ids: Ints
    probs: Floats
    tail: Floats
    unmapped: Floats
    scale: Floats

    @classmethod
    def empty(cls, count: int) -> Rows:
        """Rows without a distribution."""
        nothing = np.full((count, 1), -1, dtype=np.int32)
        zeros = np.zeros(count, dtype=np.float32)
        return cls(nothing, nothing, zeros[:, None], zeros, zeros, zeros)

    def clear(self, rows: npt.NDArray[np.bool_]) -> None:
        """Nothing at all in these rows."""
        self.ids[rows] = -1
        for numbers in (self.probs, self.tail, self.unmapped):
            numbers[rows] = 0

    def gather_unmapped(self) -> None:
        """The mass of entries without a counterpart becomes one number; the last entry has one."""
        without = self.ids < 0
        without[:, -1] = False
        places = np.flatnonzero(without)
        if places.size:
            flat, rows = self.probs.reshape(-1), places // self.ids.shape[1]
            lost = np.bincount(rows, weights=flat[places], minlength=len(self.ids))
            self.unmapped += lost.astype(np.float32)
            flat[places] = 0


def merge_duplicates(ids: Ints, probs: Floats) -> None:
    """Give all mass of an id to the first of its entries, in place; ids, probs [n, K], contiguous.

    What remains of the others is -1 and 0.
    """
    width = ids.shape[1]
    # id and column as one number: sorting it costs half of an argsort
    wide = (int(ids.max(initial=0)) + 1) * width >= 2**31
    packed = ids.astype(np.int64 if wide else np.int32) * width
    packed += np.arange(width, dtype=packed.dtype)
    packed.sort(axis=1)
    packed = packed.reshape(-1)
    key = packed // width
    again = np.flatnonzero((key[1:] == key[:-1]) & (key[1:] >= 0)) + 1
    again = again[again % width > 0]  # not the last of one row and the first of the next
    if not again.size:
        return
    begins = np.diff(again, prepend=-1) != 1
    first = (again[begins] - 1)[np.cumsum(begins) - 1]
    row = again - again % width
    kept = row + packed[first] % width
    gone = row + packed[again] % width
    flat_ids, flat_probs = ids.reshape(-1), probs.reshape(-1)
    np.add.at(flat_probs, kept, flat_probs[gone])
    flat_ids[gone], flat_probs[gone] = -1, 0
