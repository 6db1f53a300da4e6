"""Selection against Python's own sort, which is stable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_unconstrained.numerics.select import Extreme, extreme_mask, stable_order


def chosen_by_sorting(values: list[float], k: int, largest: bool) -> list[bool]:
    order = sorted(range(len(values)), key=lambda j: (-values[j] if largest else values[j], j))
    return [j in order[: max(k, 0)] for j in range(len(values))]


# Few distinct magnitudes, so that most thresholds fall among equal ones.
tied_values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=1, max_size=40)
any_values = st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40)


@given(st.one_of(tied_values, any_values), st.integers(-1, 42), st.booleans())
def test_the_mask_is_that_of_a_stable_sort(values: list[float], k: int, largest: bool) -> None:
    mask = extreme_mask(torch.tensor(values), k, largest=largest)
    assert mask.dtype == torch.bool
    assert mask.tolist() == chosen_by_sorting(values, k, largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [0, 1, 2, 499, 500, 501, 998, 999, 1000])
def test_exactly_k_entries_are_chosen(k: int, largest: bool, dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(k)).abs().to(dtype)
    ties = values.mul(4).round()
    for magnitudes in (values, ties, torch.zeros_like(values)):
        mask = extreme_mask(magnitudes, k, largest=largest)
        assert int(mask.sum()) == k
        assert mask.tolist() == chosen_by_sorting(magnitudes.tolist(), k, largest)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@given(tied_values, st.integers(0, 42), st.booleans(), st.integers(1, 9))
def test_pieces_are_chosen_as_the_whole_is(
    dtype: type, values: list[float], k: int, largest: bool, step: int
) -> None:
    numbers = np.array([4 * v for v in values], dtype)
    extreme = Extreme(numbers.copy(), min(k, len(numbers)), largest=largest)
    chosen: list[bool] = []
    for start in range(0, len(numbers), step):
        piece = numbers[start : start + step]
        chosen += extreme.take(piece, np.empty(len(piece), np.bool_)).tolist()
    assert chosen == chosen_by_sorting(values, k, largest)


def test_the_largest_and_the_smallest_rest_share_no_entry_without_ties() -> None:
    magnitudes = torch.randperm(101, generator=torch.Generator().manual_seed(0)).float()
    upper = extreme_mask(magnitudes, 40, largest=True)
    lower = extreme_mask(magnitudes, 61, largest=False)
    assert torch.equal(upper, ~lower)


def test_an_empty_tensor_has_an_empty_mask() -> None:
    assert extreme_mask(torch.empty(0), 3, largest=True).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("largest", [True, False])
def test_an_accelerator_chooses_the_same(largest: bool) -> None:
    magnitudes = torch.randint(0, 5, (2000,), generator=torch.Generator().manual_seed(1)).float()
    on_gpu = extreme_mask(magnitudes.cuda(), 777, largest=largest)
    assert torch.equal(on_gpu.cpu(), extreme_mask(magnitudes, 777, largest=largest))


@given(st.lists(tied_values.filter(lambda v: len(v) >= 3).map(lambda v: v[:3]), min_size=1))
def test_rows_are_ranked_with_equal_magnitudes_by_column(rows: list[list[float]]) -> None:
    expected = [sorted(range(3), key=lambda j: (row[j], j)) for row in rows]
    assert stable_order(torch.tensor(rows)).tolist() == expected
    assert stable_order(torch.tensor(rows, dtype=torch.float64)).tolist() == expected


@given(any_values)
def test_packed_ranks_are_those_of_a_stable_argsort(values: list[float]) -> None:
    rows = torch.tensor([values, values[::-1]])
    assert torch.equal(stable_order(rows), torch.argsort(rows, dim=1, stable=True))


def test_infinity_ranks_last() -> None:
    assert stable_order(torch.tensor([[torch.inf, 0.0, 3e38]])).tolist() == [[1, 2, 0]]
