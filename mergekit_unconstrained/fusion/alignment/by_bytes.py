"""A source's distributions at the pivot's positions, matched by the bytes of the response (ours).

Both models read the same response bytes. A position of the pivot that starts where a source token
starts takes the distribution of that source token, so nothing is transferred under a wrong prefix.

    P(v) = sum of p(s) over the source tokens s whose bytes the pivot would begin with v       (1)

A position inside a source token has consumed its bytes c since the boundary before. Of that
boundary's distribution the tokens s = c + r count, by what remains of them:

    P(v) = sum of p(s) over s = c + r whose r the pivot would begin with v, over Z             (2)
    Z    = p(tokens that continue c) + p(c) + t

p(c)/Z is `unmapped` (what would follow c itself is unknown) and t/Z is `tail`, t being the mass of
the token that came if it is not among the top k, and else 0. The rest of the tail, and tokens
shorter than c, are taken not to lead here. Of SmolLM2's top 10 on GSM8K, seen at Mistral's
positions, the entries of (2) so claim 0.976 of the mass and hold the token that came 0.969 of the
time; a tail that keeps its share of Z would make them claim 0.86.

Where the pivot's own token g spans the source tokens s1 .. sn, the chain rule knows its mass:

    P(g) = p(s1) p(s2 | s1) .. p(sn | s1 .. sn-1)                                              (3)

which is taken from where (1) or (2) had put p(s1), or from the tail. The sum of probs, tail and
unmapped stays what the record's own sum is: 1, but for the rounding of its storage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mergekit_unconstrained.fusion.alignment.conditioning import Continuations
from mergekit_unconstrained.fusion.alignment.places import Block, Coverage, Index, Places, blocks
from mergekit_unconstrained.fusion.alignment.sparse import Rows, merge_duplicates
from mergekit_unconstrained.fusion.records import Encoded, Origin, Record, SparseDistributions
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable, VocabularyMap

Origins = npt.NDArray[np.uint8]


class ByteAligner:
    """Carries what a source thought to the pivot's positions.

    vocabulary: of any kind, used at shared boundaries; inside a token and after an added space the
    bytes decide. inside: transfer to positions inside a source token, Eq. (2). chain: Eq. (3).
    """

    def __init__(
        self,
        source: ByteTable,
        pivot: ByteTable,
        vocabulary: VocabularyMap,
        *,
        inside: bool = True,
        chain: bool = True,
    ) -> None:
        if len(vocabulary.to_pivot) != len(source.pieces):
            raise ValueError("the vocabulary map is not of this source")
        self._size = len(source.pieces)
        self._to_pivot = np.append(vocabulary.to_pivot, -1).astype(np.int32)
        self._source = Coverage(source)
        self._pivot = Coverage(pivot)
        self._continuations = Continuations(source, pivot)
        self._inside = inside
        self._chain = chain

    def align(
        self, records: Sequence[Record], pivots: Sequence[Encoded]
    ) -> list[SparseDistributions]:
        """records and pivots: the same conversations, as the source and as the pivot read them.

        The rows have k + 1 entries: one more for the chain rule.
        """
        if len(records) != len(pivots):
            raise ValueError(f"{len(records)} records for {len(pivots)} conversations")
        aligned: list[SparseDistributions] = []
        for part in blocks(records, pivots):
            block = Block.of(records[part], pivots[part], self._size)
            aligned += _split(*self._align(block), block.counts)
        return aligned

    def _align(self, block: Block) -> tuple[Rows, Origins]:
        count = len(block.pivot_starts)
        if not len(block.starts):
            return Rows.empty(count), np.full(count, Origin.NONE, dtype=np.uint8)
        places = Places.of(block, self._source, self._pivot, inside=self._inside)
        source_ids = np.take(block.ids, places.row, axis=0)
        rows = Rows(
            source_ids=source_ids,
            ids=np.take(self._to_pivot, source_ids, mode="clip"),
            probs=np.take(block.probs, places.row, axis=0),
            tail=block.tail[places.row],
            unmapped=np.zeros(count, dtype=np.float32),
            scale=np.ones(count, dtype=np.float32),
        )
        origin = np.where(places.shared, Origin.SHARED, Origin.NONE).astype(np.uint8)
        self._put_space_before(rows, places.spaced)
        self._condition(rows, origin, places, block)
        if self._chain:
            self._apply_chain(rows, origin, places, block)
        rows.clear(origin == Origin.NONE)
        rows.gather_unmapped()
        merge_duplicates(rows.ids, rows.probs)
        return rows, origin

    def _put_space_before(self, rows: Rows, which: Index) -> None:
        """Eq. (1) where the pivot reads a space before the text and the source does not."""
        if not which.size:
            return
        source_ids, ids = rows.source_ids[which], rows.ids[which]
        text = np.take(self._source.lengths, source_ids, mode="clip") > 0
        ids[text] = self._continuations.after_space(source_ids[text])
        rows.ids[which] = ids

    def _condition(self, rows: Rows, origin: Origins, places: Places, block: Block) -> None:
        """Eq. (2), where bytes of the source token are consumed."""
        which, consumed = places.partly, places.consumed
        if not which.size:
            return
        row = places.row[which]
        source_ids, probs = rows.source_ids[which], rows.probs[which]
        token = block.tokens[row]
        entry, continues = self._continuations.compare(source_ids, token, consumed)
        mass = probs[entry]
        both = np.bincount(entry[0], weights=mass, minlength=len(which))
        known = np.bincount(entry[0], weights=mass * continues, minlength=len(which))
        listed = (source_ids == token[:, None]).any(axis=1)
        outside = np.where(listed, 0, np.exp(block.gold[row]))
        scale = np.where(known > 0, 1 / np.maximum(both + outside, 1e-30), 0)
        entry, mass = (entry[0][continues], entry[1][continues]), mass[continues]
        rows.ids[which], rows.probs[which] = -1, 0
        place = (which[entry[0]], entry[1])
        rows.ids[place] = self._continuations.remainder(source_ids[entry], consumed[entry[0]])
        rows.probs[place] = mass * scale[entry[0]]
        rows.unmapped[which], rows.tail[which] = (both - known) * scale, outside * scale
        rows.scale[which] = scale
        here = np.where(places.shared[which], Origin.SHARED, Origin.INSIDE)
        origin[which] = np.where(known > 0, here, Origin.NONE)

    def _apply_chain(self, rows: Rows, origin: Origins, places: Places, block: Block) -> None:
        """Eq. (3), where the pivot's own token ends with a later source token than it began in."""
        longer = (block.pivot_ends > block.ends[places.row]) & (origin != Origin.NONE)
        which = np.flatnonzero(longer)
        last = np.searchsorted(block.ends, block.pivot_ends[which], "left")
        last = np.minimum(last, len(block.ends) - 1)
        together = block.ends[last] == block.pivot_ends[which]
        which, last = which[together], last[together]
        if not which.size:
            return
        row = places.row[which]
        log = np.concatenate([[0.0], np.cumsum(block.gold)])
        rest = np.exp(log[last + 1] - log[row + 1])
        hit = rows.source_ids[which] == block.tokens[row][:, None]
        listed, column = hit.any(axis=1), hit.argmax(axis=1)
        first = np.where(
            listed, rows.probs[which, column], np.exp(block.gold[row]) * rows.scale[which]
        )
        mass = np.minimum(first * rest, np.where(listed, first, rows.tail[which]))
        rows.probs[which[listed], column[listed]] -= mass[listed]
        rows.tail[which[~listed]] -= mass[~listed]
        rows.ids[which, -1], rows.probs[which, -1] = block.pivot_tokens[which], mass
        origin[which[origin[which] == Origin.SHARED]] = Origin.CHAIN


def _split(rows: Rows, origin: Origins, counts: Sequence[int]) -> list[SparseDistributions]:
    """One object per conversation; they share memory."""
    found = []
    first = 0
    for count in counts:
        part = slice(first, first + count)
        found.append(
            SparseDistributions(
                rows.ids[part], rows.probs[part], rows.tail[part], rows.unmapped[part], origin[part]
            )
        )
        first += count
    return found
