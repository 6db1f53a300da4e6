"""Alignment by dynamic time warping on edit distance, as FuseLLM and FuseChat published it.

FuseLLM: arXiv 2401.10491, section 3; FuseChat: arXiv 2408.07990, section 3; what the papers leave
open is as their code (fanqiwan/FuseAI) has it. Both warp one tokenisation of a text onto the other
so that the summed edit distance of the pairs is least, and give a pivot token that is paired with a
fitting source token the distribution that comes after that one. Whether the two end at the same
byte is guessed from their strings; the alignment by bytes knows it, so this one is for comparison.

What their code gets wrong is reproduced where `published_defects` says so, and only there:

* FuseLLM's one-hot fallback is the token at the position itself, not the one that comes next;
* tokens decoded alone lose the spaces in front of them, halves of characters all look the same, and
  a lone space, then the empty text, fits every token (FuseChat);
* of several entries that map to one pivot token only the first is kept;
* the kept entries are renormalised: mass outside the top k or without a counterpart is forgotten;
* two vocabulary maps: see published_maps.

Without the switch strings that shall fit are compared as bytes, entries on one token are summed and
the lost mass is told. Ours in either case: each response is warped for itself (they warp the whole
conversation, templates included), and its first token is given the source's distribution there when
both tokenisations begin at the same byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from mergekit_unconstrained.fusion.alignment.carrying import carry
from mergekit_unconstrained.fusion.alignment.dtw import sequence_costs, warp
from mergekit_unconstrained.fusion.records import (
    Encoded,
    Ints,
    Origin,
    Record,
    SparseDistributions,
)
from mergekit_unconstrained.fusion.vocabulary.tables import VocabularyMap
from mergekit_unconstrained.fusion.vocabulary.token_texts import TokenTexts

Style = Literal["fusechat", "fusellm"]


class TokenWarper:
    """Which source tokens each pivot token is paired with.

    FuseLLM compares the vocabulary's strings without space markers and prefers the step to the
    previous source token; FuseChat compares decoded tokens and prefers the previous pivot token.
    """

    def __init__(
        self, source: TokenTexts, pivot: TokenTexts, *, style: Style, published_defects: bool
    ) -> None:
        self._left_first = style == "fusechat"
        self._texts: tuple[Sequence[str], Sequence[str]]
        if style == "fusellm":
            self._texts = source.stripped(), pivot.stripped()
        elif published_defects:
            self._texts = source.decoded, pivot.decoded
        else:
            self._texts = source.readable(), pivot.readable()

    def spans(self, source_ids: Ints, pivot_ids: Ints) -> tuple[Ints, Ints]:
        """first, last [m] source token of each of the m >= 1 pivot tokens; n >= 1 source tokens."""
        costs = sequence_costs(source_ids, pivot_ids, *self._texts)
        return warp(costs, left_first=self._left_first)


class WarpingAligner:
    """Gives the pivot's positions a source's distributions (dtw_fusechat, dtw_fusellm).

    Which pairs fit: by an `em` map, one source token that is the same string; by a `mined` map, or
    any map under FuseLLM, also one that the map sends to the pivot token; else (FuseChat) the first
    of the paired source tokens of which one ends in the other. FuseChat's further rule, several
    source tokens that make up the pivot token, adds nothing: the last of them is a suffix of it.

    Positions without a fitting pair are one-hot on the token that comes (Origin.GOLD).
    """

    def __init__(
        self,
        source: TokenTexts,
        pivot: TokenTexts,
        vocabulary: VocabularyMap,
        *,
        style: Style,
        published_defects: bool = False,
    ) -> None:
        self._warper = TokenWarper(source, pivot, style=style, published_defects=published_defects)
        self._map = vocabulary.to_pivot
        self._kind = vocabulary.kind
        self._suffixes = style == "fusechat" and vocabulary.kind not in ("em", "mined")
        self._defects = published_defects
        self._fallback_lag = int(published_defects and style == "fusellm")
        self._faces: tuple[Sequence[Any], Sequence[Any]]  # both of strings or both of bytes
        if not published_defects:
            self._faces = source.pieces, pivot.pieces
        elif style == "fusechat":
            self._faces = source.decoded, pivot.decoded
        else:
            self._faces = source.respelled(pivot.marker), pivot.raw

    def align(
        self, records: Sequence[Record], pivots: Sequence[Encoded]
    ) -> list[SparseDistributions]:
        """One for each pair of a source's record and the pivot's reading of the conversation."""
        return [self._align(r, p) for r, p in zip(records, pivots, strict=True)]

    def fitting(self, source_ids: Ints, pivot_ids: Ints) -> Ints:
        """[m] the source token (its index) that fits pivot token i, -1 where none does.

        What comes after the one is taken for what comes after the other.
        """
        first, last = self._warper.spans(source_ids, pivot_ids)
        source = [self._faces[0][i] for i in source_ids]
        found = np.full(len(pivot_ids), -1, dtype=np.int32)
        for at, (token, begin, end) in enumerate(
            zip(pivot_ids.tolist(), first.tolist(), last.tolist(), strict=True)
        ):
            face = self._faces[1][token]
            if self._suffixes:
                candidates = (j for j in range(begin, end + 1) if self._suffix(source[j], face))
                found[at] = next(candidates, -1)
            elif begin == end and self._same(int(source_ids[begin]), source[begin], token, face):
                found[at] = begin
        return found

    def _suffix(self, one: Any, other: Any) -> bool:
        """Whether one text ends in the other."""
        if not (one and other):
            return self._defects
        return bool(one.endswith(other) or other.endswith(one))

    def _same(self, source_id: int, source: Any, pivot_id: int, pivot: Any) -> bool:
        """Whether two tokens are one by the rules of `em` and `mined`."""
        if source == pivot:
            return self._defects or bool(source)
        return self._kind != "em" and bool(self._map[source_id] == pivot_id)

    def _align(self, record: Record, pivot: Encoded) -> SparseDistributions:
        rows = self.rows(record, pivot)
        found = carry(record.topk, rows, self._map, published_defects=self._defects)
        gold = rows < 0
        found.ids[gold, 0] = pivot.ids[pivot.positions[gold] - self._fallback_lag]
        found.probs[gold, 0] = 1
        found.origin[gold] = Origin.GOLD
        return found

    def rows(self, record: Record, pivot: Encoded) -> Ints:
        """[r] the row of the source's distributions for each of the pivot's, -1 for none.

        What comes after a token is predicted by the row of the next one; there is none after the
        end of a response.
        """
        rows = np.full(len(pivot.positions), -1, dtype=np.int32)
        for theirs, ours in responses(record, pivot):
            if record.starts[theirs.start] == pivot.starts[ours.start]:
                rows[ours.start] = theirs.start
            fitting = self.fitting(record.tokens[theirs], pivot.response_ids[ours])[:-1]
            after = theirs.start + fitting + 1
            known = (fitting >= 0) & (after < theirs.stop)
            rows[ours.start + 1 : ours.stop] = np.where(known, after, -1)
        return rows


def responses(record: Record, pivot: Encoded) -> Iterator[tuple[slice, slice]]:
    """The source's and the pivot's tokens of each response that both have tokens of.

    A response begins where the pivot's positions jump, if a source token begins there too.
    """
    jumps = np.flatnonzero(np.diff(pivot.positions) != 1) + 1
    theirs = np.searchsorted(record.starts, pivot.starts[jumps])
    inside = theirs < len(record.starts)
    jumps, theirs = jumps[inside], theirs[inside]
    shared = record.starts[theirs] == pivot.starts[jumps]
    ours = [0, *jumps[shared].tolist(), len(pivot.positions)]
    cuts = [0, *theirs[shared].tolist(), len(record.tokens)]
    for i in range(len(cuts) - 1):
        if cuts[i] < cuts[i + 1] and ours[i] < ours[i + 1]:
            yield slice(cuts[i], cuts[i + 1]), slice(ours[i], ours[i + 1])
