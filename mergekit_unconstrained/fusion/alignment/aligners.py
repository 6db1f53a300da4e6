"""Which alignment and which vocabulary map the settings ask for, made once and kept in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from mergekit_unconstrained.fusion.alignment.by_bytes import ByteAligner
from mergekit_unconstrained.fusion.alignment.warping import TokenWarper, WarpingAligner
from mergekit_unconstrained.fusion.models import LocalModel
from mergekit_unconstrained.fusion.records import Aligner, Encoded, Record
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.fusion.vocabulary import published_maps
from mergekit_unconstrained.fusion.vocabulary.byte_map import cached_byte_map, map_report
from mergekit_unconstrained.fusion.vocabulary.tables import VocabularyMap
from mergekit_unconstrained.fusion.vocabulary.token_texts import TokenTexts

MAP = "vocabulary.npz"

Pairs = Iterable[tuple[Sequence[Record], Sequence[Encoded]]]
"""The same conversations as the source and as the pivot read them, batch by batch."""


def build_map(
    source: LocalModel, pivot: LocalModel, settings: FusionSettings, folder: Path, corpus: Pairs
) -> dict[str, Any]:
    """Make the vocabulary map and keep it in `folder`; gives what is worth knowing of it.

    corpus: read by `ms` alone, which counts over all of it. A byte map is kept beside `folder`
    besides, for other data and settings with the same two tokenizers.
    """
    vocabulary = _made(source, pivot, settings, folder.parent, corpus)
    vocabulary.save(folder / MAP)
    return asdict(map_report(vocabulary, source.table, pivot.table))


def make_aligner(
    source: LocalModel, pivot: LocalModel, settings: FusionSettings, folder: Path
) -> Aligner:
    """The aligner with the map that `build_map` left in `folder`."""
    vocabulary = VocabularyMap.load(folder / MAP)
    if settings.alignment == "bytes":
        return ByteAligner(
            source.table, pivot.table, vocabulary, inside=settings.inside, chain=settings.chain
        )
    return WarpingAligner(
        *_texts(source, pivot),
        vocabulary,
        style=_style(settings),
        published_defects=settings.published_defects,
    )


def _made(
    source: LocalModel,
    pivot: LocalModel,
    settings: FusionSettings,
    cache: Path,
    corpus: Pairs,
) -> VocabularyMap:
    ends: dict[str, Any] = {
        "source_ends": source.encoder.end_ids,
        "pivot_end": pivot.encoder.end_id,
    }
    kind, defects = settings.vocabulary_map, settings.published_defects
    if kind == "bytes":
        return cached_byte_map(cache, source.table, pivot.table, **ends)
    texts = _texts(source, pivot)
    if kind == "em":
        return published_maps.exact_map(*texts, **ends, published_defects=defects)
    if kind == "mined":
        style = _style(settings)
        return published_maps.mined_map(*texts, style=style, **ends, published_defects=defects)
    warper = TokenWarper(*texts, style=_style(settings), published_defects=defects)
    counts = published_maps.PairCounts(warper)
    for records, encoded in corpus:
        counts.add_corpus(records, encoded)
    return published_maps.ms_map(*texts, counts, **ends, published_defects=defects)


def _texts(source: LocalModel, pivot: LocalModel) -> tuple[TokenTexts, TokenTexts]:
    return (
        TokenTexts.from_tokenizer(source.tokenizer, source.table),
        TokenTexts.from_tokenizer(pivot.tokenizer, pivot.table),
    )


def _style(settings: FusionSettings) -> Literal["fusechat", "fusellm"]:
    return "fusellm" if settings.alignment == "dtw_fusellm" else "fusechat"
