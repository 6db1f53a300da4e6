"""Alignment by bytes on vocabularies small enough to count on fingers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from synthetic import hand_table, lay, think

from mergekit_unconstrained.fusion.alignment import places
from mergekit_unconstrained.fusion.alignment.by_bytes import ByteAligner
from mergekit_unconstrained.fusion.records import (
    Encoded,
    Origin,
    Record,
    SparseDistributions,
    TopK,
)
from mergekit_unconstrained.fusion.vocabulary.byte_map import byte_map
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable

SOURCE = hand_table(["a", "b", "c", "ab", "abc", "abd", "x", "bx", "<eot>", "<pad>"], (8, 9))
A, B, C, AB, ABC, ABD, X, BX, EOT, PAD = range(10)
PIVOT = hand_table(["</s>", "c", "b", "a", "ab", "d", "x", "bc", "abx"], (0,))
END, c, b, a, ab, d, x, bc, abx = range(9)


def aligner(source: ByteTable = SOURCE, pivot: ByteTable = PIVOT, **options: Any) -> ByteAligner:
    ends = frozenset([EOT]) if source is SOURCE else frozenset(source.special)
    end = min(pivot.special) if pivot.special else None
    return ByteAligner(source, pivot, byte_map(source, pivot, ends, end), **options)


def align(record: Record, heard: Encoded, **options: Any) -> SparseDistributions:
    return aligner(**options).align([record], [heard])[0]


def row(found: SparseDistributions, t: int) -> dict[int, float]:
    """Position t as token -> probability; the whole of it must be there."""
    ids, probs = found.ids[t].tolist(), found.probs[t].tolist()
    assert all(p == 0 for i, p in zip(ids, probs, strict=True) if i < 0)
    used = [(i, p) for i, p in zip(ids, probs, strict=True) if i >= 0]
    assert len(dict(used)) == len(used), "an id twice"
    if found.origin[t] != Origin.NONE:
        assert sum(probs) + found.tail[t] + found.unmapped[t] == pytest.approx(1, abs=1e-6)
    else:
        assert not used
        assert found.tail[t] == found.unmapped[t] == 0
    return {i: p for i, p in used if p > 1e-20}


def near(expected: dict[int, float]) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-7)


# -- shared boundaries ----------------------------------------------------------------------------


def test_a_shared_boundary_gets_the_row_that_starts_there() -> None:
    source, pivot = lay(SOURCE, [C, X, EOT]), lay(PIVOT, [c, x, END])
    record = think(
        source, [{C: 0.6, X: 0.3}, {X: 0.5, A: 0.2}, {EOT: 0.7, B: 0.1}], [0.6, 0.5, 0.7]
    )
    found = align(record, pivot)
    assert row(found, 0) == near({c: 0.6, x: 0.3})
    assert row(found, 1) == near({x: 0.5, a: 0.2})
    assert row(found, 2) == near({END: 0.7, b: 0.1})
    assert found.tail.tolist() == pytest.approx([0.1, 0.3, 0.2], abs=1e-6)
    assert found.origin.tolist() == [Origin.SHARED] * 3


def test_masses_that_fall_on_one_token_are_summed() -> None:
    source, pivot = lay(SOURCE, [AB]), lay(PIVOT, [ab])
    record = think(source, [{AB: 0.3, ABC: 0.2, X: 0.15, ABD: 0.1}], [0.3])
    assert row(align(record, pivot), 0) == near({ab: 0.6, x: 0.15})


def test_what_has_no_counterpart_is_kept_as_a_number() -> None:
    """A special token that is no end, and an id of a padded output layer."""
    source, pivot = lay(SOURCE, [C]), lay(PIVOT, [c])
    record = think(source, [{C: 0.5, PAD: 0.2, 12: 0.1}], [0.5])
    found = align(record, pivot)
    assert row(found, 0) == near({c: 0.5})
    assert found.unmapped[0] == pytest.approx(0.3)
    assert found.tail[0] == pytest.approx(0.2)


def test_entries_keep_their_places_where_nothing_collides() -> None:
    source, pivot = lay(SOURCE, [C]), lay(PIVOT, [c])
    found = align(think(source, [{X: 0.5, C: 0.3, A: 0.1}], [0.3]), pivot)
    assert found.ids[0].tolist() == [x, c, a, -1]


# -- inside a source token ------------------------------------------------------------------------


def test_inside_a_token_the_consumed_bytes_condition_its_row() -> None:
    """After `ab` of abc: what continues ab is c (.5) and d (.2); ab itself (.1) says nothing."""
    source, pivot = lay(SOURCE, [ABC]), lay(PIVOT, [ab, c])
    record = think(source, [{ABC: 0.5, ABD: 0.2, AB: 0.1, X: 0.15}], [0.5])
    found = align(record, pivot)
    assert found.origin.tolist() == [Origin.SHARED, Origin.INSIDE]
    assert row(found, 0) == near({ab: 0.8, x: 0.15})
    assert row(found, 1) == near({c: 0.5 / 0.8, d: 0.2 / 0.8})
    assert found.unmapped[1] == pytest.approx(0.1 / 0.8)
    assert found.tail[1] == 0


def test_the_token_that_came_counts_in_the_tail_when_it_is_not_listed() -> None:
    source, pivot = lay(SOURCE, [ABC]), lay(PIVOT, [ab, c])
    found = align(think(source, [{ABD: 0.2, X: 0.5}], [0.25]), pivot)
    assert row(found, 1) == near({d: 0.2 / 0.45})
    assert found.tail[1] == pytest.approx(0.25 / 0.45)


def test_where_nothing_listed_continues_there_is_no_distribution() -> None:
    source, pivot = lay(SOURCE, [ABC]), lay(PIVOT, [ab, c])
    found = align(think(source, [{X: 0.5, AB: 0.2}], [0.25]), pivot)
    assert found.origin.tolist() == [Origin.SHARED, Origin.NONE]
    assert row(found, 1) == {}


def test_two_positions_in_one_token_each_consume_what_came() -> None:
    source, pivot = lay(SOURCE, [ABC]), lay(PIVOT, [a, b, c])
    record = think(source, [{ABC: 0.4, ABD: 0.2, AB: 0.1, A: 0.3}], [0.4])
    found = align(record, pivot)
    assert row(found, 0) == near({ab: 0.7, a: 0.3})  # the pivot would write abc as ab c
    assert row(found, 1) == near({bc: 0.4, b: 0.3})
    assert found.unmapped[1] == pytest.approx(0.3)
    assert row(found, 2) == near({c: 0.4 / 0.7, d: 0.2 / 0.7})


def test_a_special_token_continues_no_text() -> None:
    source = hand_table(["<", "<e>", "<a"], (1,))
    pivot = hand_table(["</s>", "<", "a", "e"], (0,))
    record = think(lay(source, [2]), [{1: 0.5, 2: 0.3, 0: 0.2}], [0.3])
    found = align(record, lay(pivot, [1, 2]), source=source, pivot=pivot)
    assert row(found, 1) == near({2: 0.3 / 0.5})


def test_inside_can_be_left_out() -> None:
    source, pivot = lay(SOURCE, [ABC]), lay(PIVOT, [ab, c])
    record = think(source, [{ABC: 0.5, ABD: 0.2}], [0.5])
    assert align(record, pivot, inside=False).origin.tolist() == [Origin.SHARED, Origin.NONE]


# -- the chain rule -------------------------------------------------------------------------------


def test_a_longer_pivot_token_gets_the_product_along_the_source() -> None:
    source, pivot = lay(SOURCE, [AB, X]), lay(PIVOT, [abx])
    record = think(source, [{AB: 0.6, C: 0.3}, {X: 0.5, A: 0.2}], [0.6, 0.5])
    found = align(record, pivot)
    assert row(found, 0) == near({abx: 0.3, ab: 0.3, c: 0.3})
    assert found.origin.tolist() == [Origin.CHAIN]
    plain = align(record, pivot, chain=False)
    assert row(plain, 0) == near({ab: 0.6, c: 0.3})
    assert plain.origin.tolist() == [Origin.SHARED]


def test_the_chain_takes_from_the_tail_what_is_not_listed() -> None:
    source, pivot = lay(SOURCE, [AB, X]), lay(PIVOT, [abx])
    found = align(think(source, [{C: 0.7}, {A: 0.2}], [0.2, 0.25]), pivot)
    assert row(found, 0) == near({c: 0.7, abx: 0.05})
    assert found.tail[0] == pytest.approx(0.25)


def test_the_chain_adds_to_what_other_tokens_gave() -> None:
    source = hand_table(["a", "b", "ab", "abq"])
    pivot = hand_table(["a", "ab"])
    record = think(lay(source, [0, 1]), [{0: 0.5, 2: 0.3, 3: 0.1}, {1: 0.4}], [0.5, 0.4])
    found = align(record, lay(pivot, [1]), source=source, pivot=pivot)
    assert row(found, 0) == near({1: 0.3 + 0.1 + 0.5 * 0.4, 0: 0.5 * 0.6})


def test_the_chain_can_begin_inside_a_token() -> None:
    """The pivot reads abc as a bc; the source as ab c."""
    source, pivot = lay(SOURCE, [AB, C]), lay(PIVOT, [a, bc])
    record = think(source, [{AB: 0.4, A: 0.1, X: 0.5}, {C: 0.3, X: 0.7}], [0.4, 0.3])
    found = align(record, pivot)
    assert row(found, 1) == near({b: 0.8 * 0.7, bc: 0.8 * 0.3})
    assert found.unmapped[1] == pytest.approx(0.2)
    assert found.origin.tolist() == [Origin.SHARED, Origin.INSIDE]


def test_the_chain_inside_a_token_takes_from_the_tail_too() -> None:
    source, pivot = lay(SOURCE, [AB, C]), lay(PIVOT, [a, bc])
    found = align(think(source, [{ABC: 0.2, X: 0.5}, {C: 0.3}], [0.1, 0.3]), pivot)
    assert row(found, 1) == near({bc: 0.2 / 0.3 + 0.1 / 0.3 * 0.3})
    assert found.tail[1] == pytest.approx(0.1 / 0.3 * 0.7)


def test_no_chain_where_the_ends_differ() -> None:
    """The pivot's ab ends inside the source's bx."""
    source, pivot = lay(SOURCE, [A, BX]), lay(PIVOT, [ab, x])
    record = think(source, [{A: 0.6, AB: 0.3}, {BX: 0.5, X: 0.2}], [0.6, 0.5])
    found = align(record, pivot)
    assert row(found, 0) == near({a: 0.6, ab: 0.3})
    assert found.origin.tolist() == [Origin.SHARED, Origin.INSIDE]
    assert row(found, 1) == near({x: 1.0})


# -- spaces put before the text -------------------------------------------------------------------

SPACED = hand_table([" ", " a", "a", " b", "b", " ab", "</s>"], (6,), adds_space=True)
PLAIN = hand_table(["a", "b", "ab", " a", " b", "<e>"], (5,))


def covering(table: ByteTable, tokens: list[int], starts: list[int], ends: list[int]) -> Encoded:
    return Encoded(
        np.array(tokens, np.int32),
        np.arange(len(tokens), dtype=np.int32),
        np.array(starts, np.int32),
        np.array(ends, np.int32),
        ends[-1],
    )


def test_a_source_that_puts_a_space_before_the_text_says_what_follows_it() -> None:
    source = covering(SPACED, [5, 6], [0, 2], [2, 3])
    record = think(source, [{5: 0.5, 1: 0.3, 2: 0.1, 6: 0.1}, {6: 0.9}], [0.5, 0.9])
    for inside in (True, False):
        found = align(record, lay(PLAIN, [2, 5]), source=SPACED, pivot=PLAIN, inside=inside)
        assert found.origin.tolist() == [Origin.SHARED, Origin.SHARED]
        assert row(found, 0) == near({2: 0.5 / 0.8, 0: 0.3 / 0.8})


def test_a_pivot_that_puts_a_space_before_the_text_wants_it_in_its_tokens() -> None:
    pivot = covering(SPACED, [5, 1, 6], [0, 2, 4], [2, 4, 5])
    source = lay(PLAIN, [2, 3, 5])
    record = think(source, [{2: 0.5, 0: 0.3, 5: 0.1}, {3: 0.6, 0: 0.3}, {5: 0.8}], [0.5, 0.6, 0.8])
    found = align(record, pivot, source=PLAIN, pivot=SPACED)
    assert row(found, 0) == near({5: 0.5, 1: 0.3, 6: 0.1})
    assert row(found, 1) == near({1: 0.6, 2: 0.3})  # in the middle of a text it is in the bytes
    assert row(found, 2) == near({6: 0.8})


def test_two_models_that_both_put_a_space_before_the_text_agree() -> None:
    both = covering(SPACED, [5, 1, 6], [0, 2, 4], [2, 4, 5])
    other = hand_table([" b", " a", "a", " ab", "b", "<e>"], (5,), adds_space=True)
    record = think(
        covering(other, [3, 1, 5], [0, 2, 4], [2, 4, 5]),
        [{3: 0.5, 1: 0.3}, {1: 0.6}, {5: 0.7}],
        [0.5, 0.6, 0.7],
    )
    found = align(record, both, source=other, pivot=SPACED)
    assert row(found, 0) == near({5: 0.5, 1: 0.3})


def test_a_space_that_is_a_token_of_its_own_covers_nothing() -> None:
    """The source reads `ab` as space, a, b; the pivot as a b - and the other way round."""
    source = covering(SPACED, [0, 2, 4, 6], [0, 0, 1, 2], [0, 1, 2, 3])
    thoughts = [{0: 0.9, 1: 0.05}, {2: 0.6, 4: 0.3}, {4: 0.5}, {6: 0.4}]
    record = think(source, thoughts, [0.9, 0.6, 0.5, 0.4])
    found = align(record, lay(PLAIN, [0, 1, 5]), source=SPACED, pivot=PLAIN)
    assert row(found, 0) == near({0: 0.6, 1: 0.3})
    back = think(lay(PLAIN, [0, 1, 5]), [{0: 0.6, 1: 0.3}, {1: 0.5}, {5: 0.4}], [0.6, 0.5, 0.4])
    found = align(back, source, source=PLAIN, pivot=SPACED)
    assert found.origin.tolist() == [Origin.SHARED] * 4
    assert row(found, 0) == near({1: 0.6, 3: 0.3})
    assert row(found, 1) == near({2: 0.6, 4: 0.3})
    own = aligner(SPACED, SPACED).align([record], [source])[0]
    assert row(own, 0) == near(thoughts[0])
    assert row(own, 1) == near(thoughts[1])


# -- ends of turns, and what one side lacks -------------------------------------------------------


def test_without_an_end_token_the_end_of_a_turn_has_no_distribution() -> None:
    """And no token of text covers it: the next turn begins with its own boundary."""
    source = covering(SOURCE, [AB, C], [0, 3], [2, 4])  # byte 2 ends the first turn
    pivot = covering(PIVOT, [ab, END, c, END], [0, 2, 3, 4], [2, 3, 4, 5])
    found = align(think(source, [{AB: 0.9}, {C: 0.8}], [0.9, 0.8]), pivot)
    none, shared = Origin.NONE, Origin.SHARED
    assert found.origin.tolist() == [shared, none, shared, none]


def test_a_response_that_one_model_reads_later_or_shorter_is_aligned_where_both_read_it() -> None:
    source = covering(SOURCE, [C, X], [2, 3], [3, 4])
    pivot = covering(PIVOT, [ab, c, x, a, END], [0, 2, 3, 4, 5], [2, 3, 4, 5, 6])
    found = align(think(source, [{C: 0.9}, {X: 0.8}], [0.9, 0.8]), pivot)
    none, shared = Origin.NONE, Origin.SHARED
    assert found.origin.tolist() == [none, shared, shared, none, none]


def test_conversations_do_not_touch_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is worked on together, also with empty ones in between."""
    empty = Encoded(*[np.zeros(0, np.int32)] * 4, 3)
    spoken = [[AB, X], [C], [], [ABC, X, EOT], [X] * 5, []]
    heard = [[abx], [c], [], [ab, c, x, END], [x] * 5, [c]]
    sources = [lay(SOURCE, tokens) if tokens else empty for tokens in spoken]
    pivots = [lay(PIVOT, tokens) if tokens else empty for tokens in heard]
    rng = np.random.default_rng(0)
    records = []
    for source in sources:
        masses = rng.dirichlet(np.ones(5), len(source.ends))
        tokens = source.response_ids.tolist()
        thoughts = [
            {
                token: p[0],
                **{i: q for i, q in zip((X, C, AB, B), p[1:4], strict=False) if i != token},
            }
            for token, p in zip(tokens, masses.tolist(), strict=True)
        ]
        records.append(
            think(source, thoughts, masses[:, 0].tolist(), k=4) if tokens else _empty_record(source)
        )
    one = aligner()
    alone = [one.align([r], [p])[0] for r, p in zip(records, pivots, strict=True)]
    for entries in (1, 15, 5000):
        monkeypatch.setattr(places, "_ENTRIES", entries)
        together = one.align(records, pivots)
        assert len(together) == len(pivots)
        for mine, theirs, pivot in zip(alone, together, pivots, strict=True):
            assert len(theirs.origin) == len(pivot.ends)
            assert theirs.origin.tolist() == mine.origin.tolist()
            for t in range(len(mine.origin)):
                assert row(theirs, t) == near(row(mine, t))
            assert theirs.tail.tolist() == pytest.approx(mine.tail.tolist())


def _empty_record(encoded: Encoded) -> Record:
    nothing = np.zeros(0, np.float32)
    topk = TopK(np.zeros((0, 4), np.int32), np.zeros((0, 4), np.float32), nothing, nothing)
    return Record(0, encoded.ids, encoded.starts, encoded.ends, topk, 0.0)


def test_it_counts_records_and_conversations() -> None:
    with pytest.raises(ValueError, match="1 records for 0 conversations"):
        aligner().align([think(lay(SOURCE, [C]), [{C: 0.9}], [0.9])], [])
    assert aligner().align([], []) == []


def test_a_map_of_another_source_is_refused() -> None:
    with pytest.raises(ValueError, match="not of this source"):
        ByteAligner(PIVOT, PIVOT, byte_map(SOURCE, PIVOT, frozenset(), None))
