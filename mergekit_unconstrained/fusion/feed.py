"""What training is fed: conversations with fused targets, made while training runs.

Nothing aligned is stored: the pivot's encoding, the alignment of the sources' stored distributions
and the fused target of a batch are computed when the batch is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.fusion.alignment.aligners import make_aligner
from mergekit_unconstrained.fusion.data.prepared import load_prepared
from mergekit_unconstrained.fusion.distributions.store import Store
from mergekit_unconstrained.fusion.models import LocalModel
from mergekit_unconstrained.fusion.records import (
    Aligner,
    Conversation,
    Encoded,
    FusedTargets,
    Record,
    SparseDistributions,
)
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.fusion.targets import (
    Candidate,
    fuse,
    own_distributions,
    rank_targets,
    token_bits,
)

Item = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Teacher:
    """A source as training needs it: its stored distributions and how they reach the pivot."""

    name: str
    store: Store
    aligner: Aligner
    weight: float


class FusionFeed(Dataset[Item]):
    """Conversations as training items (trainer.py tells their keys).

    pivot_store: the pivot's own distributions where the target rule needs them. teachers: empty for
    plain SFT. permutation: row -> row whose distributions it is given (the control).
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        pivot: LocalModel,
        pivot_store: Store | None,
        teachers: Sequence[Teacher],
        settings: FusionSettings,
        permutation: Mapping[int, Conversation] | None = None,
    ) -> None:
        self.conversations = conversations
        self.pivot = pivot
        self.pivot_store = pivot_store
        self.teachers = teachers
        self.settings = settings
        self.permutation = permutation

    @cached_property
    def lengths(self) -> list[int]:
        """Characters of each conversation: what each step is sorted by (ordering.py)."""
        return [sum(len(turn.text) for turn in c.turns) for c in self.conversations]

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        conversations = [self.conversations[i] for i in indices]
        encoded = self.pivot.encoder.encode_many(conversations)
        if not self.teachers:
            return [_item(e, None) for e in encoded]
        targets = self.targets(conversations, encoded)
        return [_item(e, t) for e, t in zip(encoded, targets, strict=True)]

    def targets(
        self, conversations: Sequence[Conversation], encoded: Sequence[Encoded]
    ) -> list[FusedTargets]:
        """The fused targets of some conversations in the pivot's encoding."""
        if self.settings.loss in ("uld", "gld"):
            records = self._records(self.teachers[0].store, conversations)
            return [rank_targets(r, e) for r, e in zip(records, encoded, strict=True)]
        candidates: list[list[Candidate]] = [[] for _ in conversations]
        if self.pivot_store is not None:
            for slot, record, e in zip(
                candidates, self._records(self.pivot_store, conversations), encoded, strict=True
            ):
                _check_own(record, e, self.pivot.name)
                slot.append(_candidate(own_distributions(record.topk), record, e))
        for teacher in self.teachers:
            records = self._records(teacher.store, conversations)
            aligned = self._aligned(teacher, conversations, encoded, records)
            for slot, found, record, e in zip(candidates, aligned, records, encoded, strict=True):
                slot.append(_candidate(found, record, e))
        s = self.settings
        return [
            fuse(
                slot,
                e.response_ids,
                target=s.target,
                per=s.per,
                compare=s.compare,
                rest=s.rest,
                unaligned=s.unaligned,
                include_pivot=self.pivot_store is not None,
                weights=[t.weight for t in self.teachers],
            )
            for slot, e in zip(candidates, encoded, strict=True)
        ]

    def _records(self, store: Store, conversations: Sequence[Conversation]) -> list[Record]:
        return store.read([c.row for c in conversations])

    def _aligned(
        self,
        teacher: Teacher,
        conversations: Sequence[Conversation],
        encoded: Sequence[Encoded],
        records: Sequence[Record],
    ) -> list[SparseDistributions]:
        if self.permutation is None:
            return teacher.aligner.align(records, encoded)
        others = [self.permutation[c.row] for c in conversations]
        other_encoded = self.pivot.encoder.encode_many(others)
        found = teacher.aligner.align(self._records(teacher.store, others), other_encoded)
        return [_stretched(f, len(e.positions)) for f, e in zip(found, encoded, strict=True)]


def open_feed(description: Mapping[str, Any]) -> tuple[FusionFeed, FusionFeed]:
    """Training and development feeds from JSON (stages.py writes it), in any process."""
    settings = FusionSettings.model_validate(description["settings"])
    pivot = LocalModel.from_description(description["pivot"])
    train, held_out = load_prepared(Path(description["data"]))
    own = description.get("pivot_store")
    pivot_store = Store(Path(own)) if own else None
    teachers = []
    for found in description["sources"]:
        source = LocalModel.from_description(found["model"])
        aligner = make_aligner(source, pivot, settings, Path(found["maps"]))
        teachers.append(Teacher(source.name, Store(Path(found["store"])), aligner, source.weight))
    permutation = shuffled(train, settings.seed) if settings.shuffle_source else None
    feed = FusionFeed(train, pivot, pivot_store, teachers, settings, permutation)
    # Development bits per byte are those of the text itself: no targets are needed.
    return feed, FusionFeed(held_out, pivot, None, (), settings)


def shuffled(conversations: Sequence[Conversation], seed: int) -> dict[int, Conversation]:
    """Row -> another conversation: a random cycle, so that none keeps its own (the control)."""
    order = np.random.default_rng(seed).permutation(len(conversations))
    following = np.roll(order, -1)
    return {conversations[a].row: conversations[b] for a, b in zip(order, following, strict=True)}


def _candidate(found: SparseDistributions, record: Record, encoded: Encoded) -> Candidate:
    tokens = len(record.tokens)
    return Candidate(
        distributions=found,
        bits_per_byte=record.bits_per_byte,
        nats_per_token=record.nats / tokens if tokens else float("nan"),
        token_bits=token_bits(record, encoded),
    )


def _check_own(record: Record, encoded: Encoded, name: str) -> None:
    if not np.array_equal(record.tokens, encoded.response_ids):
        raise DataError(
            f"row {record.row}: the stored distributions of {name} are for other tokens than its "
            "tokenizer makes now: the tokenizer or its libraries changed; remove the folder of its "
            "distributions and run again"
        )


def _stretched(found: SparseDistributions, count: int) -> SparseDistributions:
    """Another conversation's distributions, repeated or cut to `count` positions."""
    size = len(found.origin)
    pick = np.arange(count) % size if size else np.zeros(0, dtype=np.int64)
    if not size and count:
        raise DataError("a conversation without response tokens cannot be shuffled")
    return SparseDistributions(
        ids=found.ids[pick],
        probs=found.probs[pick],
        tail=found.tail[pick],
        unmapped=found.unmapped[pick],
        origin=found.origin[pick],
    )


def _item(encoded: Encoded, targets: FusedTargets | None) -> Item:
    count = len(encoded.positions)
    covered = int((encoded.ends - encoded.starts).sum())
    item: Item = {
        "input_ids": encoded.ids,
        "positions": encoded.positions,
        "bytes": np.asarray(covered, dtype=np.int64),
    }
    if targets is None:
        empty = np.zeros((count, 1), dtype=np.float32)
        return item | {
            "target_ids": np.full((count, 1), -1, dtype=np.int32),
            "target_probs": empty,
            "rest": empty[:, 0],
            "used": np.zeros(count, dtype=np.bool_),
        }
    return item | {
        "target_ids": targets.ids,
        "target_probs": targets.probs,
        "rest": targets.rest,
        "used": targets.used,
    }
