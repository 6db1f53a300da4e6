"""Which bytes of a text each of its tokens covers.

The pieces of the tokens, one after another, are the text - but for two liberties that tokenizers
take: a space put before the text or before what follows a special token, which is not in the text
(sentencepiece's dummy prefix), and white space beside a special token that the token swallows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergekit_unconstrained.fusion.data.rendering import Unencodable
from mergekit_unconstrained.fusion.records import Ints
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable

OTHER_BYTES = "the tokens do not spell the text"


def spell(ids: Ints, text: bytes, table: ByteTable) -> tuple[Ints, Ints]:
    """Bytes [start, end) of the text for every token. Unencodable when the tokens are other bytes.

    A token that is nothing but the space put before the text has start = end.
    """
    try:
        pieces = [*map(table.pieces.__getitem__, ids.tolist())]
        spelt = b"".join(pieces)  # type: ignore[arg-type]
    except (IndexError, TypeError):  # an id that stands for no text
        raise Unencodable(OTHER_BYTES) from None
    if spelt != text:
        return _by_segments(ids, pieces, text, table)  # type: ignore[arg-type]
    lengths = table.lengths[ids]
    ends = np.cumsum(lengths, dtype=np.int32)
    return ends - lengths, ends


def _by_segments(
    ids: Ints, pieces: Sequence[bytes], text: bytes, table: ByteTable
) -> tuple[Ints, Ints]:
    """The same where spaces were added or swallowed: special tokens are found one by one."""
    lengths = table.lengths[ids]
    starts, ends = np.zeros_like(lengths), np.zeros_like(lengths)
    place = first = 0
    for last in [*np.flatnonzero(table.is_special[ids]).tolist(), len(ids)]:
        following = pieces[last] if last < len(ids) else None
        if first < last:
            segment = b"".join(pieces[first:last])
            place, added = _find(segment, text, place, following, first > 0)
            ends[first:last] = place - added + np.cumsum(lengths[first:last])
            starts[first:last] = ends[first:last] - lengths[first:last]
            starts[first] += added
            place = int(ends[last - 1])
        if following is not None:
            place = _skip(following, text, place)
            starts[last], ends[last] = place, place + len(following)
            place = int(ends[last])
        first = last + 1
    if text[place:].strip():
        raise Unencodable(OTHER_BYTES)
    return starts, ends


def _skip(piece: bytes, text: bytes, place: int) -> int:
    """Where a special token begins, after white space that it swallowed."""
    after = len(text) - len(text[place:].lstrip())
    for start in (place, after):
        if text.startswith(piece, start):
            return start
    raise Unencodable(OTHER_BYTES)


def _find(
    segment: bytes, text: bytes, place: int, following: bytes | None, after_special: bool
) -> tuple[int, int]:
    """Where a run of ordinary tokens begins, and whether (1 or 0) its first space was added."""
    skipped = len(text) - len(text[place:].lstrip()) if after_special else place
    for start in dict.fromkeys((place, skipped)):
        for added in (0, 1):
            if added and not segment.startswith(b" "):
                continue
            if not text.startswith(segment[added:], start):
                continue
            rest = text[start + len(segment) - added :].lstrip()
            if not rest if following is None else rest.startswith(following.lstrip()):
                return start, added
    raise Unencodable(OTHER_BYTES)
