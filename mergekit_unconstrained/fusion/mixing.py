"""The arithmetic of fused targets: completing, choosing and mixing sparse distributions.

targets.py states the rules. No loop here runs over positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mergekit_unconstrained.fusion.records import (
    Floats,
    FusedTargets,
    Ints,
    Origin,
    SparseDistributions,
)

Doubles = npt.NDArray[np.float64]


def completed_by_rules(
    found: SparseDistributions, gold: Ints, rest: str, unaligned: str
) -> FusedTargets:
    """The candidate's distributions after the rules of `rest` and `unaligned`; winner is -1."""
    mass = found.probs.sum(axis=1)
    missing = found.tail + found.unmapped
    total = mass if rest == "renormalize" else mass + missing
    # A one-hot on gold is what the published alignment does for want of a distribution.
    without = (Origin.NONE,) if unaligned == "gold" else (Origin.NONE, Origin.GOLD)
    there = ~np.isin(found.origin, without) & (total > 0)
    if rest == "renormalize":
        there &= mass >= found.unmapped
    scale = np.where(there, 1 / np.where(there, total, 1), 0).astype(np.float32)
    probs = found.probs * scale[:, None]
    ids = np.where(probs > 0, found.ids, np.int32(-1))
    left = missing * scale
    to_gold = np.zeros_like(mass)
    if rest == "gold":
        to_gold += left
    if unaligned == "gold":
        to_gold[~there] = 1
        there = np.ones_like(there)
    if to_gold.any():
        ids, probs = _with_gold(ids, probs, gold, to_gold)
    kept = left if rest == "bucket" else np.zeros_like(left)
    return FusedTargets(ids, probs, kept, there, winner=-1)


def _with_gold(ids: Ints, probs: Floats, gold: Ints, mass: Floats) -> tuple[Ints, Floats]:
    """Add mass [r] to the gold token, in a further column where it is not listed."""
    hit = ids == gold[:, None]
    probs = probs + hit * mass[:, None]
    new = ~hit.any(axis=1) & (mass > 0)
    if new.any():
        ids = np.concatenate([ids, np.where(new, gold, -1)[:, None].astype(np.int32)], axis=1)
        probs = np.concatenate([probs, np.where(new, mass, 0)[:, None]], axis=1)
    return ids, probs


def mixture(completed: Sequence[FusedTargets], share: Doubles) -> FusedTargets:
    """The weighted sum of several candidates; winner is -1.

    share: [M] or [M, r]. At each position it is divided by its sum over those with a target there.
    """
    used = np.stack([c.used for c in completed])
    share = np.where(used, share.reshape(len(completed), -1), 0)
    total = share.sum(axis=0)
    share = (share / np.where(total > 0, total, 1)).astype(np.float32)
    ids, probs = summed(
        np.concatenate([c.ids for c in completed], axis=1),
        np.concatenate(
            [c.probs * s[:, None] for c, s in zip(completed, share, strict=True)], axis=1
        ),
    )
    ids = np.where(probs > 0, ids, np.int32(-1))
    rest = sum((c.rest * s for c, s in zip(completed, share, strict=True)), np.zeros_like(share[0]))
    return FusedTargets(ids, probs, rest, total > 0, winner=-1)


def summed(ids: Ints, values: Floats) -> tuple[Ints, Floats]:
    """Add up the values [r, K] of equal ids in each row; -1 is no id.

    The ids of a row come out ascending, -1 after them, in as many columns as the fullest row needs.
    """
    count, width = ids.shape
    if not ids.size:
        return ids, values
    order = ids.argsort(axis=1)
    order += np.arange(0, count * width, width)[:, None]
    flat_ids, flat_values = (x.reshape(-1)[order.reshape(-1)] for x in (ids, values))
    first = np.ones(count * width, dtype=np.bool_)
    np.not_equal(flat_ids[1:], flat_ids[:-1], out=first[1:])
    first[::width] = True
    starts = np.flatnonzero(first)
    sums = np.add.reduceat(flat_values, starts)
    kept = flat_ids[starts] >= 0
    starts, sums = starts[kept], sums[kept]
    row = starts // width
    counts = np.bincount(row, minlength=count)
    column = np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)
    out_ids = np.full((count, int(counts.max())), -1, dtype=np.int32)
    out = np.zeros(out_ids.shape, dtype=np.float32)
    out_ids[row, column], out[row, column] = flat_ids[starts], sums
    return out_ids, out


def chosen(completed: Sequence[FusedTargets], winner: npt.NDArray[np.intp]) -> FusedTargets:
    """Position t of completed[winner[t]]."""
    count = len(winner)
    width = max(c.ids.shape[1] for c in completed)
    ids = np.full((count, width), -1, dtype=np.int32)
    probs = np.zeros((count, width), dtype=np.float32)
    rest = np.zeros(count, dtype=np.float32)
    used = np.zeros(count, dtype=np.bool_)
    for index, found in enumerate(completed):
        mine = winner == index
        ids[mine, : found.ids.shape[1]] = found.ids[mine]
        probs[mine, : found.ids.shape[1]] = found.probs[mine]
        rest[mine] = found.rest[mine]
        used[mine] = found.used[mine]
    return FusedTargets(ids, probs, rest, used, winner=-1)
