"""Whole distributions of a source, carried into the pivot's vocabulary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mergekit_unconstrained.fusion.alignment.sparse import merge_duplicates
from mergekit_unconstrained.fusion.records import (
    Floats,
    Ints,
    Origin,
    SparseDistributions,
    TopK,
)


def carry(
    topk: TopK, rows: Ints, to_pivot: Ints, *, published_defects: bool
) -> SparseDistributions:
    """The source's distributions at `rows` [r] (-1: none), in the pivot's vocabulary.

    published_defects: keep the first of several entries on one token, forget what is lost and
    renormalise. A row that keeps nothing has no distribution then (the published code puts the
    pivot's own there).
    """
    r, k = len(rows), topk.ids.shape[1]
    ids = np.full((r, k), -1, dtype=np.int32)
    probs = np.zeros((r, k), dtype=np.float32)
    tail = np.zeros(r, dtype=np.float32)
    unmapped = np.zeros(r, dtype=np.float32)
    origin = np.full(r, Origin.NONE, dtype=np.uint8)
    known = np.flatnonzero(rows >= 0)
    source_ids, log_probs = topk.ids[rows[known]], topk.log_probs[rows[known]]
    # Output layers have more rows than the tokenizer has tokens: those take the -1 at the end.
    source_ids = np.where(source_ids < 0, len(to_pivot), source_ids)
    found = np.take(np.append(to_pivot, -1), source_ids, mode="clip").astype(np.int32)
    masses = np.exp(log_probs)
    if published_defects:
        found[_repeated(found)] = -1
        masses = _renormalised(log_probs, found)
        origin[known[masses.any(axis=1)]] = Origin.ALIGNED
    else:
        tail[known] = topk.tail[rows[known]]
        unmapped[known] = np.where(found < 0, masses, 0).sum(axis=1)
        masses = np.where(found < 0, 0, masses)
        merge_duplicates(found, masses)
        origin[known] = Origin.ALIGNED
    ids[known], probs[known] = found, masses
    return SparseDistributions(ids, probs, tail, unmapped, origin)


def _repeated(ids: Ints) -> npt.NDArray[np.bool_]:
    """[n, k] whether the same id comes earlier in the row."""
    order = np.argsort(ids, axis=1, kind="stable")
    ranked = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, dtype=np.bool_)
    again[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    repeated = np.empty_like(again)
    np.put_along_axis(repeated, order, again, axis=1)
    return repeated


def _renormalised(log_probs: Floats, ids: Ints) -> Floats:
    """[n, k] the softmax over the entries whose id is not -1; zeros where there is none."""
    kept = np.where(ids >= 0, log_probs, -np.inf)
    top = np.maximum(kept.max(axis=1, keepdims=True, initial=-np.inf), np.float32(-1e30))
    weights = np.exp(kept - top)
    total = weights.sum(axis=1, keepdims=True)
    return weights / np.where(total > 0, total, 1)
