"""What scores of examples let one say: means with their errors, differences with their intervals.

Two models are compared on the same examples (paired), so that what makes an example hard for both
cancels.

B. Efron, R. Tibshirani: An Introduction to the Bootstrap (1993), section 13.3 (percentiles).
S. Holm: A simple sequentially rejective multiple test procedure (1979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

_AT_ONCE = 1 << 22
"""Numbers drawn at a time."""


class Mean(NamedTuple):
    """mean, its standard error (0 for one example), and over how many."""

    mean: float
    error: float
    n: int


class Interval(NamedTuple):
    """A mean difference and the interval that holds it with the chosen confidence."""

    difference: float
    low: float
    high: float


class Synergy(NamedTuple):
    """Ids of examples: solved by the merge and by no parent; lost though a parent solved it."""

    gained: tuple[str, ...]
    lost: tuple[str, ...]


def mean_and_error(values: Sequence[float]) -> Mean:
    """Mean and sample standard deviation / sqrt n; NaN for no values."""
    n = len(values)
    if n == 0:
        return Mean(math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Mean(mean, math.sqrt(squares / max(n - 1, 1) / n), n)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of first - second, and the percentile interval over examples drawn anew.

    first, second: values of two models on the same examples, in one order.
    """
    difference = _differences(first, second)
    n = len(difference)
    generator = np.random.default_rng(seed)
    means = []
    step = max(1, _AT_ONCE // n)
    for start in range(0, resamples, step):
        drawn = generator.integers(n, size=(min(step, resamples - start), n))
        means.append(difference[drawn].mean(axis=1))
    outside = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [outside, 1 - outside])
    return Interval(float(difference.mean()), float(low), float(high))


def paired_error(first: Sequence[float], second: Sequence[float]) -> float:
    """Standard error of the mean difference of two models' values on the same examples."""
    return mean_and_error(_differences(first, second).tolist()).error


def paired_p(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of no difference: how often signs at random give as large a mean.

    (1 + so many) / (1 + resamples), which is never 0.
    """
    difference = _differences(first, second)
    n = len(difference)
    generator = np.random.default_rng(seed)
    seen = abs(difference.sum())
    as_large = 0
    step = max(1, _AT_ONCE // n)
    for start in range(0, resamples, step):
        signs = generator.integers(2, size=(min(step, resamples - start), n)) * 2 - 1
        # sums in another order differ in their last digits
        as_large += int((np.abs(signs @ difference) >= seen * (1 - 1e-12)).sum())
    return (1 + as_large) / (1 + resamples)


def adjusted(p_values: Sequence[float], by: Literal["holm", "none"] = "holm") -> list[float]:
    """p-values of several comparisons made at once, in their order."""
    if by == "none":
        return list(p_values)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found = [1.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        found[i] = largest
    return found


def synergy(
    merge: Mapping[str, float], parents: Sequence[Mapping[str, float]], solved_at: float
) -> Synergy:
    """Which examples a merge gained over all of its parents, and which it lost.

    merge, parents: value of every example by its id, the same ids in all of them.
    """
    for parent in parents:
        if parent.keys() != merge.keys():
            raise ValueError("merge and parents must be scored on the same examples")
    by_parent = {id for parent in parents for id, value in parent.items() if value >= solved_at}
    by_merge = {id for id, value in merge.items() if value >= solved_at}
    return Synergy(
        tuple(id for id in merge if id in by_merge - by_parent),
        tuple(id for id in merge if id in by_parent - by_merge),
    )


def _differences(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are not of the same examples")
    if len(first) == 0:  # an array has no truth
        raise ValueError("there are no examples to compare on")
    return np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
