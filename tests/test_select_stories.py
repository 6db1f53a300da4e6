"""`select` on the homogeneous zoo and two strangers: the right experts, and a recipe that runs.

Minutes: the zoo is trained unless STORIES names a folder that holds it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_unconstrained.cli import main
from mergekit_unconstrained.demo.stories_data import Stories
from mergekit_unconstrained.demo.stories_models import RECIPES, make
from mergekit_unconstrained.demo.stories_tasks import write_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, expert_a, expert_b; untrained; novice: a twentieth of expert_a's training."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("stories")
    known = os.environ.get("STORIES")
    if known:
        for recipe in RECIPES:
            shutil.copytree(Path(known) / recipe.name, folder / recipe.name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stories = Stories()
    write_tasks(stories, folder)
    expert = next(r for r in RECIPES if r.name == "expert_a")
    for recipe in (*RECIPES, replace(expert, name="novice", steps=expert.steps // 20, rounds=1)):
        make(recipe, stories, folder)
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "base"))
    model.save_pretrained(folder / "untrained")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "untrained")
    return folder


def test_select_finds_the_experts_among_strangers_and_its_recipe_runs(
    zoo: Path, tmp_path: Path
) -> None:
    families = tmp_path / "families.yml"
    told = {
        "families": {"operations": ["verb"], "notations": ["notation"], "plain": ["base_skill"]},
        "experts": ["operations", "notations"],
        "tasks": str(zoo / "tasks.yml"),
        "base": str(zoo / "base"),
    }
    families.write_text(yaml.safe_dump(told))
    names = ("untrained", "novice", "expert_b", "base", "expert_a")
    out = tmp_path / "selected.yml"
    arguments = ["--families", families, "--out", out, "--batch-size", 60]
    result = CliRunner().invoke(
        main, ["select", *(str(zoo / n) for n in names), *map(str, arguments)]
    )
    assert result.exit_code == 0, result.output
    recipe = yaml.safe_load(out.read_text())["recipe"]
    assert recipe["base_model"] == str(zoo / "base")
    assert [m["model"] for m in recipe["models"]] == [str(zoo / "expert_a"), str(zoo / "expert_b")]
    merged = tmp_path / "merged"
    result = CliRunner().invoke(main, ["search", str(out), str(merged), "--budget", "4"])
    assert result.exit_code == 0, result.output
    report = json.loads((merged / "report.json").read_text())
    assert [task["name"] for task in report["tasks"]] == ["verb", "notation"]
    assert (merged / "model.safetensors").is_file()
