"""Magnitudes ranked once against the selections that they replace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_unconstrained.numerics import keeping, sparsify
from mergekit_unconstrained.numerics.ranking import Ranking, kept, ranking
from mergekit_unconstrained.numerics.select import extreme_mask
from mergekit_unconstrained.numerics.settings import OPERATORS, Expert, Settings

# Few distinct magnitudes, so that most thresholds fall among equal ones.
magnitudes = st.one_of(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=40),
    st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40),
).map(torch.tensor)
densities = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-9, 0.25, 0.5, 1 - 1e-9, 1.0]))
FEW = settings(max_examples=60, deadline=None)


@FEW
@given(magnitudes, st.integers(-1, 42), st.integers(-1, 42), st.booleans())
def test_ranks_between_two_are_the_difference_of_two_selections(
    values: torch.Tensor, first: int, end: int, largest: bool
) -> None:
    end = max(first, end)
    found = Ranking.of(values, largest=largest)
    expected = extreme_mask(values, end, largest=largest)
    assert torch.equal(found.between(0, end), expected)
    expected &= ~extreme_mask(values, first, largest=largest)
    assert torch.equal(found.between(first, end), expected)
    assert found.ranks.dtype == torch.int32
    assert sorted(found.ranks.tolist()) == list(range(len(values)))


@FEW
@given(magnitudes, densities, st.floats(0, 1))
def test_every_density_gives_the_mask_of_the_operator(
    values: torch.Tensor, density: float, gamma: float
) -> None:
    n = len(values)
    largest = Ranking.of(values, largest=True)
    expected = sparsify.magnitude_mask(values, density)
    assert torch.equal(largest.between(0, sparsify.kept_count(n, density)), expected)
    smallest = Ranking.of(values, largest=False)
    expected = sparsify.outlier_mask(values, density, gamma)
    found = smallest.between(*sparsify.kept_span(n, density, gamma))
    assert torch.equal(found, expected) or density >= 1


@pytest.mark.parametrize("operator", ["ties", "breadcrumbs"])
@pytest.mark.parametrize("rescale", [None, "none", "inverse", "l1"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_what_is_kept_is_what_the_operator_keeps(
    operator: str, rescale: str | None, precision: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(24, 30, generator=generator).bfloat16()
    tensor = base + (torch.randint(-9, 10, base.shape, generator=generator) / 64).bfloat16()
    s = Settings(operator=operator, rescale=rescale, dtype=precision)  # type: ignore[arg-type]
    found = ranking(base, tensor, s)
    assert found is not None
    for density in (0.0, 0.001, 0.1, 0.5, 0.77, 0.999, 1.0):
        for gamma in (0.0, 0.01, 0.3):
            expert = Expert(tensor, weight=0.5, density=density, gamma=gamma)
            mine = kept(found, expert, s)
            if rescale == "l1" and density < 1:
                assert mine is None
                continue
            assert mine is not None
            theirs = keeping.keep(base, expert, s, precision)
            assert mine.factor == theirs.factor
            if theirs.mask is None:
                assert mine.mask is None
            else:
                assert mine.mask is not None
                assert torch.equal(mine.mask, theirs.mask)


def test_only_magnitudes_are_ranked() -> None:
    base, tensor = torch.zeros(3), torch.ones(3)
    ranked = {o for o in OPERATORS if ranking(base, tensor, Settings(operator=o)) is not None}
    assert ranked == {"ties", "breadcrumbs"}


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 4)])
def test_tensors_of_any_shape_are_ranked_flat(shape: tuple[int, ...]) -> None:
    base = torch.zeros(shape)
    tensor = torch.arange(float(base.numel())).reshape(shape)
    found = ranking(base, tensor, Settings(operator="ties"))
    assert found is not None
    assert found.ranks.tolist() == list(reversed(range(base.numel())))
    expert = Expert(tensor, weight=1.0, density=0.5)
    mine = kept(found, expert, Settings(operator="ties"))
    theirs = keeping.keep(base, expert, Settings(operator="ties"), torch.float32)
    assert mine is not None
    assert mine.mask is not None
    assert theirs.mask is not None
    assert torch.equal(mine.mask, theirs.mask)


@pytest.mark.gpu
@pytest.mark.parametrize("largest", [True, False])
def test_an_accelerator_ranks_the_same(largest: bool) -> None:
    values = torch.randint(0, 5, (2000,), generator=torch.Generator().manual_seed(1)).float()
    on_gpu = Ranking.of(values.cuda(), largest=largest)
    assert torch.equal(on_gpu.ranks.cpu(), Ranking.of(values, largest=largest).ranks)
