"""Order statistics by counting digits are those of a sorted list, whatever the numbers are."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_unconstrained.numerics.quantiles import Selection

DTYPES = {torch.float32: "<f", torch.float64: "<d"}


def selected(
    numbers: torch.Tensor, ranks: Sequence[int], pieces: int = 7
) -> tuple[dict[int, float], int]:
    """The numbers of some ranks, and the passes it took."""
    selection = Selection(numbers.dtype)
    for count in range(1, 9):
        for piece in numbers.split(max(1, pieces)):
            selection.add(piece)
        if not selection.next_pass(ranks if count == 1 else ()):
            return selection.entries, count
    raise AssertionError("no end")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_rank_of_any_numbers_is_that_of_a_sorted_list(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    width = 32 if dtype == torch.float32 else 64
    one = st.floats(allow_nan=False, width=width)
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-42, 1.0000001])
    values = data.draw(st.lists(one | few, min_size=1, max_size=60))
    found, passes = selected(torch.tensor(values, dtype=dtype), range(len(values)))
    # The reference packs and unpacks the numbers itself: no tensor takes part in it.
    stored = [struct.unpack(DTYPES[dtype], struct.pack(DTYPES[dtype], v))[0] for v in values]
    assert list(found.values()) == sorted(stored)
    assert passes == Selection.passes(dtype) == width // 16


def test_magnitudes_of_bf16_files_with_thousands_of_ties_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(300_000, generator=generator)).bfloat16()
    expert = (base + 0.001 * torch.randn(300_000, generator=generator)).bfloat16()
    d = (expert.float() - base.float()).abs()
    ordered = np.sort(expert.double().numpy() - base.double().numpy(), kind="stable")
    ordered = np.sort(np.abs(ordered))
    assert len(np.unique(ordered)) < 5_000
    ranks = [0, 1, 75_000, 239_999, 240_000, 299_999]
    found, _ = selected(d, ranks, pieces=65_536)
    assert [found[r] for r in ranks] == [ordered[r] for r in ranks]


def test_ranks_beyond_the_ends_are_the_ends() -> None:
    found, _ = selected(torch.tensor([3.0, 1.0, 2.0]), [-5, 0, 99])
    assert found == {-5: 1.0, 0: 1.0, 99: 3.0}


def test_no_numbers_have_no_ranks() -> None:
    assert selected(torch.zeros(0), [0, 1]) == ({}, 1)


def test_numbers_that_nobody_wants_cost_one_pass() -> None:
    assert selected(torch.ones(5), []) == ({}, 1)
