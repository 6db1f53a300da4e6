"""`opcm` against the paper's sequence with square factors and a rescaling at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from whole_models import Tensors, assert_close, deltas, merged

from mergekit_unconstrained.methods.opcm import accumulated, order_of, projected

from mergekit.merge_methods import merge_tensors  # isort: skip

Tiny = Any
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def full_projection(d: np.ndarray, D: np.ndarray, threshold: float) -> np.ndarray:
    """U C V' with square U and V, entry by entry."""
    u, s, vh = np.linalg.svd(D, full_matrices=True)
    r = next(i for i in range(len(s)) if sum(s[: i + 1]) / sum(s) > threshold)
    c = u.T @ d @ vh.T
    for i in range(c.shape[0]):
        for j in range(c.shape[1]):
            if i == j or (i < r and j < r):
                c[i, j] = 0.0
    return u @ c @ vh


def norm(model: Tensors) -> float:
    return float(np.sqrt(sum((t**2).sum() for t in model.values())))


def sequential(base: Tensors, d: list[Tensors], threshold: float) -> Tensors:
    """Whole models one after the other, rescaled every time, as published."""
    D, scale = d[0], 1.0
    for t in range(1, len(d)):
        E = {}
        for k in base:
            matrix = any(part in k for part in MATRICES)
            new = full_projection(d[t][k], D[k], threshold) if matrix else d[t][k]
            E[k] = scale * D[k] + new
        scale = norm(E) / np.mean([norm(one) for one in d[: t + 1]])
        D = {k: x / scale for k, x in E.items()}
    return {k: x + D[k] for k, x in base.items()}


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_the_sequence_of_the_paper(threshold: float, tiny_models: Tiny, tmp_path: Path) -> None:
    models = [tiny_models.base, *tiny_models.experts]
    base, d = deltas(models)
    found = merged(tmp_path, "opcm", models, {"threshold": threshold})
    assert_close(found, sequential(base, d, threshold))


def test_the_distance_from_the_base_is_the_experts_mean(tiny_models: Tiny, tmp_path: Path) -> None:
    models = [tiny_models.base, *tiny_models.experts]
    base, d = deltas(models)
    found = merged(tmp_path, "opcm", models, {})
    distance = norm({k: found[k] - base[k] for k in base})
    assert distance == pytest.approx(np.mean([norm(one) for one in d]), rel=1e-5)


def test_the_order_of_the_recipe_or_a_drawn_one(tiny_models: Tiny, tmp_path: Path) -> None:
    models = [tiny_models.base, *tiny_models.experts]
    base, d = deltas(models)
    turned = [models[0], *reversed(models[1:])]
    assert_close(merged(tmp_path, "opcm", turned, {}), sequential(base, d[::-1], 0.5))
    drawn = order_of(3, "shuffled", 4)
    assert sorted(drawn) == [0, 1, 2] != drawn
    (tmp_path / "drawn").mkdir()
    found = merged(tmp_path / "drawn", "opcm", models, {"order": "shuffled", "seed": 4})
    assert_close(found, sequential(base, [d[i] for i in drawn], 0.5))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.99])
def test_thin_factors_are_enough(shape: tuple[int, int], threshold: float) -> None:
    rng = np.random.default_rng(0)
    d, D = rng.normal(size=shape), rng.normal(size=shape)
    thin = projected(torch.from_numpy(d), torch.from_numpy(D), threshold).numpy()
    np.testing.assert_allclose(thin, full_projection(d, D, threshold), atol=1e-12)


def test_what_lies_in_the_protected_directions_is_not_touched() -> None:
    """A new expert cannot change the singular values of what was merged before, to first order."""
    rng = np.random.default_rng(1)
    before = rng.normal(size=(6, 8))
    u, _, vh = np.linalg.svd(before)
    new = torch.from_numpy(u[:, :2] @ rng.normal(size=(2, 2)) @ vh[:2])
    d = torch.stack([torch.from_numpy(before), new])
    np.testing.assert_allclose(accumulated(d, 0.8, matrix=True).numpy(), before, atol=1e-12)


def test_scope_tensor_keeps_the_mean_distance_of_the_tensor() -> None:
    rng = np.random.default_rng(2)
    tensors = [torch.from_numpy(rng.normal(size=(5, 6))) for _ in range(3)]
    out = merge_tensors(tensors, "opcm", base_index=0, name="model.layers.0.mlp.up_proj.weight",
                        parameters={"scope": "tensor"})  # fmt: skip
    norms = [float((t - tensors[0]).norm()) for t in tensors[1:]]
    assert float((out - tensors[0]).norm()) == pytest.approx(sum(norms) / 2, rel=1e-12)
