"""Bits per byte of a model on conversations, with its standard error, alone and in pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_unconstrained.fusion.records import Record


@dataclass(frozen=True)
class Score:
    """Summed bits over summed bytes. stderr: of that ratio over conversations; n: their number.

    parts: row, bits and bytes of every conversation, where they were asked for.
    """

    bits_per_byte: float
    stderr: float
    n: int
    parts: Sequence[tuple[int, float, int]] = ()


def score(records: Iterable[Record], *, parts: bool = False) -> Score | None:
    """The score of some stored passes, None when they hold no response token.

    parts: keep the figures of every conversation, with which two models can be compared in pairs.

    The standard error is that of a ratio of means: with bits b_i, bytes s_i and R = sum b / sum s,
    se = sqrt( sum (b_i - R s_i)^2 / (n (n - 1)) ) / mean(s).
    """
    # Two numbers of each are kept: a store may hold more than memory does.
    found = [
        (r.row, float(r.nats / np.log(2)), int(r.ends[-1] - r.starts[0]))
        for r in records
        if len(r.ends)
    ]
    if not found:
        return None
    bits, sizes = np.array([one[1:] for one in found], dtype=np.float64).T
    ratio = float(bits.sum() / sizes.sum())
    n = len(found)
    kept = tuple(found) if parts else ()
    if n == 1:
        return Score(ratio, float("nan"), 1, kept)
    spread = np.square(bits - ratio * sizes).sum() / (n * (n - 1))
    return Score(ratio, float(np.sqrt(spread) / sizes.mean()), n, kept)


def paired_error(one: Score, two: Score) -> float | None:
    """Standard error of the difference of two models' ratios over the same conversations.

    With e_i = (b_i - R s_i) / mean(s) of each model, as in `score`: sqrt( sum (e_i - e'_i)^2 /
    (n (n - 1)) ). None where the conversations' figures are not there or not of the same ones.
    """
    first, second = sorted(one.parts), sorted(two.parts)
    if len(first) < 2 or [p[0] for p in first] != [p[0] for p in second]:
        return None
    apart = _influences(first, one.bits_per_byte) - _influences(second, two.bits_per_byte)
    n = len(apart)
    return float(np.sqrt(np.square(apart).sum() / (n * (n - 1))))


def _influences(parts: Sequence[tuple[int, float, int]], ratio: float) -> np.ndarray:
    bits, sizes = np.array([p[1:] for p in parts], dtype=np.float64).T
    return np.asarray((bits - ratio * sizes) / sizes.mean())
