"""Which entries are kept, and what makes up for the others."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from exact_reference import bottom, top
from hypothesis import given
from hypothesis import strategies as st

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.numerics import masks, sparsify

KEY = {"seed": 0, "tensor": "w", "model": "m"}
SHAPES = [(1,), (17,), (7, 9), (3, 4, 5)]


def tied(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Magnitudes with many equal ones, zeros among them."""
    return torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(seed)) / 8


def fractions(tensor: torch.Tensor) -> list[Fraction]:
    return [Fraction(x) for x in tensor.reshape(-1).tolist()]


# -- magnitude ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.1, 0.34, 0.5, 0.999, 1.0])
def test_trim_keeps_the_largest(shape: tuple[int, ...], density: float) -> None:
    magnitudes = tied(shape)
    n = magnitudes.numel()
    k = n if density == 1 else 0 if density == 0 else max(1, math.floor(density * n))
    mask = sparsify.magnitude_mask(magnitudes, density)
    assert mask.shape == magnitudes.shape
    assert set(mask.reshape(-1).nonzero().reshape(-1).tolist()) == top(fractions(magnitudes), k)


@given(st.integers(1, 400), st.floats(0, 1))
def test_trim_keeps_the_stated_number(n: int, density: float) -> None:
    kept = int(sparsify.magnitude_mask(torch.arange(n).float(), density).sum())
    assert kept == (0 if density <= 0 else max(1, math.floor(density * n)))


# -- outliers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.2, 0.5, 1.0])
def test_breadcrumbs_keep_the_window_below_the_outliers(
    shape: tuple[int, ...], density: float, gamma: float
) -> None:
    magnitudes = tied(shape)
    n = magnitudes.numel()
    mask = sparsify.outlier_mask(magnitudes, density, gamma)
    assert mask.shape == magnitudes.shape
    kept = set(mask.reshape(-1).nonzero().reshape(-1).tolist())
    if density == 1:
        assert kept == set(range(n))
        return
    keep = math.floor(density * n)
    low = max(0, n - keep - math.floor(gamma * n))
    values = fractions(magnitudes)
    assert kept == bottom(values, low + keep) - bottom(values, low)
    assert len(kept) == keep


def test_breadcrumbs_drop_the_largest_first() -> None:
    mask = sparsify.outlier_mask(torch.arange(10.0), density=0.5, gamma=0.2)
    assert mask.nonzero().reshape(-1).tolist() == [3, 4, 5, 6, 7]


def test_without_outliers_breadcrumbs_are_the_trim_step() -> None:
    magnitudes = torch.randn(500, generator=torch.Generator().manual_seed(0)).abs()
    expected = sparsify.magnitude_mask(magnitudes, 0.3)
    assert torch.equal(sparsify.outlier_mask(magnitudes, 0.3, gamma=0.0), expected)


# -- random ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_the_fraction_it_is_told(density: float) -> None:
    shape = torch.Size([400, 500])
    kept = float(sparsify.random_mask(shape, density, **KEY).double().mean())
    assert abs(kept - density) < 5 * math.sqrt(density * (1 - density) / shape.numel())


def test_dare_at_the_ends() -> None:
    assert not sparsify.random_mask(torch.Size([64]), 0.0, **KEY).any()
    assert sparsify.random_mask(torch.Size([64]), 1.0, **KEY).all()


def test_a_higher_density_keeps_what_a_lower_one_keeps() -> None:
    lower = sparsify.random_mask(torch.Size([1000]), 0.3, **KEY)
    higher = sparsify.random_mask(torch.Size([1000]), 0.4, **KEY)
    assert bool((higher | ~lower).all())


# -- by rank --------------------------------------------------------------------------------------


def keeping_probability(magnitudes: torch.Tensor, density: float, epsilon: float) -> np.ndarray:
    """(density - epsilon) + 2 epsilon rank / (m - 1), ranks of axis 1 counted one by one."""
    array = magnitudes.double().numpy()
    result = np.empty(array.shape)
    for place in np.ndindex(array.shape):
        axis = 1 if array.ndim > 1 else 0
        line = [array[(*place[:axis], j, *place[axis + 1 :])] for j in range(array.shape[axis])]
        mine = (line[place[axis]], place[axis])
        rank = sum((value, j) < mine for j, value in enumerate(line))
        result[place] = density - epsilon + 2 * epsilon * rank / max(len(line) - 1, 1)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.29), (0.7, 0.0)])
def test_magprune_keeps_by_rank(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    density: float,
    epsilon: float,
    dtype: torch.dtype,
) -> None:
    """With every lane at u the mask says exactly where the keeping probability exceeds u."""
    magnitudes = tied(shape).to(dtype)
    expected = keeping_probability(magnitudes, density, epsilon)
    monkeypatch.setattr(sparsify, "_BLOCK", 8)  # several blocks of rows
    for u in (0.0, 0.1237, 0.3503, 0.4507, 0.5502, 0.6101, 0.8003, 0.9999):
        lane = np.uint32(u * 2**32)
        monkeypatch.setattr(
            masks, "uniform_lanes", lambda shape, lane=lane, **_: np.full(shape, lane)
        )
        mask = sparsify.magprune_mask(magnitudes, density, epsilon, **KEY)
        assert mask.shape == magnitudes.shape
        assert np.array_equal(mask.numpy(), expected > u)


def test_magprune_probabilities_average_to_the_density() -> None:
    magnitudes = torch.rand(300, 700, generator=torch.Generator().manual_seed(0))
    mask = sparsify.magprune_mask(magnitudes, 0.4, 0.2, **KEY)
    bound = 5 * math.sqrt(0.25 / magnitudes.numel())
    assert abs(float(mask.double().mean()) - 0.4) < bound


def test_magprune_uses_the_lane_of_the_entry_whatever_the_rank() -> None:
    """epsilon 0 makes the rank irrelevant."""
    magnitudes = torch.rand(6, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = masks.uniform_lanes(magnitudes.shape, **KEY) < 2**31
    assert np.array_equal(sparsify.magprune_mask(magnitudes, 0.5, 0.0, **KEY).numpy(), expected)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    magnitudes = torch.rand(37, 11, generator=torch.Generator().manual_seed(0))
    whole = sparsify.magprune_mask(magnitudes, 0.5, 0.2, **KEY)
    for block in (1, 11, 12, 40, 400):
        monkeypatch.setattr(sparsify, "_BLOCK", block)
        assert torch.equal(sparsify.magprune_mask(magnitudes, 0.5, 0.2, **KEY), whole)


def test_magprune_at_the_ends() -> None:
    magnitudes = tied((4, 5))
    assert sparsify.magprune_mask(magnitudes, 1.0, 0.15, **KEY).all()
    assert not sparsify.magprune_mask(magnitudes, 0.0, 0.15, **KEY).any()


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.1, 0.15), (0.9, 0.1), (0.95, 0.2)])
def test_magprune_refuses_probabilities_outside_zero_and_one(
    density: float, epsilon: float
) -> None:
    with pytest.raises(RecipeError, match=r"density - epsilon > 0 .* choose a smaller epsilon"):
        sparsify.magprune_mask(tied((4, 5)), density, epsilon, **KEY)


# -- rescale --------------------------------------------------------------------------------------


def test_no_rescaling() -> None:
    assert sparsify.rescale_factor(tied((9,)), torch.ones(9) > 0, "none", 0.5) == 1


@pytest.mark.parametrize(("density", "factor"), [(0.5, 2.0), (0.1, 10.0), (1.0, 1.0), (0.0, 1.0)])
def test_inverse_divides_by_the_density(density: float, factor: float) -> None:
    magnitudes = tied((9,))
    mask = magnitudes > 0.2
    assert sparsify.rescale_factor(magnitudes, mask, "inverse", density) == pytest.approx(factor)


def test_inverse_keeps_the_expectation() -> None:
    """Over many seeds the sum of the rescaled survivors is the sum of all, within its error."""
    magnitudes = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    density, draws = 0.3, 4000
    factor = sparsify.rescale_factor(magnitudes, magnitudes > 0, "inverse", density)
    total = torch.zeros_like(magnitudes)
    for seed in range(draws):
        mask = sparsify.random_mask(magnitudes.shape, density, seed=seed, tensor="w", model="m")
        total += magnitudes * mask * factor
    error = magnitudes * math.sqrt((1 - density) / density / draws)
    assert bool(((total / draws - magnitudes).abs() <= 5 * error).all())


def test_l1_brings_the_norm_back() -> None:
    magnitudes = torch.rand(40, 50, generator=torch.Generator().manual_seed(0))
    mask = sparsify.random_mask(magnitudes.shape, 0.2, **KEY)
    factor = sparsify.rescale_factor(magnitudes, mask, "l1", 0.2)
    before, after = math.fsum(magnitudes.reshape(-1)), math.fsum(magnitudes[mask])
    assert factor * after == pytest.approx(before, rel=1e-6)


def test_l1_leaves_tiny_and_empty_tensors_alone() -> None:
    mask = torch.tensor([True, False])
    assert sparsify.rescale_factor(torch.zeros(2), mask, "l1", 0.5) == 1
    assert sparsify.rescale_factor(torch.full((2,), 1e-8), mask, "l1", 0.5) == 1
    assert sparsify.rescale_factor(torch.ones(2), torch.zeros(2) > 0, "l1", 0.5) == 1
