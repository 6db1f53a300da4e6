"""`doge` against the authors' procedure in NumPy, one row, expert and step at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adam_reference import adam, orthonormal, run_recipe, slope, stacked, vectors

from mergekit_unconstrained.engine import prepass
from mergekit_unconstrained.engine.plan import PlannedTensor
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.methods.doge import (
    Disturbance,
    needs,
    own_threshold,
    shared_subspace,
)
from mergekit_unconstrained.numerics.roles import role_from_name

from mergekit.merge_methods import merge_tensors  # isort: skip

NAME = "model.layers.0.mlp.up_proj.weight"


def scales(d: list[np.ndarray], eta: float) -> list[float]:
    return [eta / np.linalg.norm(d_i) if d_i.any() else 0.0 for d_i in d]


def loss(X: np.ndarray, d: list[np.ndarray], eta: float) -> float:
    total = 0.0
    for d_j in d:
        for r in range(len(X)):
            row = d_j[r].copy()
            for l_i, d_i in zip(scales(d, eta), d, strict=True):
                row -= l_i * d_i[r] + l_i * X[r]
            total += float(np.dot(d_j[r], row)) ** 2
    return total


def projector(d: list[np.ndarray], subspace: int) -> np.ndarray:
    smaller = min(d[0].shape)
    tops = [np.linalg.svd(d_i)[0][:, : smaller // len(d)] for d_i in d if d_i.any()]
    B = np.linalg.svd(np.concatenate(tops, axis=1))[0] if len(tops) > 1 else tops[0]
    B = B[:, : smaller // subspace]
    return B @ B.T


def reference(
    d: list[np.ndarray], eta: float, top: float, steps: int, rate: float, subspace: int
) -> np.ndarray:
    l = scales(d, eta)
    P = projector(d, subspace)

    def gradient(X: np.ndarray) -> np.ndarray:
        g = np.zeros_like(X)
        for d_j in d:
            rest = d_j - sum(l_i * (d_i + X) for l_i, d_i in zip(l, d, strict=True))
            for r in range(len(X)):
                g[r] -= 2 * sum(l) * np.dot(d_j[r], rest[r]) * d_j[r]
        return g - P @ g

    X = adam(np.zeros_like(d[0]), gradient, steps, rate)
    out = np.zeros_like(X)
    for l_i, d_i in zip(l, d, strict=True):
        least = np.sort(np.abs(d_i).ravel())[d_i.size - int(d_i.size * top) - 1]
        out += np.where(np.abs(d_i) >= least, l_i * (d_i + X), 0)
    return out


def merge(d: torch.Tensor, name: str = NAME, **parameters: Any) -> torch.Tensor:
    tensors = [torch.zeros_like(d[0]), *d]
    parameters = {"scope": "tensor", **parameters}
    return merge_tensors(tensors, "doge", base_index=0, name=name, parameters=parameters)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_loss_and_its_projected_gradient(count: int, shape: tuple[int, int]) -> None:
    *d, X = vectors(count + 1, *shape, size=1.0)
    B = orthonormal(shape[0], 2, 0)
    l = torch.tensor(scales(d, 0.7), dtype=torch.float64)
    value, gradient = Disturbance(stacked(d), l, torch.from_numpy(B))(torch.from_numpy(X))
    assert value == pytest.approx(loss(X, d, 0.7), rel=1e-10)
    numeric = slope(lambda x: loss(x, d, 0.7), X)
    np.testing.assert_allclose(gradient.numpy(), numeric - B @ B.T @ numeric, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_shared_subspace(count: int) -> None:
    d = vectors(count, 14, 12)
    B = shared_subspace(stacked(d), 4).numpy()
    assert B.shape == (14, 3)
    np.testing.assert_allclose(B @ B.T, projector(d, 4), atol=1e-9)


@pytest.mark.parametrize("top", [0.05, 0.3, 0.999])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_is_the_authors_procedure(count: int, shape: tuple[int, int], top: float) -> None:
    d = vectors(count, *shape)
    expected = reference(d, 0.5, top, 30, 1e-2, 3)
    settings = {"eta": 0.5, "top": top, "steps": 30, "learning_rate": 1e-2, "subspace": 3}
    np.testing.assert_allclose(merge(stacked(d), **settings), expected, atol=1e-8)
    single = merge(stacked(d, torch.float32), **settings)
    np.testing.assert_allclose(single, expected, atol=2e-4)


def test_the_defaults_are_the_authors() -> None:
    d = vectors(2, 12, 12, size=1e-2)
    expected = reference(d, 0.07, 0.3, 400, 1e-4, 6)
    np.testing.assert_allclose(merge(stacked(d)), expected, atol=1e-8)


def test_without_steps_and_mask_it_adds_vectors_of_equal_length() -> None:
    d = vectors(3, 7, 5)
    expected = sum(0.07 * d_i / np.linalg.norm(d_i) for d_i in d)
    np.testing.assert_allclose(merge(stacked(d), steps=0, top=1.0), expected, atol=1e-12)
    other = [d[0], 1e6 * d[1], 1e-6 * d[2]]
    np.testing.assert_allclose(merge(stacked(other), steps=0, top=1.0), expected, atol=1e-12)


@pytest.mark.parametrize(("top", "kept"), [(0.0, 0), (0.25, 3), (0.5, 6), (0.99, 10), (1.0, 10)])
def test_one_entry_more_than_the_fraction_is_kept(top: float, kept: int) -> None:
    magnitudes = torch.arange(1.0, 11)
    assert int((magnitudes >= own_threshold(magnitudes, top)).sum()) == kept
    equal = torch.ones(4)
    assert int((equal >= own_threshold(equal, top)).sum()) == (4 if top else 0)


@pytest.mark.parametrize("parameters", [{"eta": 0.0}, {"top": 0.0}, {"lambda": 0.0}])
def test_nothing_is_the_base(parameters: dict[str, float]) -> None:
    assert not bool(merge(stacked(vectors(2, 6, 6)), **parameters).any())


def test_a_frozen_expert_has_no_say() -> None:
    d = [*vectors(2, 9, 9), np.zeros((9, 9))]
    settings = {"steps": 20, "learning_rate": 1e-2, "top": 0.5}
    expected = reference(d, 0.07, 0.5, 20, 1e-2, 6)
    np.testing.assert_allclose(merge(stacked(d), **settings), expected, atol=1e-8)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"]
)
def test_what_is_no_matrix_of_a_layer_stays_at_the_base(name: str) -> None:
    d = stacked(vectors(3, 5, 4))
    assert not bool(merge(d, name).any())
    assert bool(merge(d).any())


def test_scope_model_cuts_all_matrices_at_one_magnitude(
    make_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without steps D is the sum of the kept entries; Qwen2 has biases, which do not count."""
    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_CACHE", str(tmp_path / "cache"))
    models = make_tiny("qwen2", experts=2)
    found, (base, *experts) = run_recipe(tmp_path / "out", models, "doge", steps=0, top=0.25)
    matrices = [k for k in base if "layers" in k and base[k].ndim == 2]
    d = [{k: (e[k] - base[k]).double().numpy() for k in matrices} for e in experts]
    least = []
    for d_i in d:
        ordered = np.sort(np.abs(np.concatenate([x.ravel() for x in d_i.values()])))
        least.append(ordered[len(ordered) - len(ordered) // 4 - 1])
    for name, tensor in found.items():
        expected = base[name].double().numpy()
        if name in matrices:
            for d_i, smallest in zip(d, least, strict=True):
                kept = np.abs(d_i[name]) >= smallest
                expected = expected + 0.07 * kept * d_i[name] / np.linalg.norm(d_i[name])
        np.testing.assert_allclose(tensor.double().numpy(), expected, atol=1e-7, err_msg=name)


def test_scope_model_needs_the_model() -> None:
    with pytest.raises(RecipeError, match="scope: tensor"):
        merge(stacked(vectors(2, 4, 4)), scope="model")


def test_the_whole_model_means_its_matrices() -> None:
    shapes = {"layers.0.self_attn.q_proj.weight": (4, 4), "layers.0.self_attn.q_proj.bias": (90,),
              "embed_tokens.weight": (9, 9), "layers.0.mlp.up_proj.weight": (2, 3)}  # fmt: skip
    given = {"scope": "model", "top": 0.5}
    inputs = {"base": "", "expert": ""}
    tensors = [
        PlannedTensor(n, role_from_name(n), s, "float32", inputs, parameters=given)
        for n, s in shapes.items()
    ]

    def load(model: str, tensor: PlannedTensor) -> torch.Tensor:
        return torch.full(shapes[tensor.name], float(model == "expert") * len(tensor.name))

    (found,) = prepass.measure(needs(tensors), tensors, "base", load).values()
    assert found["expert"].count == 16 + 6
    assert found["expert"].entries == {10: len("layers.0.self_attn.q_proj.weight")}
