"""Random numbers that depend on what they are for, never on when they were drawn.

A counter-based generator (Philox) is keyed by (seed, tensor, model); entry j of a tensor always
gets the j-th 32-bit lane of its stream. Order of tensors and models, number of shards and devices
leave every mask as it is.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_LANES = 2**32


def uniform_lanes(shape: torch.Size, *, seed: int, tensor: str, model: str) -> np.ndarray:
    """Independent uniform integers in [0, 2^32), uint32 of the shape."""
    key = hashlib.sha256(f"{seed}\0{tensor}\0{model}".encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    raw = stream.random_raw((shape.numel() + 1) // 2)
    # Little-endian order by decree, so that other machines draw the same lanes.
    return raw.astype("<u8", copy=False).view("<u4")[: shape.numel()].reshape(shape)


def thresholds(keep: float | np.ndarray) -> np.ndarray:
    """int64 t with P(lane < t) = keep, exact to 2^-32."""
    return np.rint(np.clip(keep, 0, 1) * _LANES).astype(np.int64)
