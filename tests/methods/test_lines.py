"""`lines` in whole recipes: the line over the depth, and the norms that make alpha."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from whole_models import Tensors, assert_close, deltas, merged, read

from mergekit_unconstrained import compat, jobs
from mergekit_unconstrained.errors import RecipeError

from mergekit.merge_methods import merge_tensors  # isort: skip

Tiny = Any
LAYERS = 4


def layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def scaled(base: Tensors, merged: Tensors, alpha: float, beta: float) -> Tensors:
    """T0 + the merged delta by a ruler over the layers."""
    ruler = np.linspace(alpha, alpha + beta, LAYERS)
    return {
        k: t + merged[k] * (alpha if layer_of(k) is None else ruler[layer_of(k)])
        for k, t in base.items()
    }


def test_the_scale_is_a_line_over_the_layers(tiny_models: Tiny, tmp_path: Path) -> None:
    models = [tiny_models.base, *tiny_models.experts]
    base, d = deltas(models)
    total = {k: d[0][k] + d[1][k] + d[2][k] for k in base}
    found = merged(tmp_path, "lines", models, {"alpha": 0.2, "beta": 0.7})
    assert_close(found, scaled(base, total, 0.2, 0.7))


@pytest.mark.parametrize("weight", [1.0, -0.4])
def test_equal_weights_make_alpha_one_over_n_without_a_look_at_the_model(
    weight: float, tiny_models: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_CACHE", str(tmp_path / "cache"))
    models = [tiny_models.base, *tiny_models.experts[:2]]
    base, d = deltas(models)
    found = merged(tmp_path, "lines", models, {"weight": weight})
    alpha = 1 / (2 * abs(weight))
    total = {k: weight * (d[0][k] + d[1][k]) for k in base}
    assert_close(found, scaled(base, total, alpha, max(0.0, 1 - alpha)))
    assert not (tmp_path / "cache").exists()


def test_other_weights_make_alpha_by_the_norms_of_the_whole_model(
    tiny_models: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_CACHE", str(tmp_path / "cache"))
    models = [tiny_models.base, *tiny_models.experts[:2]]
    base, d = deltas(models)
    found = merged(tmp_path, "lines", models, {"beta": 0.3}, [{"weight": 0.9}, {"weight": -0.5}])
    total = {k: 0.9 * d[0][k] - 0.5 * d[1][k] for k in base}
    plain = sum(np.abs(d[0][k] + d[1][k]).sum() for k in base)
    alpha = plain / sum(np.abs(t).sum() for t in total.values()) / 2
    assert abs(alpha - 0.5) > 0.1
    assert_close(found, scaled(base, total, alpha, 0.3))


def test_slices_do_not_change_what_depth_means(tiny_models: Tiny, tmp_path: Path) -> None:
    """Layer 3 of the parents, written as layer 0, takes alpha."""
    base, expert = tiny_models.base, tiny_models.experts[0]
    data = {
        "merge_method": "lines",
        "base_model": str(base),
        "slices": [
            {"sources": [{"model": str(m), "layer_range": [i, i + 1]} for m in (base, expert)]}
            for i in (3, 1)
        ],
        "parameters": {"alpha": 0.25, "beta": 0.5},
        "dtype": "float32",
    }
    (tmp_path / "sliced.yml").write_text(yaml.safe_dump(data))
    options = compat.MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    jobs.run_recipe(str(tmp_path / "sliced.yml"), str(tmp_path / "out"), options)
    found = read(tmp_path / "out")
    t0, (d,) = deltas([base, expert])
    for written, source, scale in ((0, 3, 0.25), (1, 1, 0.75)):
        name = "model.layers.{}.mlp.up_proj.weight"
        expected = t0[name.format(source)] + scale * d[name.format(source)]
        np.testing.assert_allclose(found[name.format(written)], expected, atol=2e-7)


def test_a_layer_alone_has_no_depth() -> None:
    pair = [torch.zeros(2), torch.ones(2)]

    def lines(name: str, **parameters: float) -> list[float]:
        merged = merge_tensors(pair, "lines", base_index=0, name=name, parameters=parameters)
        return merged.tolist()

    with pytest.raises(RecipeError, match="mergekit-yaml"):
        lines("model.layers.1.mlp.up_proj.weight", alpha=0.5)
    assert lines("model.layers.1.mlp.up_proj.weight", alpha=0.5, beta=0.0) == [0.5, 0.5]
    assert lines("model.layers.0.mlp.up_proj.weight", alpha=0.5) == [0.5, 0.5]
    assert lines("lm_head.weight", alpha=0.5) == [0.5, 0.5]
