"""Maps of a source vocabulary to the pivot's by strings, as FuseLLM and FuseChat published them.

em: the identical string (spaces spelled alike). mined: that, else the nearest by edit distance.
ms: that, else by mapping statistics counted over an aligned corpus (FuseChat, arXiv 2408.07990,
section 3). What the papers leave open is as their code has it.

Defects of that code, reproduced under `published_defects` only: FuseChat's mined map compares a
string with the whole vocabulary as one list, so every token without an identical one becomes the
vocabulary's first; its ms map weighs distance with a factor that rises with the count, so among
near tokens the rarer pair wins, and sends what the corpus lacks to the unknown token (or the end
token). It also looks the mined map up by position where it decides whether two aligned tokens fit;
positions of the whole conversation mean nothing here, so that one is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mergekit_unconstrained.errors import MissingExtraError
from mergekit_unconstrained.fusion.alignment.dtw import edit_distances
from mergekit_unconstrained.fusion.alignment.warping import Style, TokenWarper, responses
from mergekit_unconstrained.fusion.records import Encoded, Ints, Record
from mergekit_unconstrained.fusion.vocabulary.tables import VocabularyMap
from mergekit_unconstrained.fusion.vocabulary.token_texts import TokenTexts

_CHUNK_CELLS = 1 << 23
"""Distances held at a time by `mined_map` (32 MiB)."""

CONTAINED = 0.1
"""FuseChat's factor c on the distance of two strings of which one contains the other."""


def exact_map(
    source: TokenTexts,
    pivot: TokenTexts,
    *,
    source_ends: frozenset[int] = frozenset(),
    pivot_end: int | None = None,
    published_defects: bool = False,
) -> VocabularyMap:
    """em: identical strings, nothing else (FuseLLM, FuseChat).

    source_ends: tokens that end a response, mapped to pivot_end by name (ours; not under
    published_defects).
    """
    identical = _identical(source, pivot)
    to_pivot = identical.copy()
    if not published_defects:
        _map_ends(to_pivot, source_ends, pivot_end)
    return VocabularyMap(to_pivot, "em", identical >= 0)


def mined_map(
    source: TokenTexts,
    pivot: TokenTexts,
    *,
    style: Style = "fusellm",
    source_ends: frozenset[int] = frozenset(),
    pivot_end: int | None = None,
    published_defects: bool = False,
) -> VocabularyMap:
    """mined: identical, else the nearest by edit distance, of equally near ones the first.

    style matters under published_defects only. Takes about a minute of CPU for 151k x 32k tokens.
    MissingExtraError without rapidfuzz.
    """
    identical = _identical(source, pivot)
    to_pivot = identical.copy()
    others = np.flatnonzero([m < 0 and bool(t) for m, t in zip(identical, source.raw, strict=True)])
    if published_defects and style == "fusechat":
        to_pivot[others] = 0
        return VocabularyMap(to_pivot, "mined", identical >= 0)
    spelled = source.respelled(pivot.marker)
    used = np.flatnonzero([bool(token) for token in pivot.raw])
    candidates = [pivot.raw[i] for i in used]
    # Strings of like length share the fast paths of rapidfuzz.
    others = others[np.argsort([len(spelled[i]) for i in others], kind="stable")]
    step = max(1, _CHUNK_CELLS // max(1, len(candidates)))
    for start in range(0, len(others), step):
        chunk = others[start : start + step]
        distances = edit_distances([spelled[i] for i in chunk], candidates)
        to_pivot[chunk] = used[distances.argmin(axis=1)]
    if not published_defects:
        _map_ends(to_pivot, source_ends, pivot_end)
    return VocabularyMap(to_pivot, "mined", identical >= 0)


class PairCounts:
    """How many positions of an aligned corpus pair a source token with a pivot token.

    Sparse: FuseChat's dense table of 151k x 32k takes 36 GiB for some ten thousand entries.
    """

    def __init__(self, warper: TokenWarper) -> None:
        self._warper = warper
        self._counts: dict[tuple[int, int], int] = {}

    def add(self, source_ids: Ints, pivot_ids: Ints) -> None:
        """One text. A source token that is paired twice with one pivot position counts once."""
        if not len(source_ids) or not len(pivot_ids):
            return
        first, last = self._warper.spans(source_ids, pivot_ids)
        source = source_ids.tolist()
        counts = self._counts
        for pivot, begin, end in zip(
            pivot_ids.tolist(), first.tolist(), last.tolist(), strict=True
        ):
            for token in set(source[begin : end + 1]):
                counts[token, pivot] = counts.get((token, pivot), 0) + 1

    def add_corpus(self, records: Iterable[Record], pivots: Iterable[Encoded]) -> None:
        """Conversations, each response for itself."""
        for record, pivot in zip(records, pivots, strict=True):
            for theirs, ours in responses(record, pivot):
                self.add(record.tokens[theirs], pivot.response_ids[ours])

    def entries(self) -> tuple[Ints, Ints, npt.NDArray[np.int64]]:
        """source id, pivot id and count of every pair that occurs, by ascending ids."""
        table = np.array(
            [(*pair, self._counts[pair]) for pair in sorted(self._counts)], dtype=np.int64
        ).reshape(-1, 3)
        return table[:, 0].astype(np.int32), table[:, 1].astype(np.int32), table[:, 2]


def ms_map(
    source: TokenTexts,
    pivot: TokenTexts,
    counts: PairCounts,
    *,
    source_ends: frozenset[int] = frozenset(),
    pivot_end: int | None = None,
    published_defects: bool = False,
) -> VocabularyMap:
    """ms: identical, else the pivot token that the corpus pairs a source token with.

    Of several, ours: the one most often paired, then the nearest, then the first. Published: the
    least of sigmoid(count) * c * edit distance, then the first; c = 0.1 where one string contains
    the other. Distances are between strings without space markers, unless nothing else is in one.
    """
    identical = _identical(source, pivot)
    to_pivot = statistics_map(source, pivot, counts, published_defects=published_defects)
    if not published_defects:
        _map_ends(to_pivot, source_ends, pivot_end)
    to_pivot = np.where(identical >= 0, identical, to_pivot)
    return VocabularyMap(to_pivot, "ms", identical >= 0)


def statistics_map(
    source: TokenTexts, pivot: TokenTexts, counts: PairCounts, *, published_defects: bool = False
) -> Ints:
    """[V_source] phi alone, without regard to identical strings; -1 for what the corpus lacks."""
    source_ids, pivot_ids, count = counts.entries()
    distance = pair_distances(source, pivot, source_ids, pivot_ids)
    if published_defects:
        weight = 1 / (1 + np.exp(-count.astype(np.float64)))
        ranked = np.lexsort((pivot_ids, distance * weight))
    else:
        ranked = np.lexsort((pivot_ids, distance, -count))
    ranked = ranked[np.argsort(source_ids[ranked], kind="stable")]
    seen, best = np.unique(source_ids[ranked], return_index=True)
    lacking = -1
    if published_defects:
        known = (i for i in (pivot.unknown, pivot.end) if i is not None)
        lacking = next(known, -1)
    to_pivot = np.full(len(source.raw), lacking, dtype=np.int32)
    to_pivot[seen] = pivot_ids[ranked][best]
    if published_defects:
        for theirs, ours in ((source.beginning, pivot.beginning), (source.end, pivot.end)):
            if theirs is not None and ours is not None:
                to_pivot[theirs] = ours
    return to_pivot


def pair_distances(
    source: TokenTexts, pivot: TokenTexts, source_ids: Ints, pivot_ids: Ints
) -> npt.NDArray[np.float64]:
    """FuseChat's c * edit distance of each of some pairs of tokens. MissingExtraError."""
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise MissingExtraError("vocabulary maps by edit distance", "fusion") from error
    result = np.empty(len(source_ids))
    for at, (i, j) in enumerate(zip(source_ids.tolist(), pivot_ids.tolist(), strict=True)):
        one = source.raw[i].replace(source.marker, "")
        other = pivot.raw[j].replace(pivot.marker, "")
        if not one or not other:
            one, other = source.raw[i].replace(source.marker, pivot.marker), pivot.raw[j]
        factor = CONTAINED if one in other or other in one else 1
        result[at] = Levenshtein.distance(one, other) * factor
    return result


def _identical(source: TokenTexts, pivot: TokenTexts) -> Ints:
    """[V_source] the pivot token of the same string, -1 for none."""
    known = {token: i for i, token in reversed(list(enumerate(pivot.raw))) if token}
    return np.array([known.get(token, -1) for token in source.respelled(pivot.marker)], np.int32)


def _map_ends(to_pivot: Ints, source_ends: frozenset[int], pivot_end: int | None) -> None:
    if pivot_end is not None:
        to_pivot[sorted(source_ends)] = pivot_end
