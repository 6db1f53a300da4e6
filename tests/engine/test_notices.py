"""What is said of a plan before it runs, by every command that looks at it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from mergekit_unconstrained import cli
from mergekit_unconstrained.cli import main
from mergekit_unconstrained.jobs.recipes import plan_recipe
from tests.conftest import TinyModels
from tests.engine.test_workers import recipe_of


def said(
    folder: Path, recipe: dict[str, Any], caplog: pytest.LogCaptureFixture, *command: str
) -> str:
    """What a command prints and warns of."""
    caplog.clear()
    caplog.set_level(logging.WARNING)
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
    name, *options = command
    result = CliRunner().invoke(main, [name, str(folder / "recipe.yml"), *options])
    assert result.exit_code == 0, result.output
    return " ".join((result.output + caplog.text).split())


@pytest.fixture(params=["check", "plan", "--dry-run"])
def command(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    if request.param == "--dry-run":
        return ["yaml", str(tmp_path / "out"), "--dry-run"]
    return [request.param]


def test_models_that_are_one_are_named(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture, command: list[str]
) -> None:
    first, second, _ = tiny_models.experts
    assert "one model" not in said(tmp_path, recipe_of(tiny_models), caplog, *command)
    (tmp_path / "again").symlink_to(first)
    twice = TinyModels(tiny_models.base, (first, second, tmp_path / "again"))
    text = said(tmp_path, recipe_of(twice), caplog, *command)
    assert f"{tmp_path / 'again'} and {first} are one model, which counts twice" in text
    (tmp_path / "base").symlink_to(tiny_models.base)
    same = TinyModels(tiny_models.base, (first, tmp_path / "base"))
    text = said(tmp_path, recipe_of(same), caplog, *command)
    assert f"{tmp_path / 'base'} is the base model itself: its task vector is zero" in text


def test_the_run_itself_names_models_that_are_one(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "again").symlink_to(tiny_models.experts[0])
    twice = TinyModels(tiny_models.base, (tiny_models.experts[0], tmp_path / "again"))
    text = said(tmp_path, recipe_of(twice), caplog, "yaml", str(tmp_path / "out"), "--quiet")
    assert "one model, which counts twice" in text


def test_a_pickled_parent_is_named_beforehand(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture, command: list[str]
) -> None:
    expert = tmp_path / "expert"
    expert.mkdir()
    torch.save(
        load_file(tiny_models.experts[0] / "model.safetensors"), expert / "pytorch_model.bin"
    )
    (expert / "config.json").write_bytes((tiny_models.base / "config.json").read_bytes())
    recipe = recipe_of(TinyModels(tiny_models.base, (expert, tiny_models.experts[1])))
    text = said(tmp_path, recipe, caplog, *command)
    assert f"which cannot be resumed: {expert} is a .bin file" in text
    recipe["parameters"]["engine"] = "mergekit"  # asked for, so there is nothing to say
    assert "cannot be resumed" not in said(tmp_path, recipe, caplog, *command)


def test_options_that_need_mergekits_executor_are_named_beforehand(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    text = said(tmp_path, recipe_of(tiny_models), caplog, "plan", "--no-safe-serialization")
    assert "which cannot be resumed: --no-safe-serialization writes pickles" in text


def test_what_is_read_beforehand_is_in_the_plan(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    assert "beforehand" not in said(tmp_path, recipe_of(tiny_models), caplog, "plan")
    recipe = recipe_of(tiny_models, operator="ties", scope="model", density=0.3)
    size = sum((m / "model.safetensors").stat().st_size for m in tiny_models.experts)
    text = said(tmp_path, recipe, caplog, "plan")
    read = text.partition("beforehand ")[2].split(" read of whole models")[0]
    number, unit = read.split()
    found = float(number) * {"KiB": 2**10, "MiB": 2**20}[unit]
    assert found == pytest.approx(2 * size * 4 / 3, rel=0.05)  # two passes over base and experts


def test_experts_stand_in_the_order_of_the_recipe_whatever_their_names(
    tmp_path: Path, tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """./b is the beginning of ./base, which comes first in the text."""
    monkeypatch.chdir(tmp_path)
    for name, model in zip(
        ("base", "c", "b"), (tiny_models.base, *tiny_models.experts), strict=False
    ):
        Path(name).symlink_to(model)
    recipe = recipe_of(TinyModels(Path("base"), (Path("c"), Path("b"))))
    text = yaml.safe_dump(recipe, sort_keys=False)
    for name in ("base", "c", "b"):
        text = text.replace(f": {name}\n", f": ./{name}\n")
    Path("recipe.yml").write_text(text)
    plan = plan_recipe("recipe.yml")
    assert [e.name for e in plan.experts] == ["./c", "./b"]


def test_our_warnings_come_without_the_names_of_modules(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    cli._merge_options([])
    logging.getLogger("mergekit_unconstrained.engine.workers").warning("%d legs", 6)
    logging.getLogger("somebody.else").warning("two feelers")
    said = capsys.readouterr().err.splitlines()
    assert said == ["Warning: 6 legs", "WARNING:somebody.else:two feelers"]


def test_lines_are_the_files_where_an_option_goes_before_the_recipe(
    tmp_path: Path, tiny_models: TinyModels
) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(
        f"""merge_method: layerwise
base_model: {tiny_models.base}
models:
  - {{model: {tiny_models.experts[0]}, parameters: {{weight: 0.5}}}}
  - {{model: {tiny_models.experts[1]}, parameters: {{wieght: 0.5}}}}
"""
    )
    for options in ([], ["--dry-run"], ["--memory-budget", "1GiB"]):
        result = CliRunner().invoke(main, ["yaml", str(path), str(tmp_path / "out"), *options])
        assert result.exit_code == 1
        assert "recipe.yml:5: models[1].parameters.wieght" in "".join(result.output.split("\n"))


@pytest.mark.parametrize("count", ["0", "-1"])
def test_no_threads_are_refused(tmp_path: Path, tiny_models: TinyModels, count: str) -> None:
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_of(tiny_models)))
    arguments = ["yaml", str(tmp_path / "recipe.yml"), str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*arguments, "--num-threads", count])
    assert result.exit_code == 2
    assert "--num-threads: one at least" in result.output


def test_fast_says_that_it_does_nothing_for_ours_and_what_cannot_be_planned(
    tmp_path: Path, tiny_models: TinyModels, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tiny_models)
    text = said(tmp_path, recipe, caplog, "yaml", str(tmp_path / "o"), "--fast", "--dry-run")
    assert "--fast is for mergekit's own methods: layerwise is always so" in text
    recipe["merge_method"] = "task_arithmetic"
    recipe["models"].append(recipe["models"][0])
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    arguments = ["yaml", str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--fast"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "Error: the recipe cannot be planned: Duplicate merge inputs" in result.output
