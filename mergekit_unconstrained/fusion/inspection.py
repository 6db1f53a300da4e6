"""One conversation as a source's distributions reach the pivot: what `fuse inspect` shows."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.fusion.alignment.aligners import make_aligner
from mergekit_unconstrained.fusion.data.prepared import load_prepared
from mergekit_unconstrained.fusion.distributions.store import Store
from mergekit_unconstrained.fusion.models import LocalModel
from mergekit_unconstrained.fusion.records import (
    Conversation,
    Encoded,
    Record,
    SparseDistributions,
)
from mergekit_unconstrained.fusion.stages import Run
from mergekit_unconstrained.fusion.workdir import Stage


@dataclass(frozen=True, eq=False)
class Inspection:
    """A conversation, what the source thought of it, and what of that the pivot is given."""

    conversation: Conversation
    record: Record
    encoded: Encoded
    aligned: SparseDistributions


def inspection(
    run: Run,
    data: Stage,
    source: LocalModel,
    distributions: Stage,
    alignment: Stage,
    row: int | None,
) -> Inspection:
    """The conversation of a row. row: None for the first. DataError for one that is not there."""
    train, held_out = load_prepared(data.folder)
    rows = {c.row: c for c in (*train, *held_out)}
    chosen = min(rows) if row is None else row
    if chosen not in rows:
        raise DataError(
            f"row {chosen} is not among the {len(rows)} that are used (from {min(rows)} to "
            f"{max(rows)}): it does not exist or was left out"
        )
    conversation = rows[chosen]
    records = Store(distributions.folder / "store").read([chosen])
    encoded = [run.pivot.encoder.encode(conversation)]
    aligner = make_aligner(source, run.pivot, run.settings, alignment.folder)
    (aligned,) = aligner.align(records, encoded)
    return Inspection(conversation, records[0], encoded[0], aligned)
