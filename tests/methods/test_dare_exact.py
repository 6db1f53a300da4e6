"""`dare_exact`: survivors are d / (1 - p) exactly, dropped at the stated rate, seeded by name."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_unconstrained.methods import dare_exact as module

from mergekit.merge_methods import merge_tensors  # isort: skip

SHAPE = (200, 300)


def tensors(count: int, size: float = 0.01) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(SHAPE, generator=generator)
    return [base, *(base + size * torch.randn(SHAPE, generator=generator) for _ in range(count))]


def dare(given: list[torch.Tensor], name: str = "w", **parameters: Any) -> np.ndarray:
    """The merged delta in float64."""
    ids = [f"m{i}" for i in range(len(given))]
    result = merge_tensors(given, "dare_exact", ids=ids, base_index=0, name=name,
                           parameters=parameters, dtype=torch.float64)  # fmt: skip
    return (result - given[0].double()).numpy()


def survivors(given: list[torch.Tensor], p: float, seed: int = 0) -> list[np.ndarray]:
    """s_i by hand: who survives is read off a merge of the expert alone."""
    found = []
    for i in range(1, len(given)):
        alone = merge_tensors([given[0], given[i]], "dare_exact", ids=["m0", f"m{i}"], base_index=0,
                              name="w", parameters={"drop": p, "seed": seed})  # fmt: skip
        d = given[i].double().numpy() - given[0].double().numpy()
        found.append(np.where((alone != given[0]).numpy(), d / (1 - p), 0.0))
    return found


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_survivors_are_divided_by_one_minus_p_and_the_others_gone(p: float) -> None:
    given = tensors(1)
    d = (given[1].double() - given[0].double()).numpy()
    merged = dare(given, drop=p)
    kept = np.abs(merged) > 1e-9
    np.testing.assert_allclose(merged[kept], d[kept] / (1 - p), rtol=1e-4, atol=1e-6)
    n = d.size
    assert abs(kept.sum() - n * (1 - p)) < 5 * np.sqrt(n * p * (1 - p))
    # The mean is that of d: five standard errors of a mean of independent survivors.
    error = np.sqrt((d**2).sum() * p / (1 - p)) / n
    assert abs(merged.mean() - d.mean()) < 5 * error + 1e-7


def test_linear_adds_and_ties_elects_and_averages() -> None:
    given, weights = tensors(3), [0.5, 1.0, 2.0]
    s = survivors(given, 0.6)
    own = {"weight": {f"m{i + 1}": w for i, w in enumerate(weights)}}
    linear = dare(given, drop=0.6, **own)
    expected = sum(w * one for w, one in zip(weights, s, strict=True))
    np.testing.assert_allclose(linear, expected, atol=1e-6)
    ties = dare(given, drop=0.6, combine="ties", **own)
    rows = np.stack([one.ravel() for one in s])
    for j in range(0, rows.shape[1], 97):
        terms = [w * x for w, x in zip(weights, rows[:, j], strict=True)]
        sign = 1 if sum(terms) >= 0 else -1
        agreeing = [(t, w) for t, w in zip(terms, weights, strict=True) if np.sign(t) == sign]
        mean = sum(t for t, _ in agreeing) / sum(w for _, w in agreeing) if agreeing else 0
        assert abs(ties.ravel()[j] - mean) < 1e-6


def test_masks_hang_on_seed_tensor_and_model_alone() -> None:
    given = tensors(2)
    first = dare(given, drop=0.5)
    assert np.array_equal(first, dare(given, drop=0.5))
    assert not np.array_equal(first, dare(given, drop=0.5, seed=1))
    assert not np.array_equal(first, dare(given, name="v", drop=0.5))
    masks = [one != 0 for one in survivors(given, 0.5)]
    agreement = (masks[0] == masks[1]).mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(masks[0].size)  # independent of each other


@pytest.mark.parametrize(("p", "share"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("combine", ["linear", "ties"])
def test_the_ends_keep_everything_and_nothing(p: float, share: float, combine: str) -> None:
    given = tensors(1)
    d = (given[1].double() - given[0].double()).numpy()
    np.testing.assert_allclose(dare(given, drop=p, combine=combine), share * d, atol=1e-6)


def test_large_task_vectors_are_warned_about_once_a_model(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_warned", set())
    with caplog.at_level(logging.WARNING):
        dare(tensors(2, size=0.03))  # mean |d| = 0.024
        dare(tensors(2, size=0.05), drop=0.0)  # nothing is dropped
        assert not caplog.records
        dare(tensors(2, size=0.05))
        dare(tensors(2, size=0.05))
    assert [r.getMessage().split(" of ")[1].split()[0] for r in caplog.records] == ["m1", "m2"]
    assert "above 0.03" in caplog.text
