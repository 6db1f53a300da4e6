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


def uniform_lanes(count: int, *, seed: int, tensor: str, model: str) -> np.ndarray:
    """`count` independent uniform integers in [0, 2^32), [count] uint32."""
    key = hashlib.sha256(f"{seed}\0{tensor}\0{model}".encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    raw = stream.random_raw((count + 1) // 2)
    # Little-endian order by decree, so that other machines draw the same lanes.
    return np.asarray(raw.astype("<u8").view("<u4")[:count])


def bernoulli_mask(
    shape: torch.Size, keep: float, *, seed: int, tensor: str, model: str
) -> torch.Tensor:
    """A boolean mask whose entries are True independently with probability `keep`.

    The probability is exact to 2^-32. Lives on the CPU.
    """
    lanes = uniform_lanes(shape.numel(), seed=seed, tensor=tensor, model=model)
    threshold = min(max(round(keep * _LANES), 0), _LANES)
    return torch.from_numpy(lanes < threshold).reshape(shape)


def graded_mask(keep: torch.Tensor, *, seed: int, tensor: str, model: str) -> torch.Tensor:
    """A boolean mask, True with the probability that `keep` holds for each entry."""
    lanes = uniform_lanes(keep.numel(), seed=seed, tensor=tensor, model=model)
    uniform = torch.from_numpy(lanes.astype(np.float64)).reshape(keep.shape) / _LANES
    return (uniform.to(keep.device) < keep.double()).to(keep.device)
