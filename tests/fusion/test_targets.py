"""Fused targets against the stated rules written out with dictionaries, one position at a time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.fusion.records import (
    Encoded,
    FusedTargets,
    Origin,
    Record,
    SparseDistributions,
    TopK,
)
from mergekit_unconstrained.fusion.targets import (
    Candidate,
    fuse,
    own_distributions,
    rank_targets,
    token_bits,
)

RESTS = ["renormalize", "gold", "bucket"]
UNALIGNED = ["gold", "skip"]


def distributions(
    rows: list[dict[int, float]],
    *,
    tail: list[float] | float = 0.0,
    unmapped: list[float] | float = 0.0,
    origin: list[Origin] | None = None,
    width: int | None = None,
) -> SparseDistributions:
    """Rows of id -> absolute probability; an empty one has no distribution but for its origin."""
    count = len(rows)
    width = max([width or 0, *map(len, rows)])
    ids = np.full((count, width), -1, dtype=np.int32)
    probs = np.zeros((count, width), dtype=np.float32)
    for t, row in enumerate(rows):
        ids[t, : len(row)] = list(row)
        probs[t, : len(row)] = list(row.values())
    if origin is None:
        origin = [Origin.SHARED if row else Origin.NONE for row in rows]
    return SparseDistributions(
        ids=ids,
        probs=probs,
        tail=np.broadcast_to(np.float32(tail), (count,)).copy(),
        unmapped=np.broadcast_to(np.float32(unmapped), (count,)).copy(),
        origin=np.array(origin, dtype=np.uint8),
    )


def candidate(
    found: SparseDistributions, bits: float = 1.0, nats: float = 1.0, token: Any = None
) -> Candidate:
    return Candidate(found, bits, nats, None if token is None else np.array(token, np.float32))


def as_rows(found: FusedTargets) -> list[dict[int, float]]:
    """Back to dictionaries; an id twice in a row, or one without mass, fails."""
    rows = []
    for ids, probs in zip(found.ids.tolist(), found.probs.tolist(), strict=True):
        listed = [i for i in ids if i >= 0]
        assert len(listed) == len(set(listed))
        assert all((p > 0) == (i >= 0) for i, p in zip(ids, probs, strict=True))
        rows.append({i: p for i, p in zip(ids, probs, strict=True) if i >= 0})
    return rows


def same(found: FusedTargets, expected: list[dict[int, float] | None], rest: Any = 0.0) -> None:
    """None: no target."""
    assert found.used.tolist() == [row is not None for row in expected]
    for row, wanted in zip(as_rows(found), expected, strict=True):
        assert row == pytest.approx(wanted or {}, abs=1e-6)
    np.testing.assert_allclose(found.rest, np.broadcast_to(rest, found.rest.shape), atol=1e-6)


# -- the rules written out ------------------------------------------------------------------------

Row = tuple[dict[int, float], float]
"""Probabilities by id, and the mass of all others."""


def completed(c: Candidate, t: int, gold: int, rest: str, unaligned: str) -> Row | None:
    d = c.distributions
    row = {int(i): float(p) for i, p in zip(d.ids[t], d.probs[t], strict=True) if i >= 0 and p > 0}
    mass, missing = sum(row.values()), float(d.tail[t] + d.unmapped[t])
    whole = mass if rest == "renormalize" else mass + missing
    nothing = d.origin[t] == Origin.NONE or whole == 0
    nothing |= rest == "renormalize" and float(d.unmapped[t]) > mass
    if nothing or (d.origin[t] == Origin.GOLD and unaligned == "skip"):
        return ({gold: 1.0}, 0.0) if unaligned == "gold" else None
    row = {i: p / whole for i, p in row.items()}
    if rest == "gold":
        row[gold] = row.get(gold, 0) + missing / whole
        row = {i: p for i, p in row.items() if p > 0}
    return row, missing / whole if rest == "bucket" else 0.0


def mixed(rows: list[Row | None], share: list[float]) -> Row | None:
    pairs = [(row, s) for row, s in zip(rows, share, strict=True) if row is not None]
    total = sum(s for _, s in pairs)
    if total == 0:
        return None
    out: dict[int, float] = {}
    for (row, _), s in pairs:
        for i, p in row.items():
            out[i] = out.get(i, 0) + p * s / total
    return {i: p for i, p in out.items() if p > 0}, sum(row[1] * s / total for row, s in pairs)


def variation(a: SparseDistributions, b: SparseDistributions, t: int) -> float:
    p, q = (
        {int(i): float(x) for i, x in zip(d.ids[t], d.probs[t], strict=True) if i >= 0}
        for d in (a, b)
    )
    p[-1], q[-1] = (float(d.tail[t] + d.unmapped[t]) for d in (a, b))
    return sum(abs(p.get(i, 0) - q.get(i, 0)) for i in p.keys() | q.keys()) / 2


def by_hand(candidates: list[Candidate], gold: list[int], options: dict[str, Any]) -> list[Any]:
    """Row or None at every position."""
    target, per, compare = (options[key] for key in ("target", "per", "compare"))
    rest, unaligned = options["rest"], options["unaligned"]
    count = len(candidates)
    out = []
    for t in range(len(gold)):
        rows = [completed(c, t, gold[t], rest, unaligned) for c in candidates]
        if per == "token":
            costs = [float(c.token_bits[t]) for c in candidates]  # type: ignore[index]
            nats = [4 * math.log(2) * c for c in costs]
        elif compare == "bits_per_byte":
            costs = [c.bits_per_byte for c in candidates]
            nats = [4 * math.log(2) * c for c in costs]
        else:
            costs = nats = [c.nats_per_token for c in candidates]
        if target == "min_ce":
            out.append(rows[min(range(count), key=lambda m, costs=costs: (costs[m], m))])
        elif target == "avg_ce":
            out.append(mixed(rows, [math.exp(-c) for c in nats]))
        elif target == "weighted":
            out.append(mixed(rows, [2.0, *(1.0 + 2 * m for m in range(count - 1))]))
        else:
            at = [t] if per == "token" else range(len(gold))
            own = candidates[0].distributions
            margins = []
            for c in candidates[1:]:
                d = c.distributions
                kept = [x for x in at if d.origin[x] not in (Origin.NONE, Origin.GOLD)]
                found = [variation(own, d, x) for x in kept]
                margins.append(sum(found) / len(found) if found else -math.inf)
            out.append(rows[1 + max(range(count - 1), key=lambda m, g=margins: (g[m], -m))])
    return out


def random_candidates(rng: np.random.Generator, count: int, positions: int) -> list[Candidate]:
    found = []
    for m in range(count):
        rows, tails, unmapped, origins = [], [], [], []
        for _ in range(positions):
            size = int(rng.integers(0, 4))
            # Exact in binary, so that equal margins are equal; some are zero.
            parts = rng.multinomial(64, rng.dirichlet(np.ones(size + 2))) / 64
            rows.append(dict(zip(rng.permutation(7)[:size].tolist(), parts[:size], strict=True)))
            tails.append(parts[-2])
            unmapped.append(parts[-1])
            kinds = [Origin.NONE, Origin.SHARED, Origin.INSIDE, Origin.GOLD]
            origins.append(Origin.OWN if m == 0 else Origin(int(rng.choice(kinds))))
        d = distributions(rows, tail=tails, unmapped=unmapped, origin=origins, width=3)
        order = rng.permutation(3)  # unused entries need not be at the end
        d = SparseDistributions(d.ids[:, order], d.probs[:, order], d.tail, d.unmapped, d.origin)
        token = rng.random(positions).astype(np.float32)
        found.append(candidate(d, float(rng.random()), float(rng.random()), token))
    return found


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("unaligned", UNALIGNED)
@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("target", ["min_ce", "avg_ce", "weighted", "max_margin"])
def test_every_rule_is_what_it_says(target: str, per: str, unaligned: str, rest: str) -> None:
    rng = np.random.default_rng(0)
    for compare, count in itertools.product(("bits_per_byte", "nats_per_token"), (2, 3, 4)):
        candidates = random_candidates(rng, count, 25)
        gold = rng.integers(0, 7, 25).astype(np.int32)
        options = {
            "target": target, "per": per, "compare": compare, "rest": rest, "unaligned": unaligned
        }  # fmt: skip
        weights = [1.0 + 2 * m for m in range(count - 1)]
        share = [2.0, *weights] if target == "weighted" else None
        found = fuse(candidates, gold, weights=share, **options)  # type: ignore[arg-type]
        expected = by_hand(candidates, gold.tolist(), options)
        same(
            found,
            [None if row is None else row[0] for row in expected],
            [0 if row is None else row[1] for row in expected],
        )
        assert found.ids.dtype == np.int32
        assert found.probs.dtype == found.rest.dtype == np.float32


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 4),
    positions=st.integers(0, 9),
    target=st.sampled_from(["min_ce", "avg_ce", "weighted"]),
    per=st.sampled_from(["sequence", "token"]),
    rest=st.sampled_from(RESTS),
    unaligned=st.sampled_from(UNALIGNED),
    include_pivot=st.booleans(),
)
def test_a_target_is_a_distribution_wherever_there_is_one(
    seed: int, count: int, positions: int, include_pivot: bool, **options: Any
) -> None:
    rng = np.random.default_rng(seed)
    candidates = random_candidates(rng, count, positions)
    gold = rng.integers(0, 7, positions).astype(np.int32)
    found = fuse(candidates, gold, include_pivot=include_pivot, **options)
    as_rows(found)
    total = found.probs.sum(axis=1) + found.rest
    np.testing.assert_allclose(total, found.used.astype(float), atol=1e-5)
    assert found.ids.shape == found.probs.shape
    assert found.ids.shape[0] == positions
    assert found.used.all() or options["unaligned"] == "skip"
    assert options["rest"] == "bucket" or not found.rest.any()


# -- by hand --------------------------------------------------------------------------------------

GOLD = np.array([5, 2], dtype=np.int32)


def test_rest_spreads_gives_or_keeps_the_missing_mass() -> None:
    source = candidate(
        distributions([{1: 0.3, 2: 0.3}, {1: 0.6, 2: 0.2}], tail=[0.3, 0.1], unmapped=0.1)
    )
    arguments: dict[str, Any] = {"target": "teacher", "include_pivot": False}
    spread = fuse([source], GOLD, rest="renormalize", **arguments)
    same(spread, [{1: 0.5, 2: 0.5}, {1: 0.75, 2: 0.25}])
    given_away = fuse([source], GOLD, rest="gold", **arguments)
    same(given_away, [{1: 0.3, 2: 0.3, 5: 0.4}, {1: 0.6, 2: 0.4}])
    kept = fuse([source], GOLD, rest="bucket", **arguments)
    same(kept, [{1: 0.3, 2: 0.3}, {1: 0.6, 2: 0.2}], [0.4, 0.2])
    assert spread.winner == given_away.winner == kept.winner == 1


def test_a_distribution_without_a_kept_entry() -> None:
    """All of it unmapped: nothing to renormalise; the gold token or the bucket take it all."""
    source = candidate(distributions([{}, {1: 1.0}], unmapped=[1, 0], origin=[Origin.SHARED] * 2))
    for rest, unaligned, expected, left in [
        ("renormalize", "gold", {5: 1.0}, 0),
        ("renormalize", "skip", None, 0),
        ("gold", "skip", {5: 1.0}, 0),
        ("bucket", "gold", {}, 1),
    ]:
        found = fuse(
            [source], GOLD, target="teacher", rest=rest, unaligned=unaligned, include_pivot=False  # type: ignore[arg-type]
        )  # fmt: skip
        same(found, [expected, {1: 1.0}], [left, 0])


def test_a_distribution_that_is_mostly_unmapped_is_not_spread_over_what_is_left() -> None:
    """0.3 mapped: the half that is unmapped says more; 0.5 is as much; the tail does not count."""
    found = distributions(
        [{1: 0.3}, {1: 0.4, 2: 0.1}, {3: 0.1}], tail=[0.2, 0.0, 0.85], unmapped=[0.5, 0.5, 0.05]
    )
    gold = np.array([5, 5, 5], dtype=np.int32)
    options: dict[str, Any] = {"target": "teacher", "include_pivot": False}
    kept = [{1: 0.8, 2: 0.2}, {3: 1.0}]
    for unaligned, instead in (("gold", {5: 1.0}), ("skip", None)):
        spread = fuse([candidate(found)], gold, unaligned=unaligned, **options)  # type: ignore[arg-type]
        same(spread, [instead, *kept])
    in_gold = fuse([candidate(found)], gold, rest="gold", **options)
    same(in_gold, [{1: 0.3, 5: 0.7}, {1: 0.4, 2: 0.1, 5: 0.5}, {3: 0.1, 5: 0.9}])
    assert fuse([candidate(found)], gold, rest="bucket", unaligned="skip", **options).used.all()


def test_the_winner_keeps_a_position_it_has_nothing_for() -> None:
    own = candidate(distributions([{1: 1.0}, {1: 1.0}]), bits=2.0)
    source = candidate(distributions([{}, {3: 1.0}]), bits=1.0)
    found = fuse([own, source], GOLD, target="min_ce")
    same(found, [{5: 1.0}, {3: 1.0}])
    same(fuse([own, source], GOLD, target="min_ce", unaligned="skip"), [None, {3: 1.0}])
    assert found.winner == 1


def test_a_mixture_goes_without_those_who_have_nothing_or_counts_their_gold() -> None:
    own = candidate(distributions([{1: 1.0}, {1: 1.0}]))
    source = candidate(distributions([{}, {3: 1.0}]))
    arguments: dict[str, Any] = {"target": "weighted", "weights": [1.0, 3.0]}
    found = fuse([own, source], GOLD, unaligned="skip", **arguments)
    same(found, [{1: 1.0}, {1: 0.25, 3: 0.75}])
    same(
        fuse([own, source], GOLD, unaligned="gold", **arguments),
        [{1: 0.25, 5: 0.75}, {1: 0.25, 3: 0.75}],
    )
    assert found.winner == -1


def test_the_lowest_cross_entropy_wins_and_of_equals_the_first() -> None:
    found = distributions([{1: 1.0}]), distributions([{2: 1.0}]), distributions([{3: 1.0}])
    gold = GOLD[:1]

    def winner(*bits: float, **options: Any) -> int:
        candidates = [
            candidate(d, b, 5 - b) for d, b in zip(found, bits, strict=False)
        ]  # fmt: skip
        result = fuse(candidates, gold, target="min_ce", **options)
        index = result.winner - (not options.get("include_pivot", True))
        assert as_rows(result) == [{index + 1: 1.0}]
        return result.winner

    assert winner(1.0, 2.0, 3.0) == 0
    assert winner(2.0, 1.0, 3.0) == 1
    assert winner(2.0, 1.0, 1.0) == 1
    assert winner(1.0, 1.0, 1.0) == 0
    assert winner(2.0, 1.0, 3.0, compare="nats_per_token") == 2
    assert winner(2.0, 1.0, include_pivot=False) == 2  # the sources count from 1
    assert winner(math.nan, 9.0) == 1  # an empty response wins nothing
    assert winner(math.nan, math.nan) == 0


def test_per_token_each_position_has_its_own_winner() -> None:
    own = candidate(distributions([{1: 1.0}] * 2), bits=0.0, token=[1.0, 3.0])
    source = candidate(distributions([{2: 1.0}] * 2), bits=9.0, token=[2.0, 2.0])
    found = fuse([own, source], GOLD, target="min_ce", per="token")
    same(found, [{1: 1.0}, {2: 1.0}])
    assert found.winner == -1
    source = candidate(distributions([{2: 1.0}] * 2), token=[0.5, 2.0])
    assert fuse([own, source], GOLD, target="min_ce", per="token").winner == 1


def test_average_weights_are_the_softmax_of_the_cross_entropies() -> None:
    """With ln 3 nats between them, 3 to 1."""
    own = candidate(distributions([{1: 1.0}]), bits=1.0, nats=2.0)
    bits = 1.0 + math.log2(3) / 4  # ln 3 nats on four bytes
    source = candidate(distributions([{2: 1.0}]), bits=bits, nats=2.0 + math.log(3))
    for compare in ("bits_per_byte", "nats_per_token"):
        found = fuse([own, source], GOLD[:1], target="avg_ce", compare=compare)  # type: ignore[arg-type]
        same(found, [{1: 0.75, 2: 0.25}])


def test_average_of_models_that_know_nothing_is_even() -> None:
    rows = [distributions([{m: 1.0}]) for m in range(2)]
    unknown = [candidate(d, math.nan, math.nan, [math.inf]) for d in rows]
    same(fuse(unknown, GOLD[:1], target="avg_ce"), [{0: 0.5, 1: 0.5}])
    same(fuse(unknown, GOLD[:1], target="avg_ce", per="token"), [{0: 0.5, 1: 0.5}])
    one = [unknown[0], candidate(rows[1], 3.0)]
    same(fuse(one, GOLD[:1], target="avg_ce"), [{1: 1.0}])


def test_weights_of_the_sources_give_the_pivot_their_mean() -> None:
    three = [candidate(distributions([{m: 1.0}])) for m in range(3)]
    gold = GOLD[:1]
    same(fuse(three, gold, target="weighted", weights=[1, 3]), [{0: 1 / 3, 1: 1 / 6, 2: 0.5}])
    same(fuse(three, gold, target="weighted", weights=[2, 1, 1]), [{0: 0.5, 1: 0.25, 2: 0.25}])
    same(fuse(three, gold, target="weighted"), [dict.fromkeys(range(3), 1 / 3)])
    same(
        fuse(three[1:], gold, target="weighted", weights=[1, 3], include_pivot=False),
        [{1: 0.25, 2: 0.75}],
    )
    same(fuse(three, gold, target="weighted", weights=[0, 0, 1]), [{2: 1.0}])
    with pytest.raises(RecipeError, match=r"weights \[1\.0, -1\.0, 1\.0\].*0 or more"):
        fuse(three, gold, target="weighted", weights=[1, -1, 1])
    with pytest.raises(RecipeError, match="at least one of them more than 0"):
        fuse(three, gold, target="weighted", weights=[0, 0])


def test_the_most_distinctive_source_wins_however_good_it_is() -> None:
    own = candidate(distributions([{1: 0.5, 2: 0.5}] * 2), bits=1.0)
    near = candidate(distributions([{1: 0.6, 2: 0.4}] * 2), bits=1.0)
    far = candidate(distributions([{1: 0.5, 3: 0.5}] * 2), bits=9.0)
    assert fuse([own, near, far], GOLD, target="max_margin").winner == 2
    assert fuse([own, far, near], GOLD, target="max_margin").winner == 1
    # What only looks different because it was not transferred does not count.
    gold = candidate(
        distributions([{5: 1.0}, {1: 0.5, 2: 0.5}], origin=[Origin.GOLD, Origin.ALIGNED])
    )
    nothing = candidate(distributions([{}, {}]))
    assert fuse([own, gold, near], GOLD, target="max_margin").winner == 2
    assert fuse([own, nothing, near], GOLD, target="max_margin").winner == 2
    assert fuse([own, near], GOLD, target="max_margin").winner == 1
    assert fuse([near], GOLD, target="max_margin", include_pivot=False).winner == 1
    with pytest.raises(RecipeError, match="include_pivot: true"):
        fuse([near, far], GOLD, target="max_margin", include_pivot=False)


def test_the_teacher_is_the_only_source() -> None:
    own = candidate(distributions([{1: 1.0}] * 2), bits=0.1)
    source = candidate(distributions([{2: 1.0}] * 2), bits=9.0)
    for candidates, include in (([own, source], True), ([source], False)):
        found = fuse(candidates, GOLD, target="teacher", include_pivot=include)
        same(found, [{2: 1.0}] * 2)
        assert found.winner == 1
    with pytest.raises(RecipeError, match="takes one source, not 2"):
        fuse([own, source, source], GOLD, target="teacher")


@pytest.mark.parametrize("target", ["min_ce", "avg_ce", "weighted", "teacher"])
def test_a_source_equal_to_the_pivot_gives_the_pivots_own_distributions(target: str) -> None:
    rng = np.random.default_rng(0)
    topk = random_topk(rng, 12, 4)
    own = own_distributions(topk)
    shared = SparseDistributions(
        own.ids, own.probs, own.tail, own.unmapped, np.full(12, Origin.SHARED, np.uint8)
    )
    gold = rng.integers(0, 9, 12).astype(np.int32)
    found = fuse([candidate(own), candidate(shared)], gold, target=target, rest="bucket")  # type: ignore[arg-type]
    expected = [
        dict(zip(ids, np.exp(lp), strict=True))
        for ids, lp in zip(topk.ids.tolist(), topk.log_probs.astype(float), strict=True)
    ]
    same(found, expected, topk.tail)  # type: ignore[arg-type]


def test_neither_the_inputs_nor_each_other_are_written_to() -> None:
    rng = np.random.default_rng(0)
    candidates = random_candidates(rng, 3, 9)
    before = [c.distributions.probs.copy() for c in candidates]
    gold = np.zeros(9, dtype=np.int32)
    for target, rest in itertools.product(("min_ce", "avg_ce", "max_margin"), RESTS):
        found = fuse(candidates, gold, target=target, rest=rest)  # type: ignore[arg-type]
        found.probs[:] = 9
        found.rest[:] = 9
    for c, probs in zip(candidates, before, strict=True):
        np.testing.assert_array_equal(c.distributions.probs, probs)


def test_a_conversation_without_response_tokens_has_empty_targets() -> None:
    empty = candidate(distributions([], width=3), math.nan, math.nan, [])
    for target in ("min_ce", "avg_ce", "weighted", "max_margin", "teacher"):
        for per in ("sequence", "token"):
            found = fuse([empty, empty], GOLD[:0], target=target, per=per)  # type: ignore[arg-type]
            assert len(found.ids) == len(found.used) == 0


def test_a_winner_per_token_needs_bits_per_token() -> None:
    pair = [candidate(distributions([{1: 1.0}]))] * 2
    with pytest.raises(ValueError, match="token_bits"):
        fuse(pair, GOLD[:1], target="min_ce", per="token")


# -- what models say, at the pivot's tokens -------------------------------------------------------


def random_topk(rng: np.random.Generator, positions: int, k: int) -> TopK:
    probs = -np.sort(-rng.dirichlet(np.ones(9), positions), axis=1)[:, :k]
    return TopK(
        ids=rng.permuted(np.tile(np.arange(9), (positions, 1)), axis=1)[:, :k].astype(np.int32),
        log_probs=np.log(probs).astype(np.float32),
        tail=(1 - probs.sum(axis=1)).astype(np.float32),
        gold=np.log(rng.random(positions) + 0.01).astype(np.float32),
    )


def record(spans: list[tuple[int, int]], bits: list[float]) -> Record:
    starts, ends = np.array(spans, dtype=np.int32).reshape(-1, 2).T
    topk = random_topk(np.random.default_rng(0), len(spans), 3)
    gold = np.array(bits, dtype=np.float32) * np.float32(-math.log(2))
    topk = TopK(topk.ids, topk.log_probs, topk.tail, gold)
    return Record(0, starts, starts, ends, topk, float(-gold.sum()))


def encoded(spans: list[tuple[int, int]]) -> Encoded:
    starts, ends = np.array(spans, dtype=np.int32).reshape(-1, 2).T
    return Encoded(starts, np.arange(len(spans), dtype=np.int32), starts, ends, 0)


@pytest.mark.parametrize(
    ("source", "bits", "pivot", "expected"),
    [
        # its own tokens: their bits over their bytes
        ([(0, 2), (2, 5)], [4, 3], [(0, 2), (2, 5)], [2, 1]),
        # inside a token: the same density; across two: the mean over bytes
        ([(0, 4), (4, 6)], [8, 1], [(0, 1), (1, 5), (5, 6)], [2, 6.5 / 4, 0.5]),
        # a gap (an end of turn that the source has no token for) counts for nobody
        ([(0, 2), (3, 5)], [2, 6], [(0, 3), (2, 3), (3, 5), (1, 4)], [1, math.inf, 3, 2]),
        # before its first byte and after its last
        ([(2, 4)], [4], [(0, 1), (1, 3), (3, 9)], [math.inf, 2, 2]),
        # a token of no bytes: its bits go to the next, the last one's to the one before
        ([(0, 0), (0, 2), (2, 2), (2, 4), (4, 4)], [1, 3, 2, 4, 6], [(0, 2), (2, 4)], [2, 6]),
        # one of the pivot has no bytes
        ([(0, 2)], [2], [(0, 0), (0, 2)], [math.inf, 1]),
        ([(1, 1)], [2], [(0, 1)], [math.inf]),
        ([], [], [(0, 1)], [math.inf]),
        ([(0, 1)], [2], [], []),
    ],
)
def test_bits_are_spread_over_bytes(
    source: list[Any], bits: list[float], pivot: list[Any], expected: list[float]
) -> None:
    found = token_bits(record(source, bits), encoded(pivot))
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


@given(st.data())
def test_bits_are_conserved(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 30))

    def spans() -> list[tuple[int, int]]:
        cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size)))})
        return list(itertools.pairwise(cuts))

    source, pivot = spans(), spans()
    bits = data.draw(st.lists(st.floats(0, 20), min_size=len(source), max_size=len(source)))
    found = token_bits(record(source, bits), encoded(pivot))
    lengths = [end - start for start, end in pivot]
    assert float(found @ lengths) == pytest.approx(sum(bits), rel=1e-4, abs=1e-4)


def test_own_distributions_are_the_stored_ones() -> None:
    topk = random_topk(np.random.default_rng(0), 5, 3)
    topk.ids[2, 1] = -1
    own = own_distributions(topk)
    expected = np.exp(topk.log_probs)
    expected[2, 1] = 0
    np.testing.assert_allclose(own.probs, expected)
    np.testing.assert_array_equal(own.tail, topk.tail)
    assert not own.unmapped.any()
    assert set(own.origin) == {Origin.OWN}


def test_ranks_are_taken_where_both_have_a_token_that_begins_there() -> None:
    source = record([(0, 0), (0, 2), (2, 5), (7, 8)], [1, 1, 1, 1])
    found = rank_targets(source, encoded([(0, 1), (1, 2), (2, 7), (7, 8), (8, 9)]))
    assert found.used.tolist() == [True, False, True, True, False]
    np.testing.assert_array_equal(found.ids[found.used], source.topk.ids[[1, 2, 3]])
    np.testing.assert_allclose(found.probs[found.used], np.exp(source.topk.log_probs[[1, 2, 3]]))
    assert (found.ids[~found.used] == -1).all()
    assert not found.probs[~found.used].any()
    assert found.winner == 1
    assert not rank_targets(record([], []), encoded([(0, 1)])).used.any()
