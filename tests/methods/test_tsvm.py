"""`tsvm` against the authors' procedure in NumPy, and cases that are known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adam_reference import orthonormal, stacked, truncated, vectors

from mergekit_unconstrained.methods.tsvm import ranks_by_energy, tsvm_vector, without_outliers
from mergekit_unconstrained.numerics.svd import thin_svd

from mergekit.merge_methods import merge_tensors  # isort: skip

NAME = "model.layers.0.mlp.up_proj.weight"


def published(d: list[np.ndarray], k: int) -> np.ndarray:
    """TSV-M as its authors run it: both concatenations decomposed anew."""
    parts = [np.linalg.svd(d_i, full_matrices=False) for d_i in d]
    U = np.concatenate([u[:, :k] for u, _, _ in parts], axis=1)
    Vh = np.concatenate([vh[:k] for _, _, vh in parts], axis=0)
    middle = np.diag(np.concatenate([s[:k] for _, s, _ in parts]))
    P_u, _, Q_u = np.linalg.svd(U, full_matrices=False)
    P_v, _, Q_v = np.linalg.svd(Vh, full_matrices=False)
    return P_u @ Q_u @ middle @ P_v @ Q_v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_it_is_the_authors_procedure(
    count: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    d = vectors(count, *shape)
    found = tsvm_vector(stacked(d, dtype), None)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    expected = published([d_i.astype("f4").astype("f8") for d_i in d] if dtype == torch.float32
                         else d, max(1, min(shape) // count))  # fmt: skip
    np.testing.assert_allclose(found.double().numpy(), expected, atol=tolerance)


@pytest.mark.parametrize(("fraction", "k"), [(0.25, 3), (0.5, 6), (1.0, 12), (0.01, 1)])
def test_the_rank_is_a_fraction_of_the_smaller_side(fraction: float, k: int) -> None:
    d = vectors(1, 12, 20)
    found = tsvm_vector(stacked(d), fraction)
    np.testing.assert_allclose(found.numpy(), truncated(d[0], k), atol=1e-12)


def test_one_expert_is_itself() -> None:
    d = stacked(vectors(1, 8, 5))
    torch.testing.assert_close(tsvm_vector(d, None), d[0])


def test_experts_that_do_not_touch_are_added() -> None:
    """Orthogonal inputs and outputs, ranks within k: nothing interferes."""
    left, right = orthonormal(20, 9, 0), orthonormal(15, 9, 1)
    parts = [slice(0, 3), slice(3, 6), slice(6, 9)]
    d = [
        (1 + i) * left[:, p] @ np.diag([3.0, 2.0, 1.0]) @ right[:, p].T for i, p in enumerate(parts)
    ]
    np.testing.assert_allclose(tsvm_vector(stacked(d), None).numpy(), sum(d), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3])
def test_equal_experts_give_the_best_approximation_of_one(count: int, dtype: torch.dtype) -> None:
    (one,) = vectors(1, 12, 18)
    found = tsvm_vector(stacked([one] * count, dtype), None).double().numpy()
    np.testing.assert_allclose(found, truncated(one, 12 // count), atol=1e-6)


def test_low_rank_experts_are_merged_in_their_own_directions() -> None:
    """Two experts of rank 1: closed form, with the angle between their directions."""
    rng = np.random.default_rng(0)
    u, v = (rng.normal(size=(2, 16)) for _ in range(2))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    v /= np.linalg.norm(v, axis=1, keepdims=True)

    def symmetric(pair: np.ndarray) -> np.ndarray:
        """Both vectors turned away from each other by the same angle until they are orthogonal."""
        plus, minus = pair[0] + pair[1], pair[0] - pair[1]
        plus, minus = plus / np.linalg.norm(plus), minus / np.linalg.norm(minus)
        return np.stack([plus + minus, plus - minus]) / np.sqrt(2)

    a, b = symmetric(u), symmetric(v)
    expected = 2 * np.outer(a[0], b[0]) + 5 * np.outer(a[1], b[1])
    d = [2 * np.outer(u[0], v[0]), 5 * np.outer(u[1], v[1])]
    np.testing.assert_allclose(tsvm_vector(stacked(d), None).numpy(), expected, atol=1e-10)


def test_rotations_and_scales_go_through() -> None:
    d = vectors(3, 12, 12)
    left, right = orthonormal(12, 12, 0), orthonormal(12, 12, 1)
    turned = tsvm_vector(stacked([2 * left @ d_i @ right for d_i in d]), None).numpy()
    once = tsvm_vector(stacked(d), None).numpy()
    np.testing.assert_allclose(turned, 2 * left @ once @ right, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"]
)
def test_what_is_no_matrix_of_a_layer_is_averaged(name: str) -> None:
    shape = (16,) if "norm" in name else (8, 16)
    d = stacked(vectors(3, *shape), torch.float32)
    parameters = {"weight": [1.0, 0.5, 2.0], "lambda": 0.7}
    found = merge_tensors(
        [torch.ones(shape), *(d + 1)], "tsvm", base_index=0, name=name, parameters=parameters
    )
    torch.testing.assert_close(found, 1 + 0.7 * (d[0] + 0.5 * d[1] + 2 * d[2]) / 3)


def test_weight_comes_first() -> None:
    d = stacked(vectors(2, 8, 8), torch.float32)

    def merge(d: torch.Tensor, **parameters: Any) -> torch.Tensor:
        tensors = [torch.zeros(8, 8), *d]
        return merge_tensors(tensors, "tsvm", base_index=0, name=NAME, parameters=parameters)

    weighted = merge(d, weight=[2.0, -0.5])
    torch.testing.assert_close(weighted, merge(torch.stack([2 * d[0], -0.5 * d[1]])))


def test_reweighting_cuts_outliers_off_and_shares_ranks_by_need() -> None:
    flat = torch.ones(10, 10)
    flat[0, 0] = -1000
    cut = without_outliers(flat)
    rms = float(flat.square().mean().sqrt())
    assert float(cut[0, 0]) == pytest.approx(-3 * rms)
    assert torch.equal(cut.flatten()[1:], flat.flatten()[1:])
    narrow = thin_svd(torch.diag(torch.tensor([1.0, 0.1, 0.1, 0.1])))  # 97 % in one direction
    wide = thin_svd(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0])))  # needs all four
    assert ranks_by_energy([narrow, wide], 2) == [1, 3]
    assert ranks_by_energy([wide, wide], 2) == [2, 2]
    d = stacked(vectors(2, 8, 8))
    d[0, 3, 4] = 20
    assert not torch.allclose(tsvm_vector(d, None), tsvm_vector(d, None, reweight=True))
