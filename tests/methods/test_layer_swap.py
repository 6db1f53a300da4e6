"""`layer_swap`: which expert a layer comes from, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from whole_models import merged, read

from mergekit_unconstrained import compat, jobs
from mergekit_unconstrained.errors import RecipeError

from mergekit.merge_methods import merge_tensors  # isort: skip

Tiny = Any

# (bottom, top, transition) -> of layers 0 to 3: Language, Task or the Average
CASES = {
    (1, 1, 0): "LTTL",
    (1, 1, 1): "LAAL",
    (0, 0, 0): "TTTT",
    (0, 1, 1): "ATAL",
    (2, 0, 1): "LLAA",
    (3, 1, 0): "LLLL",
    (1, 0, 0): "LTTT",
}


@pytest.mark.parametrize(("numbers", "layers"), CASES.items(), ids=map(str, CASES))
@pytest.mark.parametrize("turned", [False, True])
def test_every_layer_comes_from_its_expert(
    numbers: tuple[int, int, int], layers: str, turned: bool, tiny_models: Tiny, tmp_path: Path
) -> None:
    if turned and numbers != (1, 1, 0):
        pytest.skip("once is enough")
    experts = list(tiny_models.experts[:2])
    language, task = reversed(experts) if turned else experts
    parameters = dict(zip(("bottom", "top", "transition"), numbers, strict=True))
    found = merged(tmp_path, "layer_swap", [tiny_models.base, language, task], parameters)
    one, two = read(language), read(task)
    for name, tensor in found.items():
        part = layers[int(name.split(".")[2])] if name.startswith("model.layers.") else "L"
        expected = {"L": one, "T": two}.get(part, {name: (one[name] + two[name]) / 2})
        np.testing.assert_array_equal(tensor, expected[name].astype(np.float32), err_msg=name)


@pytest.mark.parametrize("numbers", [(3, 2, 0), (1, 1, 2), (5, 0, 0)])
def test_more_layers_than_there_are_is_an_error(
    numbers: tuple[int, int, int], tiny_models: Tiny, tmp_path: Path
) -> None:
    parameters = dict(zip(("bottom", "top", "transition"), numbers, strict=True))
    with pytest.raises(RecipeError, match="more than the 4 layers"):
        merged(tmp_path, "layer_swap", [tiny_models.base, *tiny_models.experts[:2]], parameters)


def recipe_of(tiny_models: Tiny, tmp_path: Path, parameters: dict[str, Any]) -> str:
    data = {
        "merge_method": "layer_swap",
        "base_model": str(tiny_models.base),
        "models": [{"model": str(e)} for e in tiny_models.experts[:2]],
    }
    path = tmp_path / "swap.yml"
    path.write_text(yaml.safe_dump(data | ({"parameters": parameters} if parameters else {})))
    return str(path)


def test_a_check_sees_too_many_layers_before_anything_is_merged(
    tiny_models: Tiny, tmp_path: Path
) -> None:
    options = compat.MergeOptions()
    fitting = recipe_of(tiny_models, tmp_path, {"bottom": 1, "top": 1, "transition": 1})
    assert "2 experts" in jobs.check(fitting, options)
    deep = recipe_of(tiny_models, tmp_path, {"bottom": 1, "top": 2, "transition": 1})
    with pytest.raises(RecipeError, match=r"swap\.yml:\d+: parameters: 1 layers .* the 4 layers"):
        jobs.check(deep, options)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        (
            {"bottom": 1},
            r"parameters: 'layer_swap' needs 'top': write `parameters: \{top: VALUE\}`",
        ),
        ({}, "parameters: 'layer_swap' needs 'bottom': write .* in the recipe; .*show layer_swap"),
        (
            {"bottom": 1, "top": [{"filter": "mlp", "value": 1}]},
            r"parameters: 'top' has no value for model\.\S+: add one without a `filter`",
        ),
    ],
)
def test_a_missing_number_says_what_to_write_and_where(
    parameters: dict[str, Any], said: str, tiny_models: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=rf"swap\.yml:\d+: {said}"):
        jobs.check(recipe_of(tiny_models, tmp_path, parameters), compat.MergeOptions())


@pytest.mark.parametrize(("count", "said"), [(1, "is 1"), (3, "are 3")])
def test_a_recipe_with_more_or_fewer_experts_says_so(
    count: int, said: str, tiny_models: Tiny, tmp_path: Path
) -> None:
    path = Path(recipe_of(tiny_models, tmp_path, {"bottom": 1, "top": 1}))
    recipe = yaml.safe_load(path.read_text())
    recipe["models"] = [{"model": str(e)} for e in tiny_models.experts[:count]]
    path.write_text(yaml.safe_dump(recipe))
    wanted = rf"swap\.yml:\d+: models: 'layer_swap' merges 2 experts, and here {said} beside"
    with pytest.raises(RecipeError, match=wanted):
        jobs.check(str(path), compat.MergeOptions())


def test_an_expert_far_from_the_base_arrives_bit_for_bit() -> None:
    """T0 + (T1 - T0) would not give T1 back."""
    base, expert = torch.full((3,), 1e8), torch.tensor([1e-8, 1.5, -3.0])
    swapped = merge_tensors([base, expert, base], "layer_swap", base_index=0,
                            name="model.layers.0.mlp.up_proj.weight",
                            parameters={"bottom": 1, "top": 1})  # fmt: skip
    assert torch.equal(swapped, expert)
