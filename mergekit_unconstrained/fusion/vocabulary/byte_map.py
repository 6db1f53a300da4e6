"""The vocabulary map by bytes: the default, and this project's own.

A source token becomes the pivot token of the same bytes; where the pivot has none, the token with
which the pivot itself would begin these bytes, because that is the pivot's next token when the
source's comes. Nothing is matched by likeness: a token that cannot begin the bytes is never chosen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable, VocabularyMap

_FORMAT = 1
"""Counted up when the map of the same two vocabularies changes, so that cached ones are dropped."""


def byte_map(
    source: ByteTable, pivot: ByteTable, source_ends: frozenset[int], pivot_end: int | None
) -> VocabularyMap:
    """Exact bytes, else the pivot's first piece of them.

    source_ends: ids with which the source ends a response (end of turn, end of text); all become
    pivot_end, the pivot's own. Every other special token has no counterpart, and no text becomes a
    special token. Two models with one tokenizer and one way to end share all ids as they are.
    """
    size = len(source.pieces)
    same_end = pivot_end is None or pivot_end in source_ends
    if source.fingerprint == pivot.fingerprint and same_end:
        return VocabularyMap(
            np.arange(size, dtype=np.int32), "bytes", np.ones(size, dtype=np.bool_)
        )
    to_pivot = np.full(size, -1, dtype=np.int32)
    exact = np.zeros(size, dtype=np.bool_)
    same_bytes = pivot.by_bytes
    for i, piece in enumerate(source.pieces):
        if piece is None or i in source.special:
            continue
        found = same_bytes.get(piece)
        exact[i] = found is not None
        to_pivot[i] = pivot.first_piece(piece) if found is None else found
    if pivot_end is not None:
        ends = [i for i in source_ends if 0 <= i < size]
        to_pivot[ends], exact[ends] = pivot_end, True
    return VocabularyMap(to_pivot, "bytes", exact)


def cached_byte_map(
    folder: Path,
    source: ByteTable,
    pivot: ByteTable,
    source_ends: frozenset[int],
    pivot_end: int | None,
) -> VocabularyMap:
    """`byte_map`, kept in `folder` under what it depends on; a damaged file is made again."""
    key = f"{_FORMAT} {source.fingerprint} {pivot.fingerprint} {sorted(source_ends)} {pivot_end}"
    path = folder / f"bytes-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if path.is_file():
        try:
            held = VocabularyMap.load(path)
            if held.kind == "bytes" and held.to_pivot.shape == (len(source.pieces),):
                return held
        except ModelError:
            path.unlink(missing_ok=True)
    made = byte_map(source, pivot, source_ends, pivot_end)
    made.save(path)
    return made


@dataclass(frozen=True)
class MapReport:
    """What became of a source vocabulary.

    tokens: how many it has (ids that stand for no text are left out); exact, first_piece,
    unmapped: shares of them. first_piece also counts what a published map matched by likeness.
    examples: source text and the pivot text it became, of tokens that are not exact.
    """

    tokens: int
    exact: float
    first_piece: float
    unmapped: float
    examples: tuple[tuple[str, str], ...]


def map_report(
    mapping: VocabularyMap, source: ByteTable, pivot: ByteTable, examples: int = 12
) -> MapReport:
    """Count a map of any kind; the examples are spread evenly over the vocabulary."""
    real = np.array([piece is not None for piece in source.pieces], dtype=np.bool_)
    tokens = max(int(real.sum()), 1)
    mapped = mapping.to_pivot >= 0
    near = np.flatnonzero(real & mapped & ~mapping.exact)
    shown = near[np.linspace(0, len(near) - 1, min(examples, len(near)), dtype=np.int64)]
    return MapReport(
        tokens=int(real.sum()),
        exact=float((real & mapped & mapping.exact).sum()) / tokens,
        first_piece=len(near) / tokens,
        unmapped=float((real & ~mapped).sum()) / tokens,
        examples=tuple(
            (_text(source, int(i)), _text(pivot, int(mapping.to_pivot[i]))) for i in shown
        ),
    )


def _text(table: ByteTable, i: int) -> str:
    return (table.pieces[i] or b"").decode("utf-8", "backslashreplace")
