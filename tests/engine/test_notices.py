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

from mergekit_unconstrained.cli import main
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
