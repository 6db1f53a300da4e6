"""Summing what falls on one id."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_unconstrained.fusion.alignment.sparse import merge_duplicates


@pytest.mark.parametrize("rows", [0, 1, 57])
@pytest.mark.parametrize(
    ("vocabulary", "width"), [(1, 1), (3, 1), (2, 9), (5, 4), (30, 11), (300, 101), (2**31 - 1, 7)]
)
def test_the_first_entry_of_an_id_gets_all_its_mass(vocabulary: int, width: int, rows: int) -> None:
    rng = np.random.default_rng(width)
    ids = rng.integers(-1, vocabulary, (rows, width)).astype(np.int32)
    ids[:, -2:] = ids[:, :2]  # also where the vocabulary is large
    probs = np.where(ids < 0, 0, rng.random((rows, width))).astype(np.float32)
    found_ids, found_probs = ids.copy(), probs.copy()
    merge_duplicates(found_ids, found_probs)
    for t in range(rows):
        sums: dict[int, float] = {}
        for i, p in zip(ids[t].tolist(), probs[t].tolist(), strict=True):
            sums[i] = sums.get(i, 0.0) + p
        first = {i: ids[t].tolist().index(i) for i in sums if i >= 0}
        expected = [i if first.get(i) == place else -1 for place, i in enumerate(ids[t].tolist())]
        assert found_ids[t].tolist() == expected
        assert found_probs[t] == pytest.approx([sums[i] if i >= 0 else 0 for i in expected])
