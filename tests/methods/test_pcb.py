"""`pcb` against its definition, entry by entry in plain Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adam_reference import run_recipe, stacked, vectors

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.methods.pcb import Variant, own_bounds, pcb_vector

from mergekit.merge_methods import merge_tensors  # isort: skip

VARIANTS = ["language", "vision"]


def merged(
    d: torch.Tensor, weights: torch.Tensor, density: float, variant: Variant
) -> torch.Tensor:
    """D with scope `tensor`."""
    return pcb_vector(d, weights, variant, *own_bounds(d, density, variant))


def bounded(values: list[float], low: int, high: int) -> tuple[list[float], float, float]:
    """Values between the entries of two ranks, and those entries."""
    order = sorted(values)
    return [min(max(v, order[low]), order[high]) for v in values], order[low], order[high]


def unit(values: list[float], low: float, high: float) -> list[float]:
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def reference(
    d: list[list[float]], weights: list[float], density: float, variant: str
) -> list[float]:
    """D of every entry."""
    N, n = len(d), len(d[0])
    q = 1e-4 if variant == "language" else 1e-2
    A, normed = [], []
    for expert in d:
        clamped, low, high = bounded([abs(x) for x in expert], int(n * q), int(n * (1 - q) - 1))
        A.append(clamped)
        normed.append(unit(clamped, low, high))
    s = []
    for i in range(N):
        beta = []
        for e in range(n):
            if variant == "language":
                inter = math.tanh(d[i][e] * sum(d[j][e] for j in range(N)))
            else:
                own = sign(d[i][e]) * normed[i][e]
                inter = sum(math.tanh(own * sign(d[j][e]) * normed[j][e]) for j in range(N))
            beta.append(math.exp(N * normed[i][e] ** 2) * inter)
        s.append(unit(*bounded(beta, min(int(n * (1 - density)), n - 1), n - 1)))
    out = []
    for e in range(n):
        divisor = max(sum(s[i][e] for i in range(N)), 1e-12)
        total = sum(weights[i] * sign(d[i][e]) * A[i][e] * s[i][e] for i in range(N))
        out.append(total / divisor)
    return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("count", "size"), [(1, 300), (2, 300), (3, 1), (3, 2), (5, 37)])
def test_it_is_the_definition(count: int, size: int, density: float, variant: str) -> None:
    d = vectors(count, size, size=1.0)
    weights = [1.0, 0.5, 1.2, -1.0, 0.8][:count]
    found = merged(stacked(d), torch.tensor(weights, dtype=torch.float64), density, variant)
    expected = reference([d_i.tolist() for d_i in d], weights, density, variant)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_quantiles_of_many_entries(variant: str) -> None:
    """20,000 entries: language clamps two at the lower end and three at the upper."""
    d = vectors(2, 20_000, size=1.0)
    found = merged(stacked(d), torch.ones(2).double(), 0.1, variant)
    expected = reference([d_i.tolist() for d_i in d], [1.0, 1.0], 0.1, variant)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    magnitudes = np.sort(np.abs(d[1]))  # twice as large as those of d[0]
    last = {"language": 20_000 - 3, "vision": 20_000 - 201}[variant]
    assert float(found.abs().max()) == pytest.approx(magnitudes[last])


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_more_than_the_density_compete(variant: str) -> None:
    d = stacked(vectors(1, 1000))
    kept = merged(d, torch.ones(1).double(), 0.1, variant) != 0
    assert int(kept.sum()) == 99  # of a hundred the least is the quantile itself
    largest = d[0].abs().argsort(descending=True)
    assert bool(kept[largest[:99]].all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_signs_and_order_of_entries_go_through(variant: str) -> None:
    d = stacked(vectors(3, 200))
    weights = torch.tensor([1.0, 2.0, 0.5]).double()
    once = merged(d, weights, 0.3, variant)
    flips = torch.where(torch.arange(200) % 3 == 0, -1.0, 1.0).double()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    turned = merged((d * flips)[:, order], weights, 0.3, variant)
    torch.testing.assert_close(turned, (once * flips)[order])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_equal_magnitudes_do_not_divide_by_zero(value: float, variant: str) -> None:
    d = torch.full((2, 8), value).double()
    assert bool((merged(d, torch.ones(2).double(), 0.5, variant) == 0).all())


def merge(d: torch.Tensor, **parameters: Any) -> torch.Tensor:
    tensors = [torch.zeros_like(d[0]), *d]
    return merge_tensors(tensors, "pcb", base_index=0, parameters=parameters)


def test_a_tensor_is_one_vector_and_weight_scales_an_experts_entries() -> None:
    d = stacked(vectors(2, 6, 7), torch.float32)
    flat = merged(d.reshape(2, -1), torch.tensor([1.0, 3.0]), 0.1, "language")
    torch.testing.assert_close(merge(d, weight=[1.0, 3.0], **{"lambda": 0.5}), flat.view(6, 7) / 2)
    everything = merge(d, density=1.0, weight=[1.0, 3.0])
    torch.testing.assert_close(merge(d, density=1.0, weight=[2.0, 6.0]), 2 * everything)


def test_density_zero_is_the_base() -> None:
    d = stacked(vectors(2, 50), torch.float32)
    assert not bool(merge(d, density=0.0).any())
    assert bool(merge(d, density=1.0).any())


@pytest.mark.parametrize("wrong", [{"density": 1.1}, {"variant": "speech"}, {"weight": math.nan}])
def test_an_impossible_parameter_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        merge(torch.ones(1, 4), **wrong)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scope_model_takes_the_whole_model_for_one_vector(
    variant: Variant, tiny_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_CACHE", str(tmp_path / "cache"))
    settings = {"variant": variant, "density": 0.2, "scope": "model", "lambda": 0.5}
    found, (base, *experts) = run_recipe(tmp_path / "out", tiny_models, "pcb", **settings)
    names = sorted(base)
    d = torch.stack([torch.cat([(e[k] - base[k]).flatten() for k in names]) for e in experts])
    whole = 0.5 * merged(d, torch.ones(len(experts)), 0.2, variant)
    parts = whole.split([base[k].numel() for k in names])
    for name, part in zip(names, parts, strict=True):
        expected = base[name] + part.view(base[name].shape)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    kept = torch.cat([(found[k] != base[k]).flatten() for k in names])
    assert 0.15 < float(kept.double().mean()) < 0.6


def test_scope_model_needs_the_model_and_one_density(tiny_models: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="scope: tensor"):
        merge(torch.ones(1, 4), scope="model")
    with pytest.raises(RecipeError, match="`density` must be one"):
        run_recipe(tmp_path, tiny_models, "pcb", density=[0.1, 0.5], scope="model")
