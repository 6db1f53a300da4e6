"""What the engine reckons with for a tensor: as the methods say it, before a merge and in it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mergekit_unconstrained import compat
from mergekit_unconstrained.cli import main
from mergekit_unconstrained.engine import budget
from mergekit_unconstrained.engine.footprint import (
    KEPT_BY_ALLOCATOR,
    PIECES,
    OneTensor,
    per_entry,
    per_matrix,
)
from mergekit_unconstrained.engine.plan import make_plan
from mergekit_unconstrained.engine.workers import Job, Workers
from mergekit_unconstrained.jobs import load_recipe
from mergekit_unconstrained.numerics.roles import Role
from tests.conftest import TinyModels

BENCH = Path(__file__).resolve().parents[1] / "bench"
RECIPES = sorted((BENCH.parents[1] / "recipes" / "methods").glob("*.yml"))


def recipe_of(models: TinyModels, method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(models.base),
        "models": [{"model": str(m)} for m in models.experts[:2]],
        "parameters": parameters,
    }


def test_bytes_of_entries_and_experts_add_up() -> None:
    one = OneTensor(Role("up", 0), (5, 7), 3, {})
    assert per_entry(4, 2)(one) == 35 * (4 + 3 * 2 + 16)
    assert per_matrix(20, 4, square=40, columns=8)(one) == 2 * (35 * 32 + 40 * 25 + 8 * 49)
    large = OneTensor(Role("up", 0), (5000, 7000), 3, {})
    assert per_entry(4, 2)(large) == 350_000_000 + PIECES
    assert per_entry(4, 2, 99)(large) == 350_000_099 + PIECES
    assert per_matrix(20)(large) == 35_000_000 * 32 + KEPT_BY_ALLOCATOR
    assert per_matrix(20)(OneTensor(Role("head"), (5, 7), 3, {})) is None
    assert per_matrix(20)(OneTensor(Role("up", 0), (2, 5, 7), 3, {})) is None


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "tsvm"},
        {"method": "opcm", "dtype": "float32"},
        {"method": "widen", "dtype": "float64"},
        {"method": "pcb", "scope": "model", "out_dtype": "float16"},
    ],
    ids=lambda recipe: recipe["method"],
)
def test_a_plan_reckons_as_the_merge_does(
    recipe: dict[str, Any], tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes = {key: recipe[key] for key in ("dtype", "out_dtype") if key in recipe}
    own = {key: value for key, value in recipe.items() if key == "scope"}
    (tmp_path / "recipe.yml").write_text(
        yaml.safe_dump({**recipe_of(tiny_models, recipe["method"], **own), **dtypes})
    )
    reckoned: dict[str, int] = {}
    work = Workers.work

    def noting(self: Workers, job: Job) -> str:
        reckoned[job.output.name] = job.footprint
        return work(self, job)

    monkeypatch.setattr(Workers, "work", noting)
    monkeypatch.setenv("MERGEKIT_UNCONSTRAINED_CACHE", str(tmp_path / "cache"))
    arguments = ["yaml", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--quiet"]
    result = CliRunner().invoke(main, [*arguments, "--no-write-model-card"])
    assert result.exit_code == 0, result.output
    plan = make_plan(*load_recipe(str(tmp_path / "recipe.yml")), compat.MergeOptions())
    with budget.using(budget.MergeContext(plan.roles)):
        assert {job.output.name: job.footprint for job in budget._jobs(plan)} == reckoned
    monkeypatch.setattr(budget, "cores", lambda: 2)
    assert budget.most_memory(plan) == sum(sorted(reckoned.values())[-2:])


@pytest.mark.parametrize("command", ["check", "plan", "yaml"])
def test_a_budget_that_is_too_small_is_said_before_anything_is_read(
    command: str, tiny_models: TinyModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [command, str(tmp_path / "recipe.yml")]
    arguments += [str(tmp_path / "out"), "--dry-run"] if command == "yaml" else []

    def said(memory: str, **parameters: Any) -> str:
        caplog.clear()
        recipe = recipe_of(tiny_models, "tsvm", memory_budget=memory, **parameters)
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        return caplog.text

    caplog.set_level(logging.WARNING)
    text = said("200KB")
    assert "_proj.weight alone takes about" in text
    assert "more than memory_budget" in text
    least = text.partition("`memory_budget: ")[2].partition("`")[0]
    assert least.endswith("MiB")
    assert said(least) == ""
    assert said("200KB", engine="mergekit") == ""


# -- measured -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """One layer of 1,024 with an embedding and a head of 32,000 rows, bf16, and two experts."""
    sys.path.insert(0, str(BENCH))
    import measure

    measure.SIZES["one"] = {"hidden_size": 1024, "num_hidden_layers": 1, "vocab_size": 32_000}
    base, experts = measure.random_llamas(tmp_path_factory.mktemp("large"), "one", experts=2)
    return TinyModels(base, tuple(experts))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_tensor_takes_more_than_its_footprint_nor_a_gibibyte(
    path: Path, large: TinyModels, tmp_path: Path
) -> None:
    recipe = yaml.safe_load(path.read_text())
    recipe["base_model"] = str(large.base)
    for model, folder in zip(recipe["models"], large.experts, strict=True):
        model["model"] = str(folder)
    few = {"steps": 2, "bottom": 1, "top": 0, "transition": 0}
    recipe["parameters"].update({k: few[k] for k in few.keys() & recipe["parameters"].keys()})
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "out").mkdir()
    command = [sys.executable, str(BENCH / "growth.py"), "recipe.yml", "out"]
    env = {**os.environ, "MERGEKIT_UNCONSTRAINED_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=env, check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["tensors"]) == 12
    for name, shape, footprint, grown in found["tensors"]:
        if len(shape) > 1:
            assert grown <= footprint <= 1 << 30, name
    assert found["prepass"] <= 1 << 29
