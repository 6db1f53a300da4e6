"""`optmerge` against the authors' procedure in NumPy, its exact solver against the conditions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adam_reference import adam, slope, stacked, truncated, vectors

from mergekit_unconstrained.methods.optmerge import denoised_interference

from mergekit.merge_methods import merge_tensors  # isort: skip

NAME = "model.layers.0.self_attn.q_proj.weight"


def terms(d: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """h_i, the rows S V' of svd(d_i) with all but the first k set to zero, and the squared norm."""
    k = min(d[0].shape) // len(d)
    mean = np.mean(d, axis=0)
    out = []
    for d_i in d:
        _, S, Vh = np.linalg.svd(d_i, full_matrices=False)
        S[k:] = 0
        out.append((mean + truncated(d_i - mean, k), np.diag(S) @ Vh, float((d_i**2).sum())))
    return out


def loss(m: np.ndarray, d: list[np.ndarray]) -> float:
    return sum(float((((m - h) @ L.T) ** 2).sum()) / size for h, L, size in terms(d) if size)


def descended(d: list[np.ndarray], steps: int, rate: float) -> np.ndarray:
    parts = terms(d)

    def gradient(m: np.ndarray) -> np.ndarray:
        return sum(2 * ((m - h) @ L.T) @ L / size for h, L, size in parts if size)

    return adam(np.sum(d, axis=0), gradient, steps, rate)


def merge(d: torch.Tensor, name: str = NAME, **parameters: Any) -> torch.Tensor:
    tensors = [torch.zeros_like(d[0]), *d]
    parameters = {"lambda": 1.0, **parameters}
    return merge_tensors(tensors, "optmerge", base_index=0, name=name, parameters=parameters)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_loss_and_its_gradient(count: int, shape: tuple[int, int]) -> None:
    *d, m = vectors(count + 1, *shape, size=1.0)
    value, gradient = denoised_interference(stacked(d))(torch.from_numpy(m))
    assert value == pytest.approx(loss(m, d), rel=1e-9)
    numeric = slope(lambda x: loss(x, d), m)
    np.testing.assert_allclose(gradient.numpy(), numeric, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
@pytest.mark.parametrize("count", [2, 4])
def test_it_is_adam_on_the_loss(count: int, shape: tuple[int, int]) -> None:
    d = vectors(count, *shape)
    expected = descended(d, 50, 1e-3)
    np.testing.assert_allclose(merge(stacked(d), steps=50, learning_rate=1e-3), expected, atol=1e-9)
    single = merge(stacked(d, torch.float32), steps=50, learning_rate=1e-3)
    np.testing.assert_allclose(single, expected, atol=5e-5)


def test_the_defaults_are_the_authors() -> None:
    d = vectors(2, 6, 6, size=1e-2)
    tensors = [torch.zeros(6, 6, dtype=torch.float64), *stacked(d)]
    found = merge_tensors(tensors, "optmerge", base_index=0, name=NAME)
    np.testing.assert_allclose(found, 0.1 * descended(d, 300, 1e-5), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_the_exact_solution_is_a_minimiser_and_the_nearest(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    d = vectors(3, *shape)
    m = merge(stacked(d, dtype), solver="exact").double().numpy()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(slope(lambda x: loss(x, d), m), 0, atol=tolerance)
    # Nearest: the way from the start lies in the inputs that the experts speak of.
    spoken = np.concatenate([L[: min(shape) // 3] for _, L, _ in terms(d)])
    way = m - sum(d)
    outside = way - way @ np.linalg.pinv(spoken) @ spoken
    np.testing.assert_allclose(outside, 0, atol=tolerance)
    adams = merge(stacked(d), steps=300, learning_rate=1e-3).numpy()
    assert loss(m, d) < loss(adams, d) < loss(sum(d), d)


def test_one_expert_is_itself() -> None:
    d = stacked(vectors(1, 8, 8), torch.float32)
    for solver in ("adam", "exact"):
        torch.testing.assert_close(merge(d, solver=solver), d[0])


def test_more_experts_than_rows_leave_their_sum() -> None:
    """k = 0: there is nothing to descend on, as in the authors' code."""
    d = stacked(vectors(5, 3, 4))
    for solver in ("adam", "exact"):
        torch.testing.assert_close(merge(d, solver=solver), d.sum(dim=0))


def test_a_frozen_expert_counts_in_the_mean_and_in_k_alone() -> None:
    d = [*vectors(2, 9, 9), np.zeros((9, 9))]
    expected = descended(d, 20, 1e-3)
    np.testing.assert_allclose(merge(stacked(d), steps=20, learning_rate=1e-3), expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(128, 128), (344, 128), (128, 344)], ids=str)
def test_rounding_is_no_slope_to_go_down(shape: tuple[int, int]) -> None:
    """The sum is the optimum when one expert alone has changed; Adam would walk 3e-3 from it."""
    d = 3e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    merged = merge(torch.stack([d, torch.zeros_like(d)]))
    assert torch.equal(merged, d)


def test_weight_comes_first() -> None:
    d = stacked(vectors(2, 6, 6))
    weighted = merge(d, weight=[2.0, -0.5], steps=10)
    torch.testing.assert_close(weighted, merge(torch.stack([2 * d[0], -0.5 * d[1]]), steps=10))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
    ],
)
def test_what_is_no_matrix_of_a_layer_stays_at_the_base(name: str) -> None:
    d = stacked(vectors(3, 5, 4))
    assert not bool(merge(d, name).any())
    assert bool(merge(d).any())
