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
    listed = ids.tolist()
    try:
        pieces = [table.pieces[i] for i in listed]
        spelt = b"".join(pieces)
    except (IndexError, TypeError):  # an id that stands for no text
        raise Unencodable(OTHER_BYTES) from None
    if spelt != text:
        return _by_segments(listed, [p or b"" for p in pieces], text, table)
    lengths = table.lengths[ids]
    ends = np.cumsum(lengths, dtype=np.int32)
    return ends - lengths, ends


def _by_segments(
    ids: Sequence[int], pieces: Sequence[bytes], text: bytes, table: ByteTable
) -> tuple[Ints, Ints]:
    """The same where spaces were added or swallowed: special tokens are found one by one."""
    starts = np.zeros(len(ids), dtype=np.int32)
    ends = np.zeros(len(ids), dtype=np.int32)
    place, first = 0, 0
    while first < len(ids):
        if ids[first] in table.special:
            place = _skip(pieces[first], text, place)
            starts[first], ends[first] = place, place + len(pieces[first])
            place, first = int(ends[first]), first + 1
            continue
        last = first
        while last < len(ids) and ids[last] not in table.special:
            last += 1
        segment = b"".join(pieces[first:last])
        following = pieces[last] if last < len(ids) else None
        place, added = _find(segment, text, place, following, first > 0)
        lengths = table.lengths[np.asarray(ids[first:last], dtype=np.int64)]
        ends[first:last] = place - added + np.cumsum(lengths)
        starts[first:last] = ends[first:last] - lengths
        starts[first] += added
        place, first = int(ends[last - 1]), last
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
