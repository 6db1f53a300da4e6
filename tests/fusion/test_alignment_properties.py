"""Alignment on random text with real tokenizers, beside a plain reading of its rules."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from real_tokenizers import NAMES, PAIRS, real_tokenizer
from synthetic import encode_real, random_record, real_map, real_table

from mergekit_unconstrained.fusion.alignment.by_bytes import ByteAligner
from mergekit_unconstrained.fusion.records import Encoded, Origin, Record, TopK

ALIGNERS: dict[tuple[str, str], ByteAligner] = {}
WORDS = [
    "the",
    "strawberries",
    " ",
    "  ",
    "\n",
    "\t",
    "2024",
    "3.14",
    "naïve",
    "東京",
    "😀",
    "👩‍👩‍👧",
]
TEXT = st.one_of(
    st.text(min_size=1, max_size=40),
    st.lists(
        st.sampled_from([*WORDS, "Москва", "한국어", "don't", "x=1", "</s>"]), max_size=12
    ).map("".join),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=10).map(" ".join),
)


def real_aligner(source: str, pivot: str) -> ByteAligner:
    if (source, pivot) not in ALIGNERS:
        ALIGNERS[source, pivot] = ByteAligner(
            real_table(source), real_table(pivot), real_map(source, pivot)
        )
    return ALIGNERS[source, pivot]


@pytest.mark.parametrize(("source", "pivot"), PAIRS)
@given(text=TEXT, seed=st.integers(0, 2**16))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_on_random_text_alignment_does_what_its_rules_say(
    source: str, pivot: str, text: str, seed: int
) -> None:
    spoken, heard = encode_real(source, text), encode_real(pivot, text)
    assume(spoken is not None and heard is not None)
    assert spoken is not None
    assert heard is not None
    for encoded in (spoken, heard):
        _covers_every_byte_once(encoded, len(text.encode()) + 1)
    record = random_record(spoken, real_table(source), 8, seed)
    found = real_aligner(source, pivot).align([record], [heard])[0]
    total = found.probs.sum(axis=1) + found.tail + found.unmapped
    given_some = found.origin != Origin.NONE
    assert total[given_some] == pytest.approx(1, abs=1e-5)
    assert (total[~given_some] == 0).all()
    assert found.probs.min() >= 0
    assert found.tail.min() >= -1e-7
    assert ((found.ids >= 0) | (found.probs == 0)).all()
    rows = _rows_by_the_rules(source, pivot, record, heard)
    for t, (expected, tail, unmapped, origin) in enumerate(rows):
        mine = {
            i: p for i, p in zip(found.ids[t].tolist(), found.probs[t].tolist(), strict=True) if p
        }
        assert len(set(found.ids[t][found.ids[t] >= 0])) == (found.ids[t] >= 0).sum()
        assert found.origin[t] == origin
        for i in mine.keys() | expected.keys():
            assert mine.get(i, 0.0) == pytest.approx(expected.get(i, 0.0), rel=1e-4, abs=1e-6)
        assert found.tail[t] == pytest.approx(tail, rel=1e-4, abs=1e-6)
        assert found.unmapped[t] == pytest.approx(unmapped, rel=1e-4, abs=1e-6)


def _covers_every_byte_once(encoded: Encoded, size: int) -> None:
    covered = np.zeros(size, dtype=int)
    for start, end in zip(encoded.starts, encoded.ends, strict=True):
        covered[start:end] += 1
    assert (covered == 1).all()
    assert (np.diff(encoded.starts) >= 0).all()
    assert (np.diff(encoded.ends) >= 0).all()


Row = tuple[dict[int, float], float, float, Origin]


def _rows_by_the_rules(source: str, pivot: str, record: Record, heard: Encoded) -> list[Row]:
    """Position by position, with strings of bytes."""
    return [_row(source, pivot, record, heard, t) for t in range(len(heard.ends))]


def _row(source: str, pivot: str, record: Record, heard: Encoded, t: int) -> Row:
    mine, theirs = real_table(source), real_table(pivot)
    start, end, token = int(heard.starts[t]), int(heard.ends[t]), int(heard.response_ids[t])
    blank = start == end
    hits = [
        j
        for j, (s, e) in enumerate(zip(record.starts, record.ends, strict=True))
        if s <= start < e or s == start == e
    ]
    if not hits:
        return {}, 0.0, 0.0, Origin.NONE
    j = hits[0] if blank else hits[-1]
    said = _text(mine, int(record.tokens[j]))
    # what the source's token has in front of this position, and the pivot's token has besides
    lead = said[: len(said) - (int(record.ends[j]) - start)] if said else b""
    if not said and record.starts[j] < start:  # text that the source read as a special token
        return {}, 0.0, 0.0, Origin.NONE
    extra = 0
    if token not in theirs.special:
        extra = len(_text(theirs, token)) - (end - start)
    if extra and lead == b" " and record.starts[j] == start:
        lead, extra = b"", 0
    shared = int(record.starts[j]) == start
    assert shared or not extra  # spaces are put before a response, where all tokenisations begin
    probs = np.exp(record.topk.log_probs[j].astype(np.float64))
    entries = list(zip(record.topk.ids[j].tolist(), probs.tolist(), strict=True))
    tail, unmapped = float(record.topk.tail[j]), 0.0
    scale = 1.0
    came = int(record.tokens[j])
    listed = any(i == came for i, _ in entries)
    gold = float(np.exp(record.topk.gold[j]))
    if lead:
        known = [(i, p) for i, p in entries if _text(mine, i).startswith(lead)]
        longer = [(i, p) for i, p in known if len(_text(mine, i)) > len(lead)]
        if sum(p for _, p in longer) <= 0:
            return {}, 0.0, 0.0, Origin.NONE
        both = sum(p for _, p in known)
        outside = 0.0 if listed else gold
        scale = 1 / (both + outside)
        unmapped = (both - sum(p for _, p in longer)) * scale
        tail = outside * scale
        entries = longer
    masses: dict[int, float] = defaultdict(float)
    target: dict[int, int] = {}
    for i, p in entries:
        text = _text(mine, i)
        if not text or not (lead or extra):
            target[i] = int(real_map(source, pivot).to_pivot[i])
        else:
            target[i] = theirs.first_piece(b" " * extra + text[len(lead) :])
        masses[target[i]] += p * scale
    origin = Origin.SHARED if shared else Origin.INSIDE
    ends = [m for m in range(j + 1, len(record.ends)) if record.ends[m] == end and not blank]
    if ends and record.ends[j] < end:
        first = dict(entries).get(came, gold if not listed else 0.0) * scale
        mass = first * float(np.exp(record.topk.gold[j + 1 : ends[0] + 1].sum(dtype=np.float64)))
        if listed:
            masses[target[came]] -= mass
        else:
            tail -= mass
        masses[token] += mass
        origin = Origin.CHAIN if origin == Origin.SHARED else origin
    unmapped += masses.pop(-1, 0.0)
    return dict(masses), tail, unmapped, origin


def _text(table: object, i: int) -> bytes:
    if i in table.special:  # type: ignore[attr-defined]
        return b""
    return table.pieces[i] or b""  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_a_source_that_is_the_pivot_gives_exactly_its_own_distributions(name: str) -> None:
    """At every position: no shift by one, no byte or special token lost."""
    text = "So 17 – 4 = 13,\n\n\tnaïve 東京 😀龘 strawberries!\n  #### 13 "
    encoded = encode_real(name, text)
    assert encoded is not None
    record = random_record(encoded, real_table(name), 10, seed=1)
    # bytes that have a literal piece besides, and every special token, are among the entries
    special = sorted(real_table(name).special | real_table(name).fallback)[:7]
    for t in range(len(encoded.ends)):
        free = [i for i in special if i not in record.topk.ids[t]]
        record.topk.ids[t, 3 : 3 + len(free)] = free
    end = real_tokenizer(name).eos_token_id
    same = ByteAligner(real_table(name), real_table(name), real_map(name, name)).align(
        [record], [encoded]
    )[0]
    assert end in real_table(name).special
    assert (same.origin == Origin.SHARED).all()
    assert (same.ids[:, :-1] == record.topk.ids).all()
    assert (same.ids[:, -1] == -1).all()
    assert same.probs[:, :-1] == pytest.approx(np.exp(record.topk.log_probs), rel=1e-6)
    assert same.tail.tolist() == record.topk.tail.tolist()
    assert (same.unmapped == 0).all()


@pytest.mark.parametrize(("source", "pivot"), PAIRS)
def test_a_certain_source_makes_the_pivots_own_text(source: str, pivot: str) -> None:
    """All mass on what came: then the pivot's tokens that came are certain too, but where the two
    split a word differently; a shift by one would give none of them."""
    text = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
        "May. How many clips did Natalia sell altogether? She sold 48/2 = 24 clips in May, so she "
        "sold 48+24 = 72 clips altogether.\n#### 72"
    )
    spoken, heard = encode_real(source, text), encode_real(pivot, text)
    assert spoken is not None
    assert heard is not None
    zeros = np.zeros(len(spoken.ends), np.float32)
    topk = TopK(spoken.ids[:, None], zeros[:, None], zeros, zeros)
    record = Record(0, spoken.ids, spoken.starts, spoken.ends, topk, 0.0)
    found = real_aligner(source, pivot).align([record], [heard])[0]
    sure = (np.where(found.ids == heard.ids[:, None], found.probs, 0)).sum(axis=1) > 0.999
    assert (found.origin != Origin.NONE).all()
    assert sure.mean() > 0.97
    assert sure[0]
    assert sure[-1]
