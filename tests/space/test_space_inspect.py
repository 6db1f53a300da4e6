"""From names to a verdict, without a weight."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.space import confine, inspect
from mergekit_unconstrained.space.state import Curve, Expert, recipe_text, start


@pytest.fixture
def look(models_dir):
    def look(name: str) -> inspect.Model:
        folder = confine.local_model(models_dir, name)
        assert folder is not None
        return inspect.look(name, folder)

    return look


def test_a_model_is_known_from_its_config_and_headers(look):
    found = look("llama/expert2")
    assert (found.architecture, found.layers, found.licence) == ("LlamaForCausalLM", 4, "mit")
    assert found.kinds == ("attention", "mlp")
    assert (found.parameters, found.dtype) == (180_800, "BF16")


def test_models_of_one_architecture_are_merged(look):
    found = inspect.verdict(look("llama/base"), [look("llama/expert1"), look("llama/expert2")])
    assert found.way == "layerwise"
    (group,) = found.groups
    assert (group.base, group.experts, group.layers) == (
        "llama/base",
        ("llama/expert1", "llama/expert2"),
        4,
    )
    assert (found.licence.status, found.licence.effective) == ("clear", "apache-2.0")


def test_models_of_different_architectures_are_fused_and_the_reason_is_said(look):
    found = inspect.verdict(look("llama/base"), [look("qwen2/expert1")])
    assert found.way == "fusion"
    (reason,) = found.reasons
    assert "qwen2/expert1 is a Qwen2ForCausalLM" in reason
    assert "--allow-crimes" not in reason
    assert not found.problems


def test_a_mixture_needs_the_base_of_every_other_group(look):
    experts = [look(n) for n in ("llama/expert1", "qwen2/expert1", "qwen2/expert2")]
    found = inspect.verdict(look("llama/base"), experts)
    assert (found.way, found.need_base) == ("mixture", True)
    assert "qwen2/expert1 and qwen2/expert2 share an architecture" in found.problems[0]
    found = inspect.verdict(look("llama/base"), experts, [look("qwen2/base")])
    assert (found.need_base, found.problems) == (False, ())
    assert [g.base for g in found.groups] == ["llama/base", "qwen2/base"]
    assert found.licence.status == "review"  # a teacher's licence is not known


def test_the_way_is_the_one_that_a_recipe_of_unconstrained_takes(look, models_dir):
    """The same rule as jobs/mixture.py, asked through the recipe that the state writes."""
    from mergekit_unconstrained import _activate, compat
    from mergekit_unconstrained.jobs import mixture

    _activate.install()
    experts = [look(n) for n in ("llama/expert1", "qwen2/expert1", "qwen2/expert2")]
    found = inspect.verdict(look("llama/base"), experts, [look("qwen2/base")])
    document = inspect.planned(start("llama/base", found.way, found.groups), found)
    data = {**document.data, "parameters": {**document.data["parameters"], "dataset": "a/b"}}
    document = dataclasses.replace(document, data=data)
    config = compat.MergeConfiguration.model_validate(data)
    mixed = mixture.plan(document, config, compat.get("unconstrained"), compat.MergeOptions())
    planned = [tuple(found.public(m.name) for m in g.members) for g in mixed.groups]
    assert planned == [g.experts for g in found.groups]


def test_what_a_merge_takes_and_the_weights_of_every_tensor(look):
    found = inspect.verdict(look("llama/base"), [look("llama/expert1"), look("llama/expert2")])
    state = start("llama/base", "layerwise", found.groups)
    expert = Expert("llama/expert1", Curve(0.0, 0.3, 0.9), Curve(1, 1, 1), 0.5)
    state = dataclasses.replace(state, experts={**state.experts, "llama/expert1": expert})
    plan = inspect.plan(state, found)
    grid = inspect.grid(plan, found)
    assert list(grid.experts) == ["llama/expert1", "llama/expert2"]
    # Layers 0..3 are at 0, 1/3, 2/3 and 1 of the depth: 0, 0.2, 0.5, 0.9.
    weights = [grid.experts["llama/expert1"].inner[layer, "q"].weight for layer in range(4)]
    assert weights == pytest.approx([0.0, 0.2, 0.5, 0.9], abs=1e-4)
    cost = inspect.cost_of_merge(plan, lambda _: 12.0)
    size = 180_800 * 2
    assert cost.limit_bytes == 4 * size
    assert "12 s" in " ".join(cost.lines)


def test_a_fusion_has_an_estimate_before_there_is_data(look):
    found = inspect.verdict(look("llama/base"), [look("qwen2/expert1")])
    cost = inspect.cost_of_fusion(start("llama/base", "fusion", found.groups), found)
    assert "1,000 conversations" in cost.lines[0]
    assert "assumed" in cost.lines[0]


def test_no_message_tells_where_the_models_lie(look, models_dir, tmp_path):
    found = inspect.verdict(look("llama/base"), [look("llama/expert1")])
    state = start("llama/base", "layerwise", found.groups)
    text = yaml.safe_dump({**yaml.safe_load(recipe_text(state)), "dtype": "float8"})
    with pytest.raises(Exception) as caught:  # noqa: PT011
        inspect.plan(dataclasses.replace(state, own=text), found)
    assert str(models_dir) not in str(caught.value)


def test_a_model_that_needs_code_of_its_own_is_not_looked_at(models_dir, tmp_path):
    import shutil

    folder = tmp_path / "own-code"
    shutil.copytree(models_dir / "llama/base", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(ModelError, match="own-code"):
        inspect.look("own-code", folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("experts", [[], ["llama/base"], ["llama/expert1", "llama/expert1"]])
def test_nothing_to_merge_or_something_twice_is_said(look, experts):
    with pytest.raises(ModelError, match=r"at least one expert|twice"):
        inspect.verdict(look("llama/base"), [look(n) for n in experts])


def test_too_many_models_are_refused(look):
    base = look("llama/base")
    many = [dataclasses.replace(look("llama/expert1"), name=f"m{i}") for i in range(9)]
    with pytest.raises(ModelError, match="more than 8"):
        inspect.verdict(base, many)


def test_folders_are_absolute(look):
    found = inspect.verdict(look("llama/base"), [look("llama/expert1")])
    assert all(Path(folder).is_absolute() for folder in found.folders.values())
