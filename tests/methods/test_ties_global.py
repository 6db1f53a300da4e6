"""`ties_global` against TIES of one long vector, entry by entry, in float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_models import Tensors, assert_close, deltas, merged

from mergekit_unconstrained.errors import RecipeError

from mergekit.merge_methods import merge_tensors  # isort: skip

Tiny = Any


def published(base: Tensors, d: list[Tensors], weights: list[float], density: float) -> Tensors:
    """The authors' three steps on the whole model as one vector; the mean by counting."""
    names = list(base)
    flat = [np.concatenate([one[k].ravel() for k in names]) for one in d]
    kept = []
    for vector in flat:
        order = sorted(abs(x) for x in vector)
        limit = order[len(order) - int(len(order) * density) - 1]
        kept.append([x if abs(x) >= limit else 0.0 for x in vector])
    sums = [sum(w * x for w, x in zip(weights, xs, strict=True)) for xs in zip(*kept, strict=True)]
    majority = 1 if sum(np.sign(s) for s in sums) >= 0 else -1
    result = []
    for s, xs in zip(sums, zip(*kept, strict=True), strict=True):
        sign = np.sign(s) or majority
        agreeing = [(w, x) for w, x in zip(weights, xs, strict=True) if np.sign(w * x) == sign]
        total = sum(w for w, _ in agreeing)
        result.append(sum(w * x for w, x in agreeing) / total if agreeing else 0.0)
    out, start = {}, 0
    for k in names:
        end = start + base[k].size
        out[k] = base[k] + np.array(result[start:end]).reshape(base[k].shape)
        start = end
    return out


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_whole_model_is_one_vector(density: float, tiny_models: Tiny, tmp_path: Path) -> None:
    models = [tiny_models.base, *tiny_models.experts]
    base, d = deltas(models)
    found = merged(tmp_path, "ties_global", models, {"density": density})
    assert_close(found, published(base, d, [1.0] * 3, density))
    kept = {k: np.count_nonzero(found[k] != base[k]) / base[k].size for k in base}
    assert max(kept.values()) - min(kept.values()) > 0.02  # no tensor has its own threshold


def test_weights_weigh_what_agrees(tiny_models: Tiny, tmp_path: Path) -> None:
    models = [tiny_models.base, *tiny_models.experts[:2]]
    each = [{"weight": 0.3, "density": 0.4}, {"weight": 1.2, "density": 0.4}]
    base, d = deltas(models)
    found = merged(tmp_path, "ties_global", models, {}, each)
    assert_close(found, published(base, d, [0.3, 1.2], 0.4))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("weights", "cancelling", "others", "agreed"),
    [
        ((1.0, 1.0), (0.25, -0.25), (0.25, 0.25), 0.25),
        # Without the weights the others would add up to the other sign.
        ((0.5, 1.0), (0.5, -0.25), (-0.5, 0.375), 0.375),
    ],
)
def test_sums_of_zero_elect_the_sign_of_the_whole_model(
    sign: int,
    weights: tuple[float, float],
    cancelling: tuple[float, float],
    others: tuple[float, float],
    agreed: float,
    make_tiny: Any,
    tmp_path: Path,
) -> None:
    """Two experts that cancel each other in the queries, and not in all other tensors."""
    base = make_tiny().base
    start = load_file(base / "model.safetensors")
    paths = []
    for i in range(2):
        folder = tmp_path / f"expert{i}"
        shutil.copytree(base, folder)
        moved = {
            name: t.float() + (cancelling if "q_proj" in name else others)[i] * sign
            for name, t in start.items()
        }
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
        paths.append(folder)
    each = [{"weight": w} for w in weights]
    found = merged(tmp_path, "ties_global", [base, *paths], {"density": 1.0}, each)
    (alone,) = (c * sign for c in cancelling if c * agreed > 0)
    for name, tensor in start.items():
        expected = alone if "q_proj" in name else agreed * sign
        np.testing.assert_allclose(found[name], tensor.double().numpy() + expected, atol=1e-6)


# -- scope: tensor --------------------------------------------------------------------------------


def one_tensor(tensors: list[torch.Tensor], **parameters: Any) -> torch.Tensor:
    return merge_tensors(
        tensors, "ties_global", base_index=0, name="w", parameters={"scope": "tensor", **parameters}
    )


@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_scope_tensor_is_mergekits_ties_where_there_are_no_ties(count: int, density: float) -> None:
    generator = torch.Generator().manual_seed(count)
    base = torch.randint(-(2**20), 2**20, (30, 50), generator=generator)
    tensors = [base / 2**20]
    for _ in range(count):
        # No two equal magnitudes, and no sums of zero: these elect another sign here.
        d = torch.randperm(1500, generator=generator) * 512
        d += torch.randint(1, 512, (1500,), generator=generator)
        signs = torch.randint(0, 2, (1500,), generator=generator) * 2 - 1
        tensors.append((base + (d * signs).reshape(30, 50)) / 2**20)
    theirs = merge_tensors(tensors, "ties", base_index=0,
                           parameters={"density": density, "weight": 1.0})  # fmt: skip
    assert torch.equal(one_tensor(tensors, density=density), theirs)


def test_scope_tensor_elects_the_sign_of_the_tensor_for_sums_of_zero() -> None:
    base = torch.zeros(5)
    up, down = torch.tensor([2.0, -1, -1, -1, 0]), torch.tensor([-2.0, -1, -1, -1, 0])
    assert one_tensor([base, up, down], density=1.0).tolist() == [-2, -1, -1, -1, 0]
    assert one_tensor([base, -up, -down], density=1.0).tolist() == [2, 1, 1, 1, 0]
    theirs = merge_tensors([base, up, down], "ties", base_index=0,
                           parameters={"density": 1.0, "weight": 1.0})  # fmt: skip
    assert theirs.tolist() == [2, -1, -1, -1, 0]


def test_the_default_looks_at_the_whole_model_and_says_where_it_can() -> None:
    with pytest.raises(RecipeError, match=r"mergekit-yaml.*scope: tensor"):
        merge_tensors([torch.zeros(3), torch.ones(3)], "ties_global", base_index=0, name="w")


@pytest.mark.parametrize(("density", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_density_zero_and_one_keep_nothing_and_everything(
    density: float, expected: float, tiny_models: Tiny, tmp_path: Path
) -> None:
    models = [tiny_models.base, tiny_models.experts[0]]
    base, (d,) = deltas(models)
    found = merged(tmp_path, "ties_global", models, {"density": density})
    assert_close(found, {k: t + expected * d[k] for k, t in base.items()})
