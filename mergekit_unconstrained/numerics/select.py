"""Exact selection by magnitude, with a stated rule for ties.

Ties are common: bf16 task vectors of 16 M entries hold about 1,300 distinct magnitudes. Among equal
magnitudes the entry with the lowest flat index is taken first, whether the largest or the smallest
are asked for. mergekit's own `argsort` and `sort` leave that to chance; run with `stable=True` they
choose the same entries as here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Extreme:
    """The k largest or smallest of numbers that come again piece by piece, from the first one on.

    threshold: the least extreme number that is chosen. ties: how many of those equal to it are.
    """

    def __init__(self, values: np.ndarray, k: int, *, largest: bool) -> None:
        """values: all of them, [n], no NaN among the chosen; they are reordered. 0 <= k <= n."""
        n = len(values)
        self.largest = largest
        self.ties = 0
        self.threshold: Any = None  # for nothing, or everything
        self._everything = k >= n > 0
        if 0 < k < n:
            # A selection, not a sort: a thirtieth of the time of argsort.
            rank = n - k if largest else k - 1
            values.partition(rank)
            self.threshold = values[rank]
            beyond = values[rank:] > self.threshold if largest else values[:rank] < self.threshold
            self.ties = k - int(np.count_nonzero(beyond))

    def take(self, values: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Which of the next numbers are chosen, [m] bool, in `out`. Called once for every piece."""
        if self.threshold is None:
            out.fill(self._everything)
            return out
        strictly = np.greater if self.largest else np.less
        if self.ties:
            equal = np.equal(values, self.threshold, out=out)
            found = int(np.count_nonzero(equal))
            if found > self.ties:
                first = np.flatnonzero(equal)[: self.ties]
                self.ties = 0
                strictly(values, self.threshold, out=out)
                out[first] = True
                return out
            self.ties -= found
            reaching = np.greater_equal if self.largest else np.less_equal
            return reaching(values, self.threshold, out=out)
        return strictly(values, self.threshold, out=out)


def extreme_mask(magnitudes: torch.Tensor, k: int, *, largest: bool) -> torch.Tensor:
    """A boolean mask of exactly the k largest (or smallest) entries.

    magnitudes: [n], non-negative, no NaN. k is clamped to [0, n]. Returns [n] bool.
    """
    n = magnitudes.numel()
    if k <= 0 or k >= n:
        return torch.full((n,), k > 0, dtype=torch.bool, device=magnitudes.device)
    if magnitudes.device.type != "cpu":
        mask = torch.zeros_like(magnitudes, dtype=torch.bool)
        mask[torch.argsort(magnitudes, descending=largest, stable=True)[:k]] = True
        return mask
    values = magnitudes.numpy()
    chosen = np.empty(n, np.bool_)
    return torch.from_numpy(Extreme(values.copy(), k, largest=largest).take(values, chosen))


def stable_order(rows: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
    """The columns of every row by magnitude, ascending or largest first, equal ones by index.

    rows: [r, m], non-negative. Returns [r, m] int64.
    """
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return torch.argsort(rows, dim=1, stable=True, descending=largest)
    # Non-negative floats sort as their bits do, so magnitude and column fit one integer, whose sort
    # needs no stable rule: a tenth of the time of torch.argsort.
    keys = rows.numpy().view(np.int32).astype(np.int64)
    if largest:
        np.subtract(0x7FFFFFFF, keys, out=keys)
    keys <<= 32
    keys |= np.arange(rows.shape[1])
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return torch.from_numpy(keys)
