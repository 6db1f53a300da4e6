"""Alignment by dynamic time warping: the published results, and what the defects switch changes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import parity
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import Case
from real_tokenizers import real_tokenizer

from mergekit_unconstrained.errors import MissingExtraError
from mergekit_unconstrained.fusion.alignment.carrying import carry
from mergekit_unconstrained.fusion.alignment.dtw import sequence_costs, warp
from mergekit_unconstrained.fusion.alignment.warping import WarpingAligner, responses
from mergekit_unconstrained.fusion.records import (
    Encoded,
    Origin,
    Record,
    SparseDistributions,
    TopK,
)
from mergekit_unconstrained.fusion.vocabulary.published_maps import mined_map
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable, VocabularyMap
from mergekit_unconstrained.fusion.vocabulary.token_texts import TokenTexts

STYLES = ["fusechat", "fusellm"]

# -- the published results ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maps() -> dict[str, VocabularyMap]:
    """mined: against the whole real vocabulary, of which the fixture holds a part."""
    mistral = real_tokenizer("mistral-v1")
    pivot = TokenTexts.from_tokenizer(mistral, ByteTable.from_tokenizer(mistral))
    mined = mined_map(parity.source_texts(), pivot, published_defects=True)
    return {"em": parity.em_map(), "ms": parity.ms_map(), "mined": mined}


def published(case: Case, maps: dict[str, VocabularyMap]) -> WarpingAligner:
    return WarpingAligner(
        parity.source_texts(),
        parity.pivot_texts(),
        maps[case.kind],
        style=case.style,
        published_defects=True,
    )


@pytest.mark.parametrize("case", parity.cases(), ids=parity.case_name)
def test_every_position_is_as_published(case: Case, maps: dict[str, VocabularyMap]) -> None:
    """Which distribution, which of its entries, in which order, with which logits."""
    rows = published(case, maps).fitting(case.source_ids, case.pivot_ids)
    shape = case.topk_ids.shape[:1]
    topk = TopK(case.topk_ids, case.topk_logits, np.zeros(shape), np.zeros(shape))
    found = carry(topk, rows, maps[case.kind].to_pivot, published_defects=True)
    following = np.append(case.pivot_ids[1:], case.pivot_ids[-1])
    label = case.pivot_ids if case.style == "fusellm" else following
    for at, row in enumerate(rows):
        if row < 0:
            ids, logits = [label[at]], [1.0]
        else:
            kept = found.ids[at] >= 0
            ids, logits = found.ids[at][kept].tolist(), case.topk_logits[row][kept].tolist()
        assert ids == case.expected_ids[at]
        assert logits == case.expected_logits[at]


@pytest.mark.parametrize("case", parity.cases(), ids=parity.case_name)
def test_the_target_of_a_token_is_what_was_published_after_the_one_before(
    case: Case, maps: dict[str, VocabularyMap]
) -> None:
    """Through the stored form: probabilities are the softmax of the published logits."""
    record, pivot = parity.as_stored(case)
    (found,) = published(case, maps).align([record], [pivot])
    rows = published(case, maps).fitting(case.source_ids, case.pivot_ids)
    assert found.origin[0] == Origin.ALIGNED
    checked = 0
    for at in range(1, len(pivot.positions)):
        if rows[at - 1] == len(case.source_ids) - 1:  # nothing is stored after the last token
            assert found.origin[at] == Origin.GOLD
            continue
        kept = found.ids[at] >= 0
        logits = np.array(case.expected_logits[at - 1])
        weights = np.exp(logits - logits.max())
        assert found.ids[at][kept].tolist() == case.expected_ids[at - 1]
        np.testing.assert_allclose(found.probs[at][kept], weights / weights.sum(), atol=1e-6)
        assert found.origin[at] == (Origin.ALIGNED if rows[at - 1] >= 0 else Origin.GOLD)
        checked += 1
    assert checked >= len(pivot.positions) - 4


@pytest.mark.parametrize("case", parity.cases(), ids=parity.case_name)
def test_without_the_defects_the_same_case_differs(
    case: Case, maps: dict[str, VocabularyMap]
) -> None:
    record, pivot = parity.as_stored(case)
    sane = WarpingAligner(
        parity.source_texts(), parity.pivot_texts(), maps[case.kind], style=case.style
    )
    (theirs,), (ours,) = (
        published(case, maps).align([record], [pivot]),
        sane.align([record], [pivot]),
    )
    assert not np.array_equal(theirs.ids, ours.ids)
    gold = ours.origin == Origin.GOLD
    assert np.array_equal(ours.ids[gold, 0], pivot.response_ids[gold])


@pytest.mark.parametrize("name", ["mistral-v1", "qwen"])
def test_tokens_of_real_tokenizers_decode_as_in_the_published_code(name: str) -> None:
    tokenizer = real_tokenizer(name)
    texts = TokenTexts.from_tokenizer(tokenizer, ByteTable.from_tokenizer(tokenizer))
    side = "pivot" if name == "mistral-v1" else "source"
    for face, key in ((texts.raw, "raw"), (texts.decoded, "decoded")):
        expected = parity.fixture()[f"{side}_{key}"]
        assert {i: face[int(i)] for i in expected} == expected
    assert texts.marker == parity.fixture()[f"{side}_marker"]


# -- warping --------------------------------------------------------------------------------------


def paths(n: int, m: int) -> Any:
    """Every monotone path from (0, 0) to (n - 1, m - 1)."""
    if (n, m) == (1, 1):
        yield ((0, 0),)
        return
    for i, j in ((n - 1, m - 1), (n - 1, m), (n, m - 1)):
        if i and j:
            yield from (((*path, (n - 1, m - 1))) for path in paths(i, j))


def cells(first: np.ndarray, last: np.ndarray) -> set[tuple[int, int]]:
    return {
        (i, j) for j, (a, b) in enumerate(zip(first, last, strict=True)) for i in range(a, b + 1)
    }


COSTS = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(
        st.integers(0, 3), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
    ).map(lambda entries: np.array(entries, np.int32).reshape(shape))
)


@settings(max_examples=150, deadline=None)
@given(COSTS, st.booleans())
def test_the_warping_is_a_cheapest_of_all_monotone_paths(costs: np.ndarray, left: bool) -> None:
    first, last = warp(costs, left_first=left)
    found = cells(first, last)
    allowed = {frozenset(path): sum(int(costs[c]) for c in path) for path in paths(*costs.shape)}
    assert allowed[frozenset(found)] == min(allowed.values())


def test_equally_cheap_steps_go_diagonally_first() -> None:
    for left in (True, False):
        first, last = warp(np.zeros((4, 4), np.int32), left_first=left)
        assert first.tolist() == last.tolist() == [0, 1, 2, 3]


def test_then_the_styles_part() -> None:
    """The corner (1, 1) is dear, so the last cell is reached from (1, 2) or (2, 1), both for 0."""
    costs = np.array([[0, 0, 0], [0, 9, 0], [0, 0, 0]], np.int32)
    previous_pivot = cells(*warp(costs, left_first=True))
    previous_source = cells(*warp(costs, left_first=False))
    assert previous_pivot == {(0, 0), (1, 0), (2, 1), (2, 2)}
    assert previous_source == {(0, 0), (0, 1), (1, 2), (2, 2)}


def test_one_token_is_paired_with_all_of_the_other_side() -> None:
    assert [x.tolist() for x in warp(np.ones((3, 1), np.int32), left_first=True)] == [[0], [2]]
    assert [x.tolist() for x in warp(np.ones((1, 3), np.int32), left_first=True)] == [
        [0, 0, 0],
        [0, 0, 0],
    ]


def test_costs_are_edit_distances_by_position() -> None:
    ids = np.array([2, 0, 2], np.int32)
    costs = sequence_costs(
        ids, np.array([1, 0], np.int32), ["kitten", "", "sea"], ["sitting", "seat"]
    )
    assert costs.tolist() == [[1, 6], [5, 3], [1, 6]]


def test_without_rapidfuzz_one_sentence_tells_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rapidfuzz", "rapidfuzz.process", "rapidfuzz.distance"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[fusion\]"):
        sequence_costs(np.zeros(1, np.int32), np.zeros(1, np.int32), ["a"], ["b"])


# -- hand-made vocabularies -----------------------------------------------------------------------


def vocabulary(*tokens: str, marker: str = "▁") -> TokenTexts:
    """Raw strings are the texts themselves, decoded without the space in front."""
    texts = [token.replace(marker, " ") for token in tokens]
    decoded = tuple(t.removeprefix(" ") if marker == "▁" else t for t in texts)
    return TokenTexts(tokens, decoded, tuple(t.encode() for t in texts), marker)


def mapping(to_pivot: list[int], kind: str = "ms") -> VocabularyMap:
    return VocabularyMap(np.array(to_pivot, np.int32), kind, np.zeros(len(to_pivot), np.bool_))


def stored(texts: TokenTexts, ids: list[int], top: list[tuple[list[int], list[float]]]) -> Record:
    """top: ids and probabilities of each row; what is missing to 1 is the tail."""
    ends = np.cumsum([len(texts.pieces[i]) for i in ids]).astype(np.int32)
    probs = np.array([p for _, p in top], np.float32)
    with np.errstate(divide="ignore"):
        logs = np.log(probs)
    topk = TopK(np.array([i for i, _ in top], np.int32), logs, 1 - probs.sum(1), logs[:, 0])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int32)
    return Record(0, np.array(ids, np.int32), starts, ends, topk, 1.0)


def read(texts: TokenTexts, ids: list[int]) -> Encoded:
    """After one token of prompt, which is token 0."""
    ends = np.cumsum([len(texts.pieces[i]) for i in ids]).astype(np.int32)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int32)
    positions = np.arange(1, len(ids) + 1, dtype=np.int32)
    return Encoded(np.array([0, *ids], np.int32), positions, starts, ends, int(ends[-1]))


def rows_of(found: SparseDistributions) -> list[dict[int, float]]:
    return [
        {int(i): round(float(p), 6) for i, p in zip(ids, probs, strict=True) if i >= 0}
        for ids, probs in zip(found.ids, found.probs, strict=True)
    ]


PIVOT = vocabulary("?", "▁the", "re", "▁", "x", "é")
SOURCE = vocabulary("Ġthe", "re", "Ġthere", "Ġ", "x", marker="Ġ")
TOP = ([0, 1, 4], [0.5, 0.25, 0.125])


def both(
    record: Record,
    pivot: Encoded,
    to_pivot: VocabularyMap,
    style: str,
    texts: tuple[TokenTexts, TokenTexts] = (SOURCE, PIVOT),
) -> tuple[SparseDistributions, SparseDistributions]:
    """Without and with the published defects."""
    found = [
        WarpingAligner(*texts, to_pivot, style=style, published_defects=defects).align(
            [record], [pivot]
        )[0]
        for defects in (False, True)
    ]
    return found[0], found[1]


def test_fusellms_fallback_is_one_token_late_only_with_the_defects() -> None:
    """The pivot's " the" and "re" against the source's " there": none is the same."""
    record = stored(SOURCE, [2, 4], [TOP, TOP])
    pivot = read(PIVOT, [1, 2, 4])
    sane, published = both(record, pivot, mapping([1, 2, 1, 3, 4], "em"), "fusellm")
    assert sane.origin.tolist()[1:] == published.origin.tolist()[1:] == [Origin.GOLD] * 2
    assert sane.ids[1:, 0].tolist() == [2, 4]
    assert published.ids[1:, 0].tolist() == [1, 2]
    assert published.probs[1:].tolist() == [[1, 0, 0]] * 2


def test_fusechats_fallback_is_the_token_that_comes_in_either_case() -> None:
    record = stored(SOURCE, [2, 4], [TOP, TOP])
    pivot = read(PIVOT, [1, 2, 4])
    for found in both(record, pivot, mapping([1, 2, 1, 3, 4], "em"), "fusechat"):
        assert found.origin[1] == Origin.GOLD
        assert found.ids[1, 0] == 2


@pytest.mark.parametrize("style", STYLES)
def test_entries_on_one_token_are_summed_and_lost_mass_is_told(style: str) -> None:
    """Entries 0 and 1 both become pivot token 1, entry 4 has no counterpart."""
    record = stored(SOURCE, [4, 4], [TOP, TOP])
    sane, published = both(record, read(PIVOT, [4, 4]), mapping([1, 1, 1, 3, -1]), style)
    assert rows_of(sane) == [{1: 0.75}, {1: 0.75}]
    assert sane.unmapped.tolist() == [0.125, 0.125]
    assert sane.tail.tolist() == [0.125, 0.125]
    assert rows_of(published) == [{1: 1.0}, {1: 1.0}]
    assert not published.unmapped.any()
    assert not published.tail.any()


def test_the_published_rule_keeps_the_first_of_several_and_renormalises() -> None:
    record = stored(SOURCE, [4], [TOP])
    _, published = both(record, read(PIVOT, [4]), mapping([1, 1, 1, 3, 4]), "fusechat")
    assert rows_of(published) == [{1: 0.8, 4: 0.2}]  # 0.5 and 0.125 of 0.625


def test_a_distribution_of_which_nothing_is_kept() -> None:
    record = stored(SOURCE, [4], [TOP])
    sane, published = both(record, read(PIVOT, [4]), mapping([-1] * 5), "fusechat")
    assert rows_of(sane) == rows_of(published) == [{}]
    assert sane.origin.tolist() == [Origin.ALIGNED]
    assert sane.unmapped.tolist() == [0.875]
    assert published.origin.tolist() == [Origin.NONE]


def test_a_lone_space_fits_every_token_only_with_the_defects() -> None:
    """The pivot's "▁" is paired with "re"; decoded alone it is empty."""
    record = stored(SOURCE, [1, 4], [TOP, TOP])
    pivot = read(PIVOT, [3, 4])
    sane, published = both(record, pivot, mapping([1, 2, 1, 3, 4]), "fusechat")
    assert sane.origin.tolist() == [Origin.ALIGNED, Origin.GOLD]
    assert published.origin.tolist() == [Origin.ALIGNED, Origin.ALIGNED]


def test_halves_of_different_characters_are_the_same_only_with_the_defects() -> None:
    half = TokenTexts(("<0xC3>", "<0xA9>"), ("�", "�"), (b"\xc3", b"\xa9"), "▁")
    other = TokenTexts(("Ð", "±"), ("�", "�"), (b"\xd0", b"\xb1"), "Ġ")
    record = stored(other, [0, 1], [([0], [0.5]), ([1], [0.5])])
    found = both(record, read(half, [0, 1]), mapping([0, 1]), "fusechat", (other, half))
    assert [f.origin.tolist() for f in found] == [
        [Origin.ALIGNED, Origin.GOLD],
        [Origin.ALIGNED, Origin.ALIGNED],
    ]


def test_of_several_source_tokens_the_first_that_ends_alike_gives_the_distribution() -> None:
    """The pivot's " breathe" against " b" and "reathe": the second gives what comes next."""
    pivot = vocabulary("?", "▁breathe", "x")
    source = vocabulary("Ġb", "reathe", "x", marker="Ġ")
    tops = [([0], [0.5]), ([1], [0.5]), ([2], [0.5])]
    record = stored(source, [0, 1, 2], tops)
    for found in both(record, read(pivot, [1, 2]), mapping([0, 1, 2]), "fusechat", (source, pivot)):
        assert found.origin.tolist() == [Origin.ALIGNED] * 2
        assert rows_of(found)[1].keys() == {2}
    for found in both(record, read(pivot, [1, 2]), mapping([0, 1, 2]), "fusellm", (source, pivot)):
        assert found.origin.tolist() == [Origin.ALIGNED, Origin.GOLD]


@pytest.mark.parametrize("style", STYLES)
def test_a_mined_map_makes_two_tokens_fit_and_an_em_map_does_not(style: str) -> None:
    pivot, source = vocabulary("?", "count", "x"), vocabulary("counts", "x", marker="Ġ")
    record = stored(source, [0, 1], [([0], [0.5]), ([1], [0.5])])
    origins = {
        kind: both(record, read(pivot, [1, 2]), mapping([1, 2], kind), style, (source, pivot))[
            0
        ].origin.tolist()
        for kind in ("em", "mined")
    }
    assert origins == {
        "em": [Origin.ALIGNED, Origin.GOLD],
        "mined": [Origin.ALIGNED, Origin.ALIGNED],
    }


# -- conversations --------------------------------------------------------------------------------


def random_topk(rng: np.random.Generator, r: int, size: int, k: int = 5) -> TopK:
    """Top k of random logits over `size` ids."""
    logits = rng.normal(size=(r, size)) * 3
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logs, axis=1)[:, :k].astype(np.int32)
    top = np.take_along_axis(logs, ids, 1)
    return TopK(ids, top.astype(np.float32), 1 - np.exp(top).sum(1), top[:, 0].astype(np.float32))


def encoded(tokenizer: Any, table: ByteTable, text: str) -> tuple[np.ndarray, np.ndarray]:
    """ids and the byte at which each ends, for a text that the tokenizer puts nothing before."""
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)
    return ids, np.cumsum(table.lengths[ids]).astype(np.int32)


def conversation(
    ids: np.ndarray, ends: np.ndarray, topk: TopK | None
) -> tuple[Record | None, Encoded]:
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int32)
    record = None if topk is None else Record(0, ids, starts, ends, topk, 1.0)
    whole = np.concatenate([[0], ids]).astype(np.int32)
    positions = np.arange(1, len(ids) + 1, dtype=np.int32)
    return record, Encoded(whole, positions, starts, ends, int(ends[-1]))


@pytest.mark.parametrize("defects", [False, True])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_a_source_that_is_the_pivot_gives_its_own_next_token_distributions(
    make_tokenizer: Callable[..., Any], kind: str, style: str, defects: bool
) -> None:
    """At every position, so nothing is one token early or late."""
    tokenizer = make_tokenizer(kind)
    table = ByteTable.from_tokenizer(tokenizer)
    texts = TokenTexts.from_tokenizer(tokenizer, table)
    ids, ends = encoded(tokenizer, table, "Question: how many apples, naïve 東 café? the there the")
    topk = random_topk(np.random.default_rng(0), len(ids), len(texts.raw))
    record, pivot = conversation(ids, ends, topk)
    same = VocabularyMap(np.arange(len(texts.raw), dtype=np.int32), "ms", np.ones(0, np.bool_))
    aligner = WarpingAligner(texts, texts, same, style=style, published_defects=defects)
    (found,) = aligner.align([record], [pivot])
    own = np.exp(topk.log_probs)
    if defects:
        own = own / own.sum(1, keepdims=True)
    assert (found.origin == Origin.ALIGNED).all()
    assert np.array_equal(found.ids, topk.ids)
    np.testing.assert_allclose(found.probs, own, rtol=1e-6)


TEXTS = st.text(st.sampled_from("the sumofapl 12,.\n東é😀"), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.booleans(), st.sampled_from(STYLES), st.sampled_from(["em", "ms"]))
def test_mass_is_conserved_and_no_id_comes_twice(
    make_tokenizer: Callable[..., Any], text: str, defects: bool, style: str, kind: str
) -> None:
    tokenizers = make_tokenizer("byte_level"), make_tokenizer("gpt2")
    tables = [ByteTable.from_tokenizer(t) for t in tokenizers]
    texts = [TokenTexts.from_tokenizer(t, b) for t, b in zip(tokenizers, tables, strict=True)]
    rng = np.random.default_rng(len(text))
    sides = [encoded(t, b, text) for t, b in zip(tokenizers, tables, strict=True)]
    topk = random_topk(rng, len(sides[0][0]), len(texts[0].raw))
    record, _ = conversation(*sides[0], topk)
    _, pivot = conversation(*sides[1], None)
    to_pivot = rng.integers(-1, 40, len(texts[0].raw) - 7).astype(np.int32)  # padded output rows
    aligner = WarpingAligner(
        texts[0],
        texts[1],
        VocabularyMap(to_pivot, kind, np.zeros(0, np.bool_)),
        style=style,
        published_defects=defects,
    )
    (found,) = aligner.align([record], [pivot])
    known = found.origin != Origin.NONE
    total = found.probs.sum(1) + found.tail + found.unmapped
    np.testing.assert_allclose(total[known], 1, atol=1e-5)
    assert not found.probs[~known].any()
    assert (found.probs[found.ids < 0] == 0).all()
    for row in found.ids:
        used = row[row >= 0]
        assert len(used) == len(set(used.tolist()))


def test_each_response_of_a_conversation_is_aligned_for_itself() -> None:
    """Two responses "x the"; after the first one's end nothing is handed to the second."""
    tops = [([i % 5], [0.5]) for i in range(4)]
    record = stored(SOURCE, [4, 0, 4, 0], tops)
    pivot = read(PIVOT, [4, 1, 4, 1])
    apart = Encoded(
        np.array([0, 4, 1, 0, 0, 4, 1], np.int32),
        np.array([1, 2, 5, 6], np.int32),
        pivot.starts,
        pivot.ends,
        pivot.response_bytes,
    )
    assert list(responses(record, pivot)) == [(slice(0, 4), slice(0, 4))]
    halves = [(slice(0, 2), slice(0, 2)), (slice(2, 4), slice(2, 4))]
    assert list(responses(record, apart)) == halves
    aligner = WarpingAligner(SOURCE, PIVOT, mapping([0, 1, 2, 3, 4]), style="fusechat")
    (found,) = aligner.align([record], [apart])
    assert found.ids[:, 0].tolist() == [0, 1, 2, 3]


def test_a_source_without_a_token_at_the_jump_keeps_the_responses_together() -> None:
    pivot = read(PIVOT, [1, 2, 4])
    apart = Encoded(pivot.ids[[0, 1, 0, 2, 3]], np.array([1, 3, 4]), pivot.starts, pivot.ends, 7)
    for ids in ([2], [2, 4]):  # no token at the jump, and none after it
        record = stored(SOURCE, ids, [TOP] * len(ids))
        assert list(responses(record, apart)) == [(slice(0, len(ids)), slice(0, 3))]


def test_after_a_responses_last_token_nothing_is_known() -> None:
    """The pivot ends the first response with a token, the source does not: what the source thought
    of the second response is not what comes there."""
    pivot = vocabulary("?", "x", "</s>")
    record = stored(SOURCE, [4, 4], [TOP, ([2, 1, 0], [0.5, 0.25, 0.125])])
    record = Record(0, record.tokens, np.array([0, 2]), np.array([1, 3]), record.topk, 1.0)
    both_end = Encoded(
        np.array([0, 1, 2, 0, 1, 2]),
        np.array([1, 2, 4, 5]),
        np.array([0, 1, 2, 3]),
        np.array([1, 2, 3, 4]),
        4,
    )
    aligner = WarpingAligner(SOURCE, pivot, mapping([1, 2, 1, 0, 1]), style="fusechat")
    (found,) = aligner.align([record], [both_end])
    assert found.origin.tolist() == [Origin.ALIGNED, Origin.GOLD] * 2
    assert found.ids[1::2, 0].tolist() == [2, 2]


def test_tokens_without_text_fit_nothing_unless_the_published_result_is_asked_for() -> None:
    source, pivot = vocabulary("", "x", marker="Ġ"), vocabulary("?", "", "x")
    record = stored(source, [0, 1], [([0], [0.5]), ([1], [0.5])])
    for style, kind in itertools.product(STYLES, ("em", "ms")):
        sane, published = both(
            record, read(pivot, [1, 2]), mapping([0, 2], kind), style, (source, pivot)
        )
        assert (sane.origin[1], published.origin[1]) == (Origin.GOLD, Origin.ALIGNED)


def test_the_first_token_needs_the_same_first_byte() -> None:
    record = stored(SOURCE, [0, 4], [TOP, TOP])
    late = Record(0, record.tokens, record.starts + 1, record.ends + 1, record.topk, 1.0)
    pivot = read(PIVOT, [1, 4])
    aligner = WarpingAligner(SOURCE, PIVOT, mapping([1, 2, 1, 3, 4]), style="fusechat")
    shared, shifted = aligner.align([record, late], [pivot, pivot])
    assert shared.origin.tolist() == [Origin.ALIGNED] * 2
    assert shifted.origin.tolist() == [Origin.GOLD, Origin.ALIGNED]
    assert shifted.ids[0, 0] == 1


def test_ids_beyond_the_table_have_no_counterpart() -> None:
    """Qwen's output layer has 290 rows more than its tokenizer has tokens."""
    record = stored(SOURCE, [4], [([4, 99, 5, -1], [0.5, 0.25, 0.125, 0])])
    aligner = WarpingAligner(SOURCE, PIVOT, mapping([1, 2, 1, 3, 4]), style="fusechat")
    (found,) = aligner.align([record], [read(PIVOT, [4])])
    assert rows_of(found) == [{4: 0.5}]
    assert found.unmapped.tolist() == [0.375]


def test_empty_conversations_pass() -> None:
    none = np.zeros(0, np.int32)
    nothing = TopK(np.zeros((0, 3), np.int32), np.zeros((0, 3), np.float32), none, none)
    silent = Record(0, none, none, none, nothing, 0.0)
    record = stored(SOURCE, [4], [TOP])
    empty = Encoded(np.zeros(2, np.int32), none, none, none, 0)
    aligner = WarpingAligner(SOURCE, PIVOT, mapping([1, 2, 1, 3, 4]), style="fusechat")
    first, second, third = aligner.align([silent, record, silent], [read(PIVOT, [4]), empty, empty])
    assert (first.ids[:, 0].tolist(), first.origin.tolist()) == ([4], [Origin.GOLD])
    assert len(second.ids) == len(third.ids) == 0


def test_the_order_of_a_batch_changes_nothing() -> None:
    records = [stored(SOURCE, ids, [TOP] * len(ids)) for ids in ([0, 4], [2, 4], [4])]
    pivots = [read(PIVOT, ids) for ids in ([1, 4], [1, 2, 4], [4])]
    aligner = WarpingAligner(SOURCE, PIVOT, mapping([1, 2, 1, 3, 4]), style="fusechat")
    alone = [aligner.align([r], [p])[0] for r, p in zip(records, pivots, strict=True)]
    for order in itertools.permutations(range(3)):
        found = aligner.align([records[i] for i in order], [pivots[i] for i in order])
        for i, one in zip(order, found, strict=True):
            assert np.array_equal(one.ids, alone[i].ids)
            assert np.array_equal(one.probs, alone[i].probs)
