"""What FuseLLM's and FuseChat's own code made of some texts (tests/data/README.md)."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_unconstrained.fusion.records import Encoded, Record, TopK
from mergekit_unconstrained.fusion.vocabulary.published_maps import exact_map
from mergekit_unconstrained.fusion.vocabulary.tables import VocabularyMap
from mergekit_unconstrained.fusion.vocabulary.token_bytes import Spelling
from mergekit_unconstrained.fusion.vocabulary.token_texts import TokenTexts

FILE = Path(__file__).parents[1] / "data" / "fusechat_parity.json.gz"

PIVOT_SPELLING = Spelling(byte_level=False, marker="▁", byte_fallback=True)
SOURCE_SPELLING = Spelling(byte_level=True)


@dataclass(frozen=True)
class Case:
    """One text: ids of both, the source's top 10 after each of its tokens, what became of them
    after each of the pivot's."""

    group: str
    doc: int
    pivot_ids: np.ndarray
    source_ids: np.ndarray
    topk_ids: np.ndarray
    topk_logits: np.ndarray
    expected_ids: list[list[int]]
    expected_logits: list[list[float]]

    @property
    def style(self) -> str:
        return self.group.split(":")[0]

    @property
    def kind(self) -> str:
        return self.group.split("(")[1].rstrip(")")


@lru_cache
def fixture() -> dict[str, Any]:
    with gzip.open(FILE, "rt", encoding="utf-8") as source:
        return json.load(source)


@lru_cache
def cases() -> list[Case]:
    return [
        Case(
            group["name"],
            case["doc"],
            np.array(case["pivot_ids"], np.int32),
            np.array(case["source_ids"], np.int32),
            np.array(case["source_topk_ids"], np.int32),
            np.array(case["source_topk_logits"], np.float32),
            case["expected_ids"],
            case["expected_logits"],
        )
        for group in fixture()["groups"]
        for case in group["cases"]
    ]


def case_name(case: Case) -> str:
    return f"{case.style}-{case.kind}-{case.doc}"


@lru_cache
def source_texts() -> TokenTexts:
    """The tokens of the source that occur; all others are unused."""
    found = fixture()
    raw, decoded = by_id(found["source_raw"], 151_646), by_id(found["source_decoded"], 151_646)
    pieces = tuple(SOURCE_SPELLING.bytes_of(token) for token in raw)
    return TokenTexts(raw, decoded, pieces, "Ġ", end=found["source_eos"])


@lru_cache
def pivot_texts() -> TokenTexts:
    """The tokens of the pivot that occur; all others are unused."""
    found = fixture()
    raw = list(by_id(found["pivot_raw"], 32_000))
    for token, i in found["pivot_vocabulary_hits"].items():
        raw[i] = token
    pieces = tuple(PIVOT_SPELLING.bytes_of(token) for token in raw)
    decoded = by_id(found["pivot_decoded"], 32_000)
    return TokenTexts(tuple(raw), decoded, pieces, "▁", end=found["pivot_eos"], unknown=0)


def by_id(texts: dict[str, str], size: int) -> tuple[str, ...]:
    found = [""] * size
    for i, text in texts.items():
        found[int(i)] = text
    return tuple(found)


def published_ms() -> np.ndarray:
    """[V_source] phi of every source token that occurs, -1 for the others."""
    found = np.full(151_646, -1, np.int32)
    for i, pivot in fixture()["ms_source_to_pivot"].items():
        found[int(i)] = pivot
    return found


def em_map() -> VocabularyMap:
    return exact_map(source_texts(), pivot_texts(), published_defects=True)


def ms_map() -> VocabularyMap:
    """As published: the identical string, else phi."""
    identical = em_map()
    return VocabularyMap(
        np.where(identical.exact, identical.to_pivot, published_ms()), "ms", identical.exact
    )


def as_stored(case: Case) -> tuple[Record, Encoded]:
    """The case as one response, each model's first token its first; what the source thought of its
    own first token is not known, and uniform here over the ids 0 to 9."""
    n, m = len(case.source_ids), len(case.pivot_ids)
    k = case.topk_ids.shape[1]
    first = np.arange(k, dtype=np.int32)[None]
    topk = TopK(
        ids=np.concatenate([first, case.topk_ids[:-1]]),
        log_probs=np.concatenate([np.zeros((1, k), np.float32), case.topk_logits[:-1]]),
        tail=np.zeros(n, np.float32),
        gold=np.zeros(n, np.float32),
    )
    steps = np.arange(max(n, m) + 1, dtype=np.int32)
    record = Record(0, case.source_ids, steps[:n], steps[1 : n + 1], topk, 0.0)
    ids = np.concatenate([[1], case.pivot_ids]).astype(np.int32)
    return record, Encoded(ids, steps[1 : m + 1], steps[:m], steps[1 : m + 1], m)
