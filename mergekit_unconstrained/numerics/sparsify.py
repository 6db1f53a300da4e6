"""Which entries of a task vector to keep, and how to make up for the others.

`magnitudes` is |d_i| of one task vector, any shape, float32 or float64; every mask is boolean and
of its shape. The rules are those of the papers; where mergekit departs from them or leaves ties to
chance, it is said.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.numerics import masks
from mergekit_unconstrained.numerics.select import extreme_mask, stable_order

Rescale = Literal["none", "inverse", "l1"]

_BLOCK = 1 << 15
"""Entries ranked at a time: they and their ranks stay in the processor's cache."""


def magnitude_mask(magnitudes: torch.Tensor, density: float) -> torch.Tensor:
    """The largest entries by magnitude (TIES, arXiv 2306.01708, the trim step).

    Keeps max(1, floor(density * n)) of n entries for density in (0, 1), as mergekit does; none for
    density <= 0.
    """
    k = kept_count(magnitudes.numel(), density)
    return extreme_mask(magnitudes.reshape(-1), k, largest=True).reshape(magnitudes.shape)


def kept_count(n: int, density: float) -> int:
    """How many of n entries `magnitude_mask` keeps."""
    return n if density >= 1 else 0 if density <= 0 else max(1, int(density * n))


def outlier_mask(magnitudes: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Without the gamma*n largest and the smallest entries (Breadcrumbs, arXiv 2312.06795).

    Keeps floor(density * n) entries; when density + gamma > 1 fewer outliers are removed, so that
    the density holds (mergekit's rule). Everything is kept at density >= 1.
    """
    if density >= 1:
        return torch.ones_like(magnitudes, dtype=torch.bool)
    first, end = kept_span(magnitudes.numel(), density, gamma)
    flat = magnitudes.reshape(-1)
    upper = extreme_mask(flat, end, largest=False)
    lower = extreme_mask(flat, first, largest=False)
    return upper.logical_xor_(lower).reshape(magnitudes.shape)


def kept_span(n: int, density: float, gamma: float) -> tuple[int, int]:
    """The ranks, from the smallest magnitude, that `outlier_mask` keeps: first <= rank < end."""
    keep = int(density * n)
    first = max(0, n - keep - int(gamma * n))
    return first, first + keep


def random_mask(
    shape: torch.Size, density: float, *, seed: int, tensor: str, model: str
) -> torch.Tensor:
    """Each entry with probability `density`, independently (DARE, arXiv 2311.03099, Eq. 2).

    Lives on the CPU.
    """
    mask = torch.empty(shape, dtype=torch.bool)
    coins = masks.Coins(density, seed=seed, tensor=tensor, model=model)
    coins.toss(mask.reshape(-1).numpy())
    return mask


def magprune_mask(
    magnitudes: torch.Tensor,
    density: float,
    epsilon: float,
    *,
    seed: int,
    tensor: str,
    model: str,
) -> torch.Tensor:
    """Random, but larger entries with higher probability (DELLA, arXiv 2406.11617, MagPrune).

    Within each row (axis 1 of tensors of any higher dimension, as in mergekit) the keeping
    probability rises linearly with the rank of the magnitude, from density - epsilon to
    density + epsilon. Ranks are exact integers (mergekit rounds them in bf16); equal magnitudes are
    ranked by index. A row of one entry gets probability density - epsilon (mergekit divides by
    zero). Lives on the CPU.
    """
    if density >= 1:
        return torch.ones(magnitudes.shape, dtype=torch.bool)
    if density <= 0:
        return torch.zeros(magnitudes.shape, dtype=torch.bool)
    check_della(density, epsilon)
    axis = 1 if magnitudes.ndim > 1 else 0
    moved = magnitudes.movedim(axis, -1)
    rows = moved.reshape(-1, moved.shape[-1])
    lanes = masks.uniform_lanes(magnitudes.shape, seed=seed, tensor=tensor, model=model)
    lanes = np.moveaxis(lanes, axis, -1).reshape(rows.shape)
    by_rank = np.linspace(density - epsilon, density + epsilon, rows.shape[1])
    limit_of_rank = torch.from_numpy(masks.thresholds(by_rank))
    mask = np.empty(rows.shape, dtype=np.bool_)
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        block = slice(start, start + step)
        order = stable_order(rows[block]).cpu()
        limit = torch.empty_like(order).scatter_(1, order, limit_of_rank.expand_as(order))
        np.less(lanes[block], limit.numpy(), out=mask[block])
    return torch.from_numpy(mask).reshape(moved.shape).movedim(-1, axis)


def check_della(density: float, epsilon: float) -> None:
    """Refuse a density and epsilon whose probabilities leave (0, 1); density 0 and 1 need none."""
    if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise RecipeError(
            f"della needs density - epsilon > 0 and density + epsilon < 1, not density {density:g} "
            f"with epsilon {epsilon:g}: choose a smaller epsilon"
        )


def rescale_factor(
    magnitudes: torch.Tensor, mask: torch.Tensor, rescale: Rescale, density: float
) -> float:
    """What the kept entries are multiplied by.

    none: 1. inverse: 1 / density, DARE's 1 / (1 - p), which keeps the expectation. l1: what brings
    the L1 norm back to that of d_i (mergekit's rule: 1 when either norm is below 1e-7).
    """
    if rescale == "inverse" and 0 < density < 1:
        return 1.0 / density
    if rescale == "l1":
        kept = magnitudes * mask.view(torch.uint8).to(magnitudes.dtype)
        return l1_factor(float(magnitudes.sum()), float(kept.sum()))
    return 1.0


def l1_factor(before: float, after: float) -> float:
    """What brings an L1 norm back; 1 when either is below 1e-7 (mergekit's rule)."""
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0
