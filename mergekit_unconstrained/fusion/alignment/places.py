"""Where the positions of one tokenisation lie in another one of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mergekit_unconstrained.fusion.records import Encoded, Floats, Ints, Record, TopK
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable

_ENTRIES = 360_000
"""Worked on at a time: enough to make light of the calls, few enough for the processor's cache."""
_FLOOR = -100.0
"""A logarithm as good as minus infinity, whose sums stay finite."""

Index = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Block:
    """Several conversations laid end to end, as the source and as the pivot read them.

    Offsets are bytes of all their response spaces one after another, with a gap between them.
    tokens, starts, ends [m], ids, probs [m, k + 1] (the last entry is free), tail, gold [m]: the
    source; pivot_tokens, pivot_starts, pivot_ends [n]: the pivot; counts: its positions per
    conversation. Source ids from `size` on (a padded output layer) are `size` in tokens.
    """

    tokens: Ints
    starts: Ints
    ends: Ints
    ids: Ints
    probs: Floats
    tail: Floats
    gold: npt.NDArray[np.float64]
    pivot_tokens: Ints
    pivot_starts: Ints
    pivot_ends: Ints
    counts: list[int]

    @classmethod
    def of(cls, records: Sequence[Record], pivots: Sequence[Encoded], size: int) -> Block:
        """Lay conversations end to end. size: of the source's vocabulary."""
        said = np.array([len(record.ends) for record in records], dtype=np.int64)
        heard = np.array([len(pivot.ends) for pivot in pivots], dtype=np.int64)
        ends = _join([record.ends for record in records], np.int32)
        spans = np.array([pivot.response_bytes for pivot in pivots], dtype=np.int64)
        some = said > 0
        spans[some] = np.maximum(spans[some], ends[np.cumsum(said)[some] - 1])
        base = _before(spans + 1).astype(np.int32)
        source_base, pivot_base = np.repeat(base, said), np.repeat(base, heard)
        ids, probs = _entries([record.topk for record in records if len(record.ends)], size)
        # index of each response token among the ids of all conversations
        before = _before(np.array([len(pivot.ids) for pivot in pivots], dtype=np.int64))
        place = _join([pivot.positions for pivot in pivots], np.int64) + np.repeat(before, heard)
        return cls(
            tokens=np.minimum(_join([r.tokens for r in records], np.int32), size),
            starts=_join([r.starts for r in records], np.int32) + source_base,
            ends=ends + source_base,
            ids=ids,
            probs=probs,
            tail=_join([r.topk.tail for r in records], np.float32),
            gold=np.maximum(_join([r.topk.gold for r in records], np.float64), _FLOOR),
            pivot_tokens=_join([pivot.ids for pivot in pivots], np.int32)[place],
            pivot_starts=_join([pivot.starts for pivot in pivots], np.int32) + pivot_base,
            pivot_ends=_join([pivot.ends for pivot in pivots], np.int32) + pivot_base,
            counts=heard.tolist(),
        )


def _entries(parts: Sequence[TopK], unused: int) -> tuple[Ints, Floats]:
    """ids and probabilities [m, k + 1] of all rows; the last entry is `unused` and 0."""
    if not parts:
        return np.zeros((0, 1), dtype=np.int32), np.zeros((0, 1), dtype=np.float32)
    shape = sum(len(part.ids) for part in parts), parts[0].ids.shape[1] + 1
    ids, probs = np.empty(shape, dtype=np.int32), np.empty(shape, dtype=np.float32)
    np.concatenate([part.ids for part in parts], out=ids[:, :-1], casting="same_kind")
    np.concatenate([part.log_probs for part in parts], out=probs[:, :-1], casting="same_kind")
    ids[:, -1], probs[:, -1] = unused, -np.inf
    np.exp(probs, out=probs)
    return ids, probs


def _before(sizes: Index) -> Index:
    return np.cumsum(sizes) - sizes


def blocks(records: Sequence[Record], pivots: Sequence[Encoded]) -> Iterator[slice]:
    """Conversations that are worked on together."""
    first = entries = 0
    for n, (record, pivot) in enumerate(zip(records, pivots, strict=True), start=1):
        entries += len(pivot.ends) * (record.topk.ids.shape[1] + 1)
        if entries >= _ENTRIES or n == len(pivots):
            yield slice(first, n)
            first, entries = n, 0


@dataclass(frozen=True, eq=False)
class Places:
    """For each of n positions of the pivot: row [n], the source token that covers its first byte.

    shared [n]: that token starts there and has something to say there. partly [p]: positions before
    which `consumed` [p] bytes of the source token came (a space put before the text is one).
    spaced [q]: positions whose token begins with such a space, while the source's does not. Where
    none of the three, nothing can be carried over.
    """

    row: Index
    shared: Flags
    partly: Index
    consumed: Ints
    spaced: Index

    @classmethod
    def of(cls, block: Block, source: Coverage, pivot: Coverage, *, inside: bool) -> Places:
        """inside: also positions that start inside a source token."""
        start = block.pivot_starts
        row = np.searchsorted(block.starts, start, "right") - 1
        blank = np.flatnonzero(start == block.pivot_ends)  # only a space put before the text
        row[blank] = np.searchsorted(block.starts, start[blank], "left")
        np.clip(row, 0, len(block.starts) - 1, out=row)
        shared = block.starts[row] == start
        mine = pivot.added_space(block.pivot_tokens, block.pivot_ends - start)
        theirs = source.added_space(block.tokens, block.ends - block.starts)[row]
        odd = np.flatnonzero(~shared | (mine != theirs))
        consumed = start[odd] - block.starts[row[odd]] + theirs[odd] - mine[odd]
        covered = (consumed > 0) & (consumed < source.lengths[block.tokens[row[odd]]])
        covered &= shared[odd] | inside
        spaced = odd[shared[odd] & (consumed < 0)]
        shared[odd] &= covered | (consumed <= 0)
        return cls(row, shared, odd[covered], consumed[covered], spaced)


class Coverage:
    """How many bytes the tokens of a vocabulary stand for; ids beyond the vocabulary for none.

    lengths [V + 1]: 0 for special tokens too, which stand for no bytes of a response's text.
    """

    def __init__(self, table: ByteTable) -> None:
        self.lengths = np.append(table.lengths, 0).astype(np.int32)
        self.lengths[[i for i in table.special if i < len(table.pieces)]] = 0
        self._adds_space = table.adds_space
        space = [i for i, piece in enumerate(table.pieces) if piece and piece[0] == 0x20]
        self._space = np.zeros(len(self.lengths), dtype=np.bool_)
        self._space[space] = self.lengths[space] > 0

    def added_space(self, tokens: Ints, sizes: Ints) -> Flags:
        """Whether a token begins with a space that is not among the bytes it covers."""
        if not self._adds_space:
            return np.zeros(len(tokens), dtype=np.bool_)
        return self._space[tokens] & (self.lengths[tokens] == sizes + 1)


def _join(parts: list[npt.NDArray], dtype: npt.DTypeLike) -> npt.NDArray:
    return np.concatenate(parts, dtype=dtype) if parts else np.zeros(0, dtype=dtype)
