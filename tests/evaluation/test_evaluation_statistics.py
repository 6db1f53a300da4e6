"""Means, intervals and p-values, against scipy, statsmodels' numbers and closed forms."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from mergekit_unconstrained.evaluation.statistics import (
    adjusted,
    mean_and_error,
    paired_bootstrap,
    paired_p,
    synergy,
)


def test_mean_and_error_are_the_libraries():
    values = [0.1, 0.7, 0.4, 0.95, 0.3]
    found = mean_and_error(values)
    assert found.mean == pytest.approx(statistics.fmean(values), rel=1e-14)
    assert found.error == pytest.approx(statistics.stdev(values) / math.sqrt(5), rel=1e-14)
    assert mean_and_error([0.5]) == (0.5, 0.0, 1)
    assert math.isnan(mean_and_error([]).mean)


def test_the_error_of_right_and_wrong_is_the_binomial_one():
    found = mean_and_error([1.0] * 30 + [0.0] * 70)
    assert found.error == pytest.approx(math.sqrt(0.3 * 0.7 / 99), rel=1e-12)


def test_the_interval_is_scipys():
    scipy_stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    first, second = generator.random(80), generator.random(80) * 0.8
    found = paired_bootstrap(first, second, resamples=20_000, confidence=0.9)
    right = scipy_stats.bootstrap(
        (first - second,),
        np.mean,
        n_resamples=20_000,
        confidence_level=0.9,
        method="percentile",
        random_state=np.random.default_rng(2),
    ).confidence_interval
    assert found.difference == pytest.approx(float((first - second).mean()), rel=1e-12)
    # two draws of 20,000 differ by about a hundredth of the interval's width
    width = right.high - right.low
    assert abs(found.low - right.low) < 0.03 * width
    assert abs(found.high - right.high) < 0.03 * width


def test_the_interval_is_the_normal_one_for_many_examples():
    generator = np.random.default_rng(3)
    difference = generator.normal(0.1, 1.0, 2000)
    found = paired_bootstrap(difference, np.zeros(2000), resamples=4000)
    half = 1.959964 * difference.std() / math.sqrt(2000)
    assert found.low == pytest.approx(difference.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.05 * half)


def test_the_interval_is_paired_and_seeded(monkeypatch):
    shared = np.random.default_rng(4).random(50) * 100
    assert paired_bootstrap(shared + 1, shared) == pytest.approx((1.0, 1.0, 1.0))
    noisy = shared + np.random.default_rng(5).random(50)
    assert paired_bootstrap(noisy, shared) == paired_bootstrap(noisy, shared)
    assert paired_bootstrap(noisy, shared) != paired_bootstrap(noisy, shared, seed=1)
    # drawn in pieces, as many examples are
    monkeypatch.setattr("mergekit_unconstrained.evaluation.statistics._AT_ONCE", 1000)
    low, high = paired_bootstrap(noisy, shared)[1:]
    assert low < (noisy - shared).mean() < high


def test_the_p_value_is_the_share_of_sign_patterns():
    first, second = [3.0, 1.0, 2.5, -0.5, 4.0, 1.0], [0.0] * 6
    patterns = itertools.product((-1, 1), repeat=6)
    as_large = sum(abs(sum(s * d for s, d in zip(p, first, strict=True))) >= 11 for p in patterns)
    assert paired_p(first, second, resamples=40_000) == pytest.approx(as_large / 64, abs=0.005)
    assert paired_p([1.0] * 4, [1.0] * 4) == 1.0
    assert paired_p(range(100), [-1] * 100, resamples=999) == 0.001


def test_holm_is_the_textbooks():
    # Holm (1979) by hand: 4 x .005, 3 x .01, 2 x .03, 1 x .04 raised to the one before
    assert adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted([0.6, 0.7]) == [1.0, 1.0]
    assert adjusted([0.01, 0.04], by="none") == [0.01, 0.04]
    assert adjusted([]) == []


def test_synergy_is_what_no_parent_solved():
    merge = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0, "e": 0.5}
    first = {"a": 0.0, "b": 1.0, "c": 1.0, "d": 0.0, "e": 0.0}
    second = {"a": 0.5, "b": 0.0, "c": 1.0, "d": 0.0, "e": 1.0}
    assert synergy(merge, [first, second], 1.0) == (("a",), ("c", "e"))
    assert synergy(merge, [first, second], 0.5) == ((), ("c",))
    assert synergy(merge, [], 1.0) == (("a", "b"), ())


def test_values_of_different_examples_are_refused():
    with pytest.raises(ValueError, match="not of the same examples"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no examples"):
        paired_bootstrap([], [])
    with pytest.raises(ValueError, match="same examples"):
        synergy({"a": 1.0}, [{"b": 1.0}], 1.0)
