"""`consensus` against its definition, entry by entry in plain Python."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import yaml

from mergekit_unconstrained import compat, jobs
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.methods.consensus import consensus_vector

from mergekit.merge_methods import merge_tensors  # isort: skip  (compat silences its imports)


def merge(d: torch.Tensor, **parameters: Any) -> torch.Tensor:
    """D for task vectors on a base of zeros, [N, n]."""
    tensors = [torch.zeros_like(d[0]), *d]
    return merge_tensors(tensors, "consensus", base_index=0, parameters={"lambda": 1, **parameters})


def entry(values: list[float], lambdas: list[float], k: int) -> float:
    """D of one entry, as the paper says it in words."""
    needed_by = 0
    for i, (own, limit) in enumerate(zip(values, lambdas, strict=True)):
        others = sum(v for j, v in enumerate(values) if j != i)
        needed_by += abs(own) > limit * abs(others)
    return sum(values) if needed_by >= k else 0.0


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_combination_of_a_few_values(count: int, k: int) -> None:
    lambdas = [0.4, 1.0, 0.25][:count]
    grid = list(itertools.product([-1.0, -0.5, 0.0, 0.25, 1.0], repeat=count))
    d = torch.tensor(grid, dtype=torch.float64).T.contiguous()
    expected = torch.tensor([entry(list(v), lambdas, k) for v in grid], dtype=torch.float64)
    found = consensus_vector(d, torch.tensor(lambdas, dtype=torch.float64), k)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_a_case_by_hand() -> None:
    # agreed, against each other, selfish, nobody's, just on the limit
    d = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.4], [0.5, -0.5, 0.1, 0.0, 1.0]])
    merged = merge(d, tall_lambda=0.4)
    torch.testing.assert_close(merged, torch.tensor([1.5, 0.5, 0.0, 0.0, 0.0]))


def test_the_limit_itself_is_not_enough() -> None:
    d = torch.tensor([[1.0], [1.0]])
    assert float(merge(d, tall_lambda=1.0)) == 0
    assert float(merge(d, tall_lambda=0.999)) == 2


def test_without_agreement_it_is_task_arithmetic() -> None:
    d = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        merge(d, min_agreement=0, weight=[0.5, 2.0, -1.0]), 0.5 * d[0] + 2 * d[1] - d[2]
    )


def test_more_agreement_keeps_less() -> None:
    d = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    kept = [merge(d, min_agreement=k) != 0 for k in range(5)]
    for fewer, more in itertools.pairwise(reversed(kept)):
        assert bool((more | ~fewer).all())
    assert int(kept[4].sum()) < int(kept[3].sum()) < int(kept[2].sum()) < 500


def test_every_expert_has_a_limit_and_a_weight_of_its_own() -> None:
    d = torch.tensor([[1.0], [1.0]])
    assert float(merge(d, tall_lambda=[0.5, 1.5])) == 0
    assert float(merge(d, tall_lambda=[1.5, 0.5], min_agreement=1)) == 2
    # The weight comes first: 2 against 1 is within the limit of the one, not of the other.
    assert float(merge(d, tall_lambda=0.6, weight=[2.0, 1.0])) == 0
    assert float(merge(d, tall_lambda=0.6, weight=[1.5, 1.0])) == 2.5


def test_the_scale_of_all_does_not_matter() -> None:
    d = torch.randn(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(merge(d * 1e-20), merge(d) * 1e-20, rtol=1e-12, atol=0)


def test_one_expert_where_two_must_agree_is_an_error(tiny_models: Any, tmp_path: Any) -> None:
    recipe = {
        "merge_method": "consensus",
        "base_model": str(tiny_models.base),
        "models": [{"model": str(tiny_models.experts[0])}],
    }
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=r"min_agreement.*2 experts.*only 1.*min_agreement: 1"):
        jobs.check(str(path), compat.MergeOptions())
    path.write_text(yaml.safe_dump({**recipe, "parameters": {"min_agreement": 1}}))
    assert "1 expert," in jobs.check(str(path), compat.MergeOptions())
