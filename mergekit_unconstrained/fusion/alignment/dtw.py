"""Dynamic time warping of two token sequences on edit distance.

Quick without a compiler: every pair of *different* tokens is compared once, and the dynamic
programme runs over anti-diagonals, whose cells do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mergekit_unconstrained.errors import MissingExtraError
from mergekit_unconstrained.fusion.records import Ints

_FAR = np.int32(1 << 30)


def edit_distances(first: Sequence[str], second: Sequence[str]) -> Ints:
    """[len(first), len(second)] Levenshtein distances. MissingExtraError without rapidfuzz."""
    try:
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist
    except ImportError as error:
        raise MissingExtraError("dynamic time warping", "fusion") from error
    return cdist(first, second, scorer=Levenshtein.distance, dtype=np.int32, workers=1)


def sequence_costs(
    source_ids: Ints, pivot_ids: Ints, source: Sequence[str], pivot: Sequence[str]
) -> Ints:
    """[n, m] edit distance of each source token and each pivot token. source, pivot: text by id."""
    ours, row = np.unique(source_ids, return_inverse=True)
    theirs, column = np.unique(pivot_ids, return_inverse=True)
    distances = edit_distances([source[i] for i in ours], [pivot[i] for i in theirs])
    return distances.take(column, axis=1).take(row, axis=0)


def warp(costs: Ints, *, left_first: bool) -> tuple[Ints, Ints]:
    """The cheapest warping of n source tokens onto m pivot tokens, n and m at least 1.

    costs [n, m], not negative. Returns first, last [m]: pivot token i is paired with the source
    tokens first[i] to last[i]. The path is followed from its end; among equally cheap steps the
    diagonal one is taken, then, if left_first, the one to the previous pivot token, else the one to
    the previous source token. Takes 4 (n + m) n bytes beside the costs.
    """
    n, m = costs.shape
    # total[i + j, i]: the least sum up to source token i and pivot token j, counted from 1, so that
    # an anti-diagonal is contiguous in memory.
    wide = n + 1
    total = np.full((n + m + 1, wide), _FAR, dtype=np.int32)
    total[0, 0] = 0
    step = total.itemsize
    as_strided(total[2:, 1:], (n, m), ((wide + 1) * step, wide * step))[...] = costs
    best = np.empty(n, dtype=np.int32)
    for diagonal in range(2, n + m + 1):
        begin, end = max(1, diagonal - m), min(n, diagonal - 1) + 1
        before = total[diagonal - 1]
        least = best[: end - begin]
        np.minimum(before[begin - 1 : end - 1], before[begin:end], out=least)
        np.minimum(least, total[diagonal - 2, begin - 1 : end - 1], out=least)
        total[diagonal, begin:end] += least
    return _follow(total.reshape(-1).data, n, m, left_first)


def _follow(total: memoryview, n: int, m: int, left_first: bool) -> tuple[Ints, Ints]:
    """The path back through the sums, (n + m + 1) * (n + 1) of them, an anti-diagonal a row."""
    first = [0] * m
    last = [0] * m
    wide = n + 1
    i, j, at = n, m, (n + m) * wide + n
    last[-1] = n - 1
    while True:
        first[j - 1] = i - 1
        if i == 1 and j == 1:
            break
        up, left = total[at - wide - 1], total[at - wide]
        if total[at - 2 * wide - 1] <= min(up, left):
            i, j, at = i - 1, j - 1, at - 2 * wide - 1
        elif left < up or (left == up and left_first):
            j, at = j - 1, at - wide
        else:
            i, at = i - 1, at - wide - 1
            continue
        last[j - 1] = i - 1
    return np.array(first, dtype=np.int32), np.array(last, dtype=np.int32)
