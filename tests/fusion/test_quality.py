"""What is reported of an alignment."""

from __future__ import annotations

import pytest
from synthetic import encode_real, hand_table, lay, random_record, real_map, real_table, think

from mergekit_unconstrained.fusion.alignment.by_bytes import ByteAligner
from mergekit_unconstrained.fusion.alignment.quality import measure
from mergekit_unconstrained.fusion.vocabulary.byte_map import byte_map


def test_the_report_counts_positions_labels_and_masses() -> None:
    """The source reads ab q abc q, the pivot a b q ab c d: the first `a` and the last position are
    the ones that go wrong."""
    source = hand_table(["ab", "abc", "q", "<e>"], (3,))
    pivot = hand_table(["a", "b", "q", "ab", "c", "<e>"], (5,))
    spoken, heard = lay(source, [0, 2, 1, 2]), lay(pivot, [0, 1, 2, 3, 4, 2, 5])
    record = think(
        spoken,
        [{0: 0.5, 2: 0.3}, {2: 0.6, 3: 0.2}, {1: 0.6, 0: 0.2}, {2: 0.9}],
        [0.5, 0.6, 0.6, 0.9],
    )
    one = ByteAligner(source, pivot, byte_map(source, pivot, frozenset([3]), 5))
    report = measure([record], [heard], one)
    assert report.positions == 7
    assert report.coverage == pytest.approx(6 / 7)
    assert set(report.origins) == {"none", "shared", "inside"}
    shared, inside = report.origins["shared"], report.origins["inside"]
    assert (shared.share, inside.share) == pytest.approx((4 / 7, 2 / 7))
    assert shared.label_consistency == pytest.approx(3 / 4)  # ab is not the pivot's a
    assert inside.label_consistency == 1
    assert report.all.label_consistency == pytest.approx(5 / 6)
    assert shared.mass == pytest.approx((0.8 + 0.8 + 0.8 + 0.9) / 4)
    assert shared.tail == pytest.approx((0.2 + 0.2 + 0.2 + 0.1) / 4)
    assert inside.unmapped == pytest.approx((0 + 0.2 / 0.8) / 2)
    assert shared.gold == pytest.approx((0 + 0.6 + 0.8 + 0.9) / 4)
    assert report.as_dict()["origins"]["inside"]["mass"] == pytest.approx((1 + 0.75) / 2)


def test_nothing_aligned_is_reported_as_nothing() -> None:
    table = hand_table(["a"])
    one = ByteAligner(table, table, byte_map(table, table, frozenset(), None))
    report = measure([], [], one)
    assert (report.positions, report.coverage, report.origins) == (0, 0.0, {})


@pytest.mark.parametrize(("source", "pivot"), [("qwen", "mistral-v1"), ("mistral-v1", "qwen")])
def test_real_tokenizers_agree_on_what_came(source: str, pivot: str) -> None:
    """Published maps get 74 to 86 % of the pivot's next tokens right."""
    text = (
        "Albert is wondering how much pizza he can eat in one day. He buys 2 large pizzas and 2 "
        "small pizzas. He eats 32 from the largest pizzas because 2 x 16 = 32, and 16 from the "
        "small pizza because 2 x 8 = 16. He eats 48 pieces because 32 + 16 = 48.\n#### 48"
    )
    spoken, heard = encode_real(source, text), encode_real(pivot, text)
    assert spoken is not None
    assert heard is not None
    record = random_record(spoken, real_table(source), 10, seed=0)
    one = ByteAligner(real_table(source), real_table(pivot), real_map(source, pivot))
    report = measure([record], [heard], one)
    assert report.all.label_consistency > 0.95
    assert report.coverage > 0.95
