"""Which entries of a task vector to keep, and how to make up for the others.

`delta` is one task vector of any shape in float32 or float64; every function returns a boolean mask
of its shape. The rules are those of the papers; where mergekit departs from them or leaves ties to
chance, it is said.
"""

from __future__ import annotations

from typing import Literal

import torch

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.numerics import masks
from mergekit_unconstrained.numerics.select import extreme_mask

Rescale = Literal["none", "inverse", "l1"]


def magnitude_mask(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The largest entries by magnitude (TIES, arXiv 2306.01708, the trim step).

    Keeps max(1, floor(density * n)) of n entries for density in (0, 1), as mergekit does; none for
    density <= 0.
    """
    n = delta.numel()
    k = n if density >= 1 else 0 if density <= 0 else max(1, int(density * n))
    return extreme_mask(delta.abs().reshape(-1), k, largest=True).reshape(delta.shape)


def outlier_mask(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Without the gamma*n largest and the smallest entries (Breadcrumbs, arXiv 2312.06795).

    Keeps floor(density * n) entries; when density + gamma > 1 fewer outliers are removed, so that
    the density holds (mergekit's rule). Everything is kept at density >= 1.
    """
    n = delta.numel()
    if density >= 1:
        return torch.ones_like(delta, dtype=torch.bool)
    keep = int(density * n)
    smallest = max(0, n - keep - int(gamma * n))
    magnitudes = delta.abs().reshape(-1)
    upper = extreme_mask(magnitudes, smallest + keep, largest=False)
    lower = extreme_mask(magnitudes, smallest, largest=False)
    return (upper & ~lower).reshape(delta.shape)


def random_mask(
    delta: torch.Tensor, density: float, *, seed: int, tensor: str, model: str
) -> torch.Tensor:
    """Each entry with probability `density`, independently (DARE, arXiv 2311.03099, Eq. 2)."""
    mask = masks.bernoulli_mask(delta.shape, density, seed=seed, tensor=tensor, model=model)
    return mask.to(delta.device)


def magprune_mask(
    delta: torch.Tensor, density: float, epsilon: float, *, seed: int, tensor: str, model: str
) -> torch.Tensor:
    """Random, but larger entries with higher probability (DELLA, arXiv 2406.11617, MagPrune).

    Within each row (the last axes of a higher tensor taken as in mergekit: axis 1 is ranked) the
    keeping probability rises linearly with the rank of the magnitude from density - epsilon to
    density + epsilon. Ranks are exact integers (mergekit rounds them in bf16); equal magnitudes are
    ranked by index. A row of one entry gets probability density - epsilon, as in mergekit.
    """
    if density >= 1:
        return torch.ones_like(delta, dtype=torch.bool)
    if density <= 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    if not (density - epsilon > 0 and density + epsilon < 1):
        raise RecipeError(
            f"della needs density - epsilon > 0 and density + epsilon < 1, not density {density:g} "
            f"with epsilon {epsilon:g}: choose a smaller epsilon"
        )
    rows = delta.abs() if delta.ndim >= 2 else delta.abs().reshape(1, -1)
    order = torch.argsort(rows, dim=1, stable=True)
    positions = torch.arange(rows.shape[1], device=rows.device)
    positions = positions.reshape(1, -1, *([1] * (rows.ndim - 2))).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, positions)
    fraction = ranks.double() / max(rows.shape[1] - 1, 1)
    keep = (density - epsilon) + fraction * (2 * epsilon)
    mask = masks.graded_mask(keep, seed=seed, tensor=tensor, model=model)
    return mask.reshape(delta.shape)


def rescale_factor(
    delta: torch.Tensor, mask: torch.Tensor, rescale: Rescale, density: float
) -> float | torch.Tensor:
    """What the kept entries are multiplied by.

    none: 1. inverse: 1 / density, DARE's 1 / (1 - p), which keeps the expectation. l1: what brings
    the L1 norm back to that of `delta` (mergekit's rule: 1 when either norm is below 1e-7).
    """
    if rescale == "inverse" and 0 < density < 1:
        return 1.0 / density
    if rescale == "l1":
        before, after = delta.abs().sum(), (delta * mask).abs().sum()
        if before >= 1e-7 and after >= 1e-7:
            return before / after
    return 1.0
