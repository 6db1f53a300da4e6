"""What a card says of figures: one rule for gains and losses, paired where that is possible."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.evaluation.statistics import paired_error
from mergekit_unconstrained.fusion import scores as ratios
from mergekit_unconstrained.hub import fusion_record, results
from mergekit_unconstrained.hub.facts import (
    CardFacts,
    Fusion,
    Method,
    Parent,
    Score,
    Source,
    Teacher,
)
from mergekit_unconstrained.hub.findings import finding, reading, worse

METRIC = "exact match"


def facts(*scores: Score, fusion: Fusion | None = None) -> CardFacts:
    roles = ("pivot", "source", "source") if fusion else ("base", "expert", "expert")
    parents = tuple(Parent(r, Source(n)) for r, n in zip(roles, ("b", "x", "y"), strict=True))
    method = Method("layerwise", "Layer-wise merging")
    return CardFacts("t", method, parents, "a: 1", "c", {}, evaluation=scores, fusion=fusion)


def row(model: str, value: float, error: float | None = 0.03, paired: float | None = None) -> Score:
    return Score("sums", METRIC, model, value, error, 100, paired)


OWN = row("this model", 0.5)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (row("b", 0.3), "better than its base (4.7 standard errors)"),
        (row("b", 0.7), "worse than its base (4.7 standard errors)"),
        (row("b", 0.45), "not better than its base beyond chance (1.2 standard errors ahead)"),
        (row("b", 0.55), "not better than its base (1.2 standard errors behind, which may be"),
        (row("b", 0.5), "as good as its base"),
        (row("b", 0.4, None, 0.02), "better than its base (5.0 standard errors)"),
        (row("b", 0.4, 0.03, 0.06), "not better than its base beyond chance (1.7 standard errors"),
    ],
)  # fmt: skip
def test_one_rule_judges_gains_and_losses(base, words):
    assert finding(facts(OWN, base))[0].startswith(
        f"sums: on these 100 examples this model is {words}"
    )


def test_where_no_error_is_known_nothing_is_called_chance_or_not():
    own = row("this model", 0.5, None)
    (said,) = finding(facts(own, row("b", 0.4, None)))
    assert "ahead of its base (how surely is not known)" in said


def test_it_is_compared_with_the_best_of_every_kind():
    known = (OWN, row("b", 0.1), row("x", 0.2), row("y", 0.9), row("uniform (grid)", 0.2))
    (said,) = finding(facts(*known, row("uniform (random)", 0.3), row("somebody else", 0.9)))
    assert "better than its base (" in said
    assert "worse than its best expert y (" in said
    assert "better than the best uniform merge, uniform (random) (" in said
    assert "somebody" not in said


def test_a_fusion_is_compared_with_its_pivot_teachers_targets_and_plain_fine_tuning():
    def bits(model: str, value: float) -> Score:
        return Score("held-out", "bits per byte", model, value, 0.01, 6)

    fusion = Fusion("b", "d", 10, 2, (Teacher("x"), Teacher("y")), {})
    known = facts(
        bits("this model", 1.0), bits("pivot b", 1.5), bits("source x", 2), bits("source y", 3),
        bits("SFT on the same data", 0.9), bits("target of x", 1.0), bits("target of y", 1.2),
        fusion=fusion,
    )  # fmt: skip
    (said,) = finding(known)
    assert "better than its pivot (35.4 standard errors)" in said
    assert "better than its best source x (" in said
    assert "worse than plain fine-tuning on the same data (7.1 standard errors)" in said
    assert "as good as its best single target, that of x" in said
    told = " ".join(reading(known))
    assert "target of X: the pivot trained on the targets of X alone" in told
    assert "n = 6" in told
    assert len(worse(known)) == 1


def test_the_rule_says_whether_it_is_paired():
    paired, alone = row("x", 0.1, 0.03, 0.01), row("b", 0.1)
    for rows, words in (
        ((paired,), "(a paired one, over the same examples)"),
        ((alone,), "one of independent samples, since"),
        ((paired, alone), "elsewhere one of independent samples"),
    ):
        told = " ".join(reading(facts(OWN, *rows)))
        assert words in told
        assert "from two of its standard errors on" in told
    assert reading(facts(OWN)) == ()


def test_a_loss_counts_by_its_paired_error():
    assert worse(facts(OWN, row("x", 0.55, 0.03, 0.01))) == (
        "sums: 0.5 exact match against 0.55 of x, 5.0 standard errors worse.",
    )


# -- paired errors --------------------------------------------------------------------------------


def test_a_paired_error_is_that_of_the_mean_difference():
    # differences 1, 0, 0, 1: variance 1/3 over n = 4
    assert paired_error([1, 0, 1, 1], [0, 0, 1, 0]) == pytest.approx(math.sqrt(1 / 12))


def test_the_paired_error_of_two_ratios_is_the_jackknifes():
    draw = np.random.default_rng(0)
    n = 400
    sizes = draw.integers(20, 200, n)
    hard = draw.normal(3, 0.5, n)
    bits = [(hard + draw.normal(0, 0.1, n)) * sizes for _ in range(2)]
    one, two = (
        ratios.Score(
            float(b.sum() / sizes.sum()), 0.0, n,
            [(i, float(x), int(s)) for i, (x, s) in enumerate(zip(b, sizes, strict=True))],
        )
        for b in bits
    )  # fmt: skip
    apart = bits[0] - bits[1]
    left_out = (apart.sum() - apart) / (sizes.sum() - sizes)
    expected = math.sqrt((n - 1) / n * np.square(left_out - left_out.mean()).sum())
    assert ratios.paired_error(one, two) == pytest.approx(expected, rel=0.02)
    shuffled = ratios.Score(two.bits_per_byte, 0.0, n, list(reversed(two.parts)))
    assert ratios.paired_error(one, shuffled) == pytest.approx(expected, rel=0.02)
    others = ratios.Score(two.bits_per_byte, 0.0, n, two.parts[1:])
    assert ratios.paired_error(one, others) is None
    measured = fusion_record._measured({"pivot b": two, "this model": one})
    assert measured["pivot b"]["paired"] == pytest.approx(expected, rel=0.02)
    assert set(measured["this model"]) == {"bits_per_byte", "stderr", "n"}


def test_a_search_gives_the_errors_of_its_intervals(tmp_path: Path):
    task = {"name": "t", "unit": METRIC, "means": {"searched": [0.5, 0.1, 9], "b": [0.25, 0.1, 9]}}
    task["differences"] = {"b": [0.25, 0.25 - 1.959964 * 0.04, 0.25 + 1.959964 * 0.04]}
    (tmp_path / "report.json").write_text(json.dumps({"this_model": "searched", "tasks": [task]}))
    own, base = results.scores_in(tmp_path)
    assert (own.model, own.paired) == ("this model", None)
    assert base.paired == pytest.approx(0.04, rel=1e-6)


def scores_json(**changes: Any) -> dict[str, Any]:
    task = {"mean": 0.5, "standard_error": 0.1, "n": 20, "failures": 0}
    return {
        "split": "test",
        "tasks": {"t": {"unit": METRIC}},
        "models": {m: {"tasks": {"t": task}} for m in ("out", "runs/x", "models/b")},
        "paired": {"t": {"out": {"runs/x": 0.01, "models/b": 0.02}, "runs/x": {"out": 0.01}}},
        "data": {
            "t": {"name": "t.jsonl", "sha256": "a" * 64, "hashed": "file", "licence": None, "n": 20}
        },
        **changes,
    }


def test_evaluated_scores_bring_their_paired_errors_and_their_data(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    source = tmp_path / "scores.json"
    source.write_text(json.dumps(scores_json()))
    results.bring_scores(source, out, ["b", "x"])
    found = {s.model: s.paired for s in results.scores_in(out)}
    assert found == {"this model": None, "x": 0.01, "b": 0.02}
    (data,) = results.data_in(out)
    assert (data.name, data.role, data.rows, data.licence) == (
        "t.jsonl",
        "testing",
        {"test": 20},
        None,
    )
    old = scores_json()
    del old["paired"], old["data"]
    source.write_text(json.dumps(old))
    results.bring_scores(source, out, ["b", "x"])
    assert {s.paired for s in results.scores_in(out)} == {None}
    assert results.data_in(out) == ()
    (out / "scores.json").write_text(json.dumps({**old, "data": {"t": {"name": "x"}}}))
    with pytest.raises(DataError, match="not the report"):
        results.data_in(out)
