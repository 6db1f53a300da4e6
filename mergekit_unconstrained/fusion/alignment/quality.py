"""How well an alignment works, measured on conversations that it aligned (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mergekit_unconstrained.fusion.records import (
    Aligner,
    Encoded,
    Origin,
    Record,
    SparseDistributions,
    TopK,
)

_NOT_FROM_SOURCE = (Origin.NONE, Origin.GOLD, Origin.OWN)


@dataclass(frozen=True)
class OriginReport:
    """The positions of one origin.

    share: of all positions. label_consistency: had the source been certain of its own next token,
    the share of them at which the pivot's next token would have been certain. mass, tail, unmapped:
    means; they sum to 1. gold: mean probability of the pivot's token that came.
    """

    share: float
    label_consistency: float
    mass: float
    tail: float
    unmapped: float
    gold: float


@dataclass(frozen=True)
class AlignmentReport:
    """positions: of the pivot; coverage: share of them that received the source's distribution.

    all: over the covered positions; origins: name of each origin that occurs -> its positions.
    """

    positions: int
    coverage: float
    all: OriginReport
    origins: dict[str, OriginReport]

    def as_dict(self) -> dict[str, Any]:
        """For a manifest or a table."""
        return asdict(self)


def measure(
    records: Sequence[Record], pivots: Sequence[Encoded], aligner: Aligner
) -> AlignmentReport:
    """Align and count.

    Label consistency is measured by aligning the same records once more with all of the source's
    mass on the token that came, so it holds for an aligner of any kind.
    """
    made = aligner.align(records, pivots)
    certain = aligner.align([_certain(record) for record in records], pivots)
    gold = [pivot.response_ids for pivot in pivots]
    origin = np.concatenate([a.origin for a in made]) if made else np.zeros(0, dtype=np.uint8)
    numbers = np.concatenate(
        [
            np.stack(
                [_gold(c, g) > 0.5, a.probs.sum(axis=1), a.tail, a.unmapped, _gold(a, g)], axis=1
            )
            for a, c, g in zip(made, certain, gold, strict=True)
        ]
        or [np.zeros((0, 5))]
    )
    covered = ~np.isin(origin, _NOT_FROM_SOURCE)
    return AlignmentReport(
        positions=len(origin),
        coverage=float(covered.mean()) if len(origin) else 0.0,
        all=_report(numbers, covered),
        origins={
            Origin(kind).name.lower(): _report(numbers, origin == kind)
            for kind in np.unique(origin).tolist()
        },
    )


def _report(numbers: np.ndarray, where: np.ndarray) -> OriginReport:
    share = float(where.mean()) if len(where) else 0.0
    means = numbers[where].mean(axis=0).tolist() if where.any() else [0.0] * 5
    return OriginReport(share, *means)


def _gold(distributions: SparseDistributions, gold: np.ndarray) -> np.ndarray:
    """[r] the probability of the token that came."""
    hit = distributions.ids == gold[:, None]
    return np.asarray(np.where(hit, distributions.probs, 0).sum(axis=1))


def _certain(record: Record) -> Record:
    """The same record, had the source been certain of what came."""
    zeros = np.zeros(len(record.tokens), dtype=np.float32)
    topk = TopK(record.tokens[:, None], zeros[:, None], zeros, zeros)
    return Record(record.row, record.tokens, record.starts, record.ends, topk, 0.0)
