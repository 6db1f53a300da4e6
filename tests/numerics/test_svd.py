"""Thin decompositions and polar factors against NumPy's in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_unconstrained.numerics import svd
from mergekit_unconstrained.numerics.svd import polar_factor, thin_svd

SHAPES = [(7, 7), (40, 3), (3, 40), (1, 5), (5, 1), (1, 1), (60, 50)]


def random(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_those_of_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a = random(shape, dtype)
    U, S, V = thin_svd(a)
    theirs = np.linalg.svd(a.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(S.numpy(), theirs, rtol=1e-12 if dtype == torch.float64 else 1e-9)
    torch.testing.assert_close((U * S) @ V.T, a.double(), rtol=0, atol=1e-10)
    for Q in (U, V):
        torch.testing.assert_close(
            Q.T @ Q, torch.eye(len(S), dtype=torch.float64), atol=1e-8, rtol=0
        )


def test_the_sign_is_that_of_the_largest_entry_on_the_left() -> None:
    a = random((8, 5), torch.float32)
    for one in (a, -a, a.T.contiguous()):
        U = thin_svd(one).U
        assert bool((U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all())
    torch.testing.assert_close(thin_svd(a).U, thin_svd(-a).U)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)], ids=str)
def test_low_rank_has_few_factors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a = random((shape[0], 4), torch.float64) @ random((4, shape[1]), torch.float64, seed=1)
    found = thin_svd(a.to(dtype))
    assert len(found.S) == 4
    torch.testing.assert_close(found.product(), a.to(dtype).double(), rtol=0, atol=1e-5)
    assert len(found.top(2).S) == 2
    assert len(found.top(9).S) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 50), (50, 60), (7, 7)], ids=str)
def test_the_largest_alone_are_the_first_of_all(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = random(shape, dtype)
    everything = thin_svd(a)
    monkeypatch.setattr(svd, "BLOCK", 300)  # a few rows at a time
    for k in (0, 1, 4):
        for found, expected in zip(thin_svd(a, k), everything.top(k), strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert len(thin_svd(a, 99).S) == min(shape)


@pytest.mark.parametrize("shape", [(60, 50), (50, 60)], ids=str)
def test_float64_by_its_gram_matrix_is_as_good_where_values_are_not_small(
    shape: tuple[int, int],
) -> None:
    a = random(shape, torch.float64)
    for found, expected in zip(thin_svd(a, 9, by_gram=True), thin_svd(a, 9), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_does_not_matter(scale: float) -> None:
    a = random((12, 9), torch.float32)
    found, scaled = thin_svd(a), thin_svd(a * scale)
    torch.testing.assert_close(scaled.S / scale, found.S, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (3, 0)], ids=str)
def test_zeros_have_no_factors(shape: tuple[int, int]) -> None:
    U, S, V = thin_svd(torch.zeros(shape))
    assert (U.shape, S.shape, V.shape) == ((shape[0], 0), (0,), (shape[1], 0))


def test_the_polar_factor_is_the_nearest_isometry() -> None:
    a = random((20, 6), torch.float64)
    P, _, Qh = np.linalg.svd(a.numpy(), full_matrices=False)
    np.testing.assert_allclose(polar_factor(a).numpy(), P @ Qh, atol=1e-12)


def test_the_polar_factor_of_dependent_columns_forgets_their_null_space() -> None:
    half = random((20, 3), torch.float64)
    a = torch.cat([half, half], dim=1)
    W = polar_factor(a)
    root = (W.T @ a + a.T @ W) / 2
    torch.testing.assert_close(W @ root, a)  # A = W (A'A)^(1/2)
    torch.testing.assert_close(W[:, :3], W[:, 3:])
    null = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    assert float((W @ null).abs().max()) < 1e-12
    torch.testing.assert_close(W.T @ W @ W.T @ W, W.T @ W)  # a partial isometry


def test_the_polar_factor_of_nothing_is_nothing() -> None:
    assert polar_factor(torch.zeros(5, 0, dtype=torch.float64)).shape == (5, 0)
