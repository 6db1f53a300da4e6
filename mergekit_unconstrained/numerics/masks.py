"""Random numbers that depend on what they are for, never on when they were drawn.

A counter-based generator (Philox) is keyed by (seed, tensor, model); entry j of a tensor always
gets the j-th 32-bit lane of its stream. Order of tensors and models, number of shards and devices
leave every mask as it is.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

LANES = 2**32


class Lanes:
    """The uniform integers of one tensor and model, piece by piece from the first entry on."""

    def __init__(self, *, seed: int, tensor: str, model: str) -> None:
        key = hashlib.sha256(f"{seed}\0{tensor}\0{model}".encode()).digest()
        self._stream = np.random.Philox(key=int.from_bytes(key[:16], "little"))
        self._left = np.empty(0, dtype="<u4")

    def take(self, count: int) -> np.ndarray:
        """The next ones, [count] uint32, independent and uniform in [0, 2^32)."""
        raw = self._stream.random_raw((count - len(self._left) + 1) // 2)
        # Little-endian order by decree, so that other machines draw the same lanes.
        lanes = raw.astype("<u8", copy=False).view("<u4")
        if len(self._left):
            lanes = np.concatenate([self._left, lanes])
        self._left = lanes[count:]
        return lanes[:count]


def uniform_lanes(shape: torch.Size, *, seed: int, tensor: str, model: str) -> np.ndarray:
    """All of a tensor's lanes, of its shape."""
    return Lanes(seed=seed, tensor=tensor, model=model).take(shape.numel()).reshape(shape)


def thresholds(keep: float | np.ndarray) -> np.ndarray:
    """int64 t with P(lane < t) = keep, exact to 2^-32."""
    return np.rint(np.clip(keep, 0, 1) * LANES).astype(np.int64)
