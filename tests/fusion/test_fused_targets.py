"""The recipe that merges a fusion's targets: no target's change may shrink on the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from mergekit_unconstrained.compat import MergeOptions
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.jobs.fused_targets import targets_recipe
from mergekit_unconstrained.numerics.operators import merge
from mergekit_unconstrained.numerics.settings import Expert, Settings


def recipe_of(kind: Any, weights: dict[str, float], **settings: Any) -> dict[str, Any]:
    run = SimpleNamespace(
        settings=FusionSettings(post_merge=kind, **settings),
        sources=[SimpleNamespace(name=n, weight=w) for n, w in weights.items()],
        pivot=SimpleNamespace(weights=Path("pivot")),
        plan=SimpleNamespace(pivot=SimpleNamespace(parent=SimpleNamespace(tensors={}))),
    )
    models = {name: Path(name) for name in weights}
    found = yaml.safe_load(targets_recipe(run, models, MergeOptions()))  # type: ignore[arg-type]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", ["task_arithmetic", "linear", "varm", "sce_dense"])
def test_equal_targets_are_merged_into_that_target(kind: Any, count: int) -> None:
    base, target = torch.randn(2, 6, 8, dtype=torch.float64)
    recipe = recipe_of(kind, {f"source{i}": 1.0 for i in range(count)})
    experts = [Expert(target, m["parameters"]["weight"]) for m in recipe["models"]]
    topk = recipe["parameters"].get("select_topk", 1.0)
    merged = merge(base, experts, Settings(kind, select_topk=topk))
    torch.testing.assert_close(merged, target, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["sce", "sce_dense"])
def test_targets_that_changed_other_entries_keep_their_changes(kind: Any) -> None:
    """Where one target alone changed an entry, and the entry is selected, nobody dilutes it."""
    base = torch.zeros(1, 20, dtype=torch.float64)
    first, second = base.clone(), base.clone()
    first[0, 3], second[0, 7] = 2.0, 2.0
    recipe = recipe_of(kind, {"a": 1.0, "b": 1.0})
    experts = [
        Expert(t, m["parameters"]["weight"])
        for t, m in zip((first, second), recipe["models"], strict=True)
    ]
    merged = merge(base, experts, Settings(kind, select_topk=1.0))
    torch.testing.assert_close(merged, first + second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["task_arithmetic", "sce_dense", "varm", "ties"])
def test_sources_keep_the_ratio_of_their_weights(kind: str) -> None:
    models = recipe_of(kind, {"a": 1.0, "b": 0.5})["models"]
    first, second = (m["parameters"]["weight"] for m in models)
    assert first == pytest.approx(2 * second)


def test_what_the_merge_keeps_can_be_set() -> None:
    weights = {"a": 1.0, "b": 1.0}
    assert recipe_of("sce_dense", weights)["parameters"]["select_topk"] == 0.1
    sce = recipe_of("sce", weights, post_merge_topk=0.5)
    assert sce["parameters"]["select_topk"] == 0.5
    ties = recipe_of("ties", weights, post_merge_density=0.7)
    assert [m["parameters"]["density"] for m in ties["models"]] == [0.7, 0.7]
