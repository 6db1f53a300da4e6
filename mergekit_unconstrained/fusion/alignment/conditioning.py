"""What a token's bytes say when some of them are already known.

A position of the pivot can lie inside a token of the source. Of the source's distribution there,
what begins with the bytes already consumed counts, and of each such token the bytes that remain.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mergekit_unconstrained.fusion.alignment.places import Coverage, Flags, Index
from mergekit_unconstrained.fusion.records import Ints
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable

_UNKNOWN = -2


class Continuations:
    """Tables of a source vocabulary, flat over all (token, bytes consumed): cell = token + bytes.

    The tokens that begin with some bytes stand side by side in alphabetical order, so one
    comparison of ranks tells whether a token does. `remainder` is filled as it is asked for.
    """

    def __init__(self, source: ByteTable, pivot: ByteTable) -> None:
        self._source = source
        self._pivot = pivot
        self.lengths = Coverage(source).lengths
        lengths = self.lengths[:-1].astype(np.int64)  # 0 for special tokens: no text begins so
        self._first_cell = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        cells = int(self._first_cell[-1])
        self._low = np.zeros(cells, dtype=np.int32)
        self._high = np.zeros(cells, dtype=np.int32)
        self._rank = np.full(len(lengths) + 1, -1, dtype=np.int32)
        self._remainder = np.full(cells, _UNKNOWN, dtype=np.int32)
        self._spaced = np.full(len(lengths), _UNKNOWN, dtype=np.int32)
        self._rank_tokens(lengths)

    def _rank_tokens(self, lengths: npt.NDArray[np.int64]) -> None:
        """Ranks in alphabetical order, and the ranks [low, high) that share each beginning."""
        pieces = self._source.pieces
        tokens = np.flatnonzero(lengths)
        tokens = np.array(sorted(tokens.tolist(), key=lambda i: pieces[i] or b""), dtype=np.int64)
        self._rank[tokens] = np.arange(len(tokens), dtype=np.int32)
        shared = np.zeros(len(tokens), dtype=np.int64)  # bytes in common with the one before
        ordered = [pieces[i] or b"" for i in tokens]
        for n, (before, here) in enumerate(pairwise(ordered), start=1):
            common = min(len(before), len(here))
            while before[:common] != here[:common]:
                common -= 1
            shared[n] = common
        size = lengths[tokens]
        for consumed in range(int(size.max(initial=0))):
            ranks = np.flatnonzero(size >= consumed)
            begins = (np.diff(ranks, prepend=-2) > 1) | (shared[ranks] < consumed)
            run = np.cumsum(begins) - 1
            start = np.flatnonzero(begins)
            last = np.append(start[1:], len(ranks)) - 1
            more = size[ranks] > consumed
            cell = self._first_cell[tokens[ranks[more]]] + consumed
            self._low[cell] = ranks[start[run[more]]]
            self._high[cell] = ranks[last[run[more]]] + 1

    def compare(self, ids: Ints, token: Ints, consumed: Ints) -> tuple[tuple[Index, Index], Flags]:
        """The entries of ids [r, k] that begin as the token [r] does: where (row, column), and
        whether they continue after these bytes, not end with them.

        consumed [r]: how many bytes, at least 1 and fewer than the token has.
        """
        cell = self._first_cell[token] + consumed
        rank = np.take(self._rank, ids, mode="clip")
        begins = (rank >= self._low[cell][:, None]) & (rank < self._high[cell][:, None])
        row, column = np.nonzero(begins)
        return (row, column), self.lengths[ids[row, column]] > consumed[row]

    def remainder(self, ids: Ints, consumed: Ints) -> Ints:
        """The pivot's first piece of what follows the consumed bytes, -1 for none; ids [n]."""
        return self._look_up(
            self._remainder,
            self._first_cell[ids] + consumed,
            lambda n: (self._source.pieces[ids[n]] or b"")[consumed[n] :],
        )

    def after_space(self, ids: Ints) -> Ints:
        """The pivot's first piece of a space and the token, -1 for none; ids [n], all of text."""
        return self._look_up(
            self._spaced, ids, lambda n: b" " + (self._source.pieces[ids[n]] or b"")
        )

    def _look_up(self, table: Ints, cells: Ints, text: Callable[[int], bytes]) -> Ints:
        found = table[cells]
        missing = np.flatnonzero(found == _UNKNOWN)
        if missing.size:
            new, first = np.unique(cells[missing], return_index=True)
            for cell, n in zip(new, missing[first], strict=True):
                table[cell] = self._pivot.first_piece(text(int(n)))
            found = table[cells]
        return found
