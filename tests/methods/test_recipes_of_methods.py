"""Every recipe of recipes/methods/ on tiny models of three architectures, by mergekit-yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from mergekit_unconstrained import compat, jobs
from mergekit_unconstrained.catalog import CATALOG, entry_for

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "methods").glob("*.yml"))

SMALL = {"steps": 3, "bottom": 1, "top": 1, "transition": 0}
"""What makes sense of a large model only, or takes long: parameter -> value for a tiny one."""


def merge_methods() -> set[str]:
    return {yaml.safe_load(path.read_text())["merge_method"] for path in RECIPES}


def test_every_method_of_tensors_has_a_recipe() -> None:
    ours = {name for name, entry in CATALOG.items() if entry.level == "tensor"}
    assert ours - merge_methods() <= {"layerwise"}, "recipes/demo/ has that one"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_a_recipe_merges_a_tiny_model(
    architecture: str,
    path: Path,
    make_tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mergekit.scripts.run_yaml import main

    recipe = yaml.safe_load(path.read_text())
    assert entry_for(recipe["merge_method"])
    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_CACHE", str(tmp_path / "cache"))
    models = make_tiny(architecture, experts=2, num_hidden_layers=2)
    recipe["base_model"] = str(models.base)
    for model, folder in zip(recipe["models"], models.experts, strict=True):
        model["model"] = str(folder)
    parameters = recipe.get("parameters", {})
    parameters.update({key: value for key, value in SMALL.items() if key in parameters})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    if architecture == "llama":  # the plan tries every kernel on a sample, for the time it takes
        jobs.show_plan(str(tmp_path / "recipe.yml"), None, compat.MergeOptions(quiet=True))
        assert " on this machine" in capsys.readouterr().out.replace("\n", " ")
    arguments = [str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--quiet"]
    result = CliRunner().invoke(main, [*arguments, "--no-write-model-card", "--no-copy-tokenizer"])
    assert result.exit_code == 0, result.output or result.exception

    base = load_file(models.base / "model.safetensors")
    merged = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == getattr(torch, recipe["dtype"])
        assert bool(torch.isfinite(tensor).all()), name
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name])}
    assert any("q_proj" in name for name in changed)
    if recipe["merge_method"] in ("optmerge", "doge"):
        assert not any("norm" in name or "embed" in name or "lm_head" in name for name in changed)
