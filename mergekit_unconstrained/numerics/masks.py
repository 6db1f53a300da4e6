"""Random numbers that depend on what they are for, never on when they were drawn.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose j-th number is a mixture of
the bits of start + j * gamma: any piece of a stream is computed by itself, at once. The start comes
from (seed, tensor, model); entry j of a tensor always gets the j-th lane of its stream. Order of
tensors and models, number of shards and devices leave every mask as it is.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch

LANES = 2**32
GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(start: int, first: int, count: int) -> np.ndarray:
    """The numbers first, first + 1 ... of a stream, [count] uint64; its very first is number 1."""
    x = np.arange(first, first + count, dtype=np.uint64)
    x *= GAMMA
    x += np.uint64(start)
    shifted = np.empty_like(x)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x ^= np.right_shift(x, np.uint64(shift), out=shifted)
        if factor != 1:
            x *= np.uint64(factor)
    return x


class Lanes:
    """The uniform integers of one tensor and model, piece by piece from the first entry on."""

    def __init__(self, *, seed: int, tensor: str, model: str, bits: Literal[8, 32] = 32) -> None:
        key = hashlib.sha256(f"{seed}\0{tensor}\0{model}".encode()).digest()
        self._start = int.from_bytes(key[:8], "little")
        # Little-endian order by decree, so that other machines draw the same lanes.
        self._dtype = np.dtype(f"<u{bits // 8}")
        self._drawn = 0
        self._left = np.empty(0, dtype=self._dtype)

    def take(self, count: int) -> np.ndarray:
        """The next ones, [count] uint8 or uint32, independent and uniform over all values."""
        draws = -(-(count - len(self._left)) * self._dtype.itemsize // 8)
        numbers = splitmix64(self._start, self._drawn + 1, draws)
        self._drawn += draws
        lanes = numbers.astype("<u8", copy=False).view(self._dtype)
        if len(self._left):
            lanes = np.concatenate([self._left, lanes])
        self._left = lanes[count:]
        return lanes[:count]


class Coins:
    """One coin for every entry of a tensor, heads with a given probability, exact to 2^-32.

    Eight bits decide, but for the one entry in 256 that needs another 24.
    """

    def __init__(self, keep: float, *, seed: int, tensor: str, model: str) -> None:
        self._high, self._low = divmod(int(thresholds(keep)), 1 << 24)
        self._lanes = Lanes(seed=seed, tensor=tensor, model=model, bits=8)
        self._more = Lanes(seed=seed, tensor=tensor, model=f"{model}\0more")

    def toss(self, heads: np.ndarray) -> None:
        """The next entries. heads: [n] bool, written to."""
        if self._high == 1 << 8:  # no 8-bit number is that large
            heads.fill(True)
            return
        lanes = self._lanes.take(len(heads))
        if not self._low:  # whatever the further bits are
            np.less(lanes, np.uint8(self._high), out=heads)
            return
        undecided = np.flatnonzero(np.equal(lanes, np.uint8(self._high), out=heads))
        np.less(lanes, np.uint8(self._high), out=heads)
        heads[undecided] = self._more.take(len(undecided)) >> np.uint32(8) < self._low


def uniform_lanes(shape: torch.Size, *, seed: int, tensor: str, model: str) -> np.ndarray:
    """All of a tensor's lanes, of its shape."""
    return Lanes(seed=seed, tensor=tensor, model=model).take(shape.numel()).reshape(shape)


def thresholds(keep: float | np.ndarray) -> np.ndarray:
    """int64 t with P(lane < t) = keep, exact to 2^-32."""
    return np.rint(np.clip(keep, 0, 1) * LANES).astype(np.int64)
