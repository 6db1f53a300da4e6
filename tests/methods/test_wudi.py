"""`wudi` against the authors' loss, term by term, and Adam by hand; cases in closed form."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from adam_reference import adam, orthonormal, slope, stacked, vectors

from mergekit_unconstrained.methods.wudi import interference

from mergekit.merge_methods import merge_tensors  # isort: skip

NAME = "model.layers.0.mlp.down_proj.weight"


def loss(m: np.ndarray, d: list[np.ndarray]) -> float:
    """Every row of m - d_i against every row of d_i."""
    total = 0.0
    for d_i in d:
        size = sum(x * x for x in d_i.flat)
        if size:
            for row in m - d_i:
                total += sum(float(np.dot(row, other)) ** 2 for other in d_i) / size
    return total


def descended(d: list[np.ndarray], steps: int, rate: float) -> np.ndarray:
    """m after Adam on the loss, its gradient one expert at a time."""

    def gradient(m: np.ndarray) -> np.ndarray:
        terms = [2 * ((m - d_i) @ d_i.T @ d_i) / (d_i**2).sum() for d_i in d if d_i.any()]
        return np.sum(terms, axis=0)

    return adam(np.sum(d, axis=0), gradient, steps, rate)


def merge(d: torch.Tensor, name: str = NAME, **parameters: Any) -> torch.Tensor:
    tensors = [torch.zeros_like(d[0]), *d]
    return merge_tensors(tensors, "wudi", base_index=0, name=name, parameters=parameters)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_loss_and_its_gradient(count: int, shape: tuple[int, int]) -> None:
    *d, m = vectors(count + 1, *shape, size=1.0)
    value, gradient = interference(stacked(d))(torch.from_numpy(m))
    assert value == pytest.approx(loss(m, d), rel=1e-10)
    numeric = slope(lambda x: loss(x, d), m)
    np.testing.assert_allclose(gradient.numpy(), numeric, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
@pytest.mark.parametrize("count", [2, 5])
def test_it_is_adam_on_the_loss(count: int, shape: tuple[int, int]) -> None:
    d = vectors(count, *shape)
    expected = descended(d, 50, 1e-3)
    np.testing.assert_allclose(merge(stacked(d), steps=50, learning_rate=1e-3), expected, atol=1e-9)
    single = merge(stacked(d, torch.float32), steps=50, learning_rate=1e-3)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected, atol=2e-5)


def test_the_defaults_are_the_authors() -> None:
    d = vectors(2, 6, 6, size=1e-2)
    np.testing.assert_allclose(merge(stacked(d)), descended(d, 300, 1e-5), atol=1e-10)


def test_the_loss_falls() -> None:
    d = vectors(3, 8, 8)
    merged = [merge(stacked(d), steps=steps, learning_rate=1e-3).numpy() for steps in (0, 20, 200)]
    first, later, last = (loss(m, d) for m in merged)
    assert last < later < first
    np.testing.assert_allclose(merged[0], sum(d), atol=1e-12)


def test_one_expert_is_itself() -> None:
    d = stacked(vectors(1, 8, 8), torch.float32)
    assert torch.equal(merge(d), d[0])


def test_experts_of_orthogonal_inputs_are_added() -> None:
    """(m - d_i) d_i' = sum over the others of d_j d_i' = 0: the start is the optimum."""
    rows = orthonormal(12, 9, 0).T
    mix = np.random.default_rng(1)
    d = [mix.normal(size=(7, 3)) @ rows[3 * i : 3 * i + 3] for i in range(3)]
    np.testing.assert_allclose(merge(stacked(d), learning_rate=0.1), sum(d), atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_frozen_expert_and_any_scale_are_survived(scale: float) -> None:
    d = vectors(2, 6, 8)
    still = [*d, np.zeros_like(d[0])]
    np.testing.assert_allclose(
        merge(stacked(still), learning_rate=1e-3), merge(stacked(d), learning_rate=1e-3), atol=1e-12
    )
    assert bool(merge(stacked(d, torch.float32) * scale).isfinite().all())


def test_weight_comes_first() -> None:
    d = stacked(vectors(2, 6, 6))
    weighted = merge(d, weight=[2.0, -0.5], steps=10)
    torch.testing.assert_close(weighted, merge(torch.stack([2 * d[0], -0.5 * d[1]]), steps=10))


@pytest.mark.parametrize(
    ("rate", "size", "remedy"), [(1.0, 1e-3, "below 1"), (1e-9, 10.0, "above 1e-09")]
)
def test_a_learning_rate_that_does_not_help_is_told_early(
    rate: float, size: float, remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    d = stacked(vectors(2, 6, 6, size=size), torch.float32)
    with caplog.at_level(logging.WARNING):
        merge(d, learning_rate=rate, steps=20)
    (message,) = caplog.messages
    assert message.startswith(f"{NAME}: the loss has not fallen")
    assert "after 2 steps" in message
    assert message.endswith(f"learning_rate {remedy}")


def test_a_learning_rate_that_helps_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        merge(stacked(vectors(2, 6, 6), torch.float32), steps=20)
        merge(stacked(vectors(1, 6, 6), torch.float32), steps=20)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
def test_what_is_no_matrix_of_a_layer_is_averaged(name: str) -> None:
    d = stacked(vectors(3, 5, 4))
    tensors = [torch.zeros_like(d[0]), *d]
    found = merge_tensors(tensors, "wudi", base_index=0, name=name, parameters={"lambda": 2.0})
    torch.testing.assert_close(found, 2 * d.mean(dim=0))
    found = merge(d, name=name, weight=[1.0, 0.0, 3.0])
    torch.testing.assert_close(found, (d[0] + 3 * d[2]) / 3)
