"""Every YAML in recipes/ is read strictly, wherever it lies: recipes, tables, settings files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mergekit_unconstrained import compat, jobs
from mergekit_unconstrained.config.document import Document, walk
from mergekit_unconstrained.config.recipe import check_recipe
from mergekit_unconstrained.config.table import load_table
from mergekit_unconstrained.evaluation.settings import load_tasks, read_tasks
from mergekit_unconstrained.fusion.settings import FusionSettings, load_settings
from mergekit_unconstrained.jobs.families import read_families
from mergekit_unconstrained.search.settings import load_settings as load_search

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "recipes").rglob("*.yml"))
HEADINGS = ("Question", "Parents", "Command")


def is_recipe(path: Path) -> bool:
    return "merge_method" in yaml.safe_load(path.read_text())


def is_search(path: Path) -> bool:
    return "recipe" in yaml.safe_load(path.read_text())


def is_tasks(path: Path) -> bool:
    return "tasks" in yaml.safe_load(path.read_text()) and not is_search(path)


def is_families(path: Path) -> bool:
    return "families" in yaml.safe_load(path.read_text())


def is_settings(path: Path) -> bool:
    """Whether a file is a fusion's settings file: no recipe, search, table or tasks."""
    others = is_recipe(path) or is_search(path) or is_tasks(path)
    return not others and "experts" not in (yaml.safe_load(path.read_text()) or {})


def test_there_are_recipes_of_every_kind() -> None:
    recipes = [yaml.safe_load(f.read_text())["merge_method"] for f in FILES if is_recipe(f)]
    assert len(recipes) >= 5
    assert {"layerwise", "unconstrained"} <= set(recipes)
    assert any(is_settings(f) for f in FILES)
    assert any(is_families(f) for f in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_recipe_and_table_is_read_without_complaint(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if is_settings(path):
        assert load_settings(path) != FusionSettings(), "says nothing but defaults"
        return
    if is_search(path):
        settings, document = load_search(path)
        read_tasks(document, path.parent)
        assert compat.is_ours(compat.get(settings.recipe["merge_method"]))
        return
    if is_families(path):
        families = read_families(path)
        assert is_tasks(families.tasks_file)
        return
    if is_tasks(path):
        kinds = [task.settings.kind for task in load_tasks(path, allow_code=True)]
        assert len(set(kinds)) == len(kinds) - 1  # one of a kind, and two benchmarks
        return
    if not is_recipe(path):
        load_table(str(path))
        return
    document, _, method = jobs.load_recipe(str(path))
    if compat.is_ours(method):
        check_recipe(document, method)
    settings = (document.data.get("parameters") or {}).get("settings")
    if settings:
        assert is_settings(ROOT / settings)
    table = (document.data.get("parameters") or {}).get("coefficients")
    if table:
        models = [m["model"] for m in document.data["models"]]
        parsed = load_table(table)
        assert {parsed.key_for(m) for m in models} == set(parsed.experts)


@pytest.mark.parametrize(
    "path",
    [f for f in FILES if is_recipe(f) or is_search(f) or is_tasks(f)],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_every_recipe_says_what_it_asks_needs_and_costs(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    for heading in HEADINGS:
        assert heading in header, f"{path.name} has no {heading!r} in its header"
    command = "mergekit-yaml"
    if is_search(path):
        command = "mergekit-unconstrained search"
    elif is_tasks(path):
        option = (
            "select MODEL ... --families" if is_families(path) else "evaluate MODEL ... --tasks"
        )
        command = f"mergekit-unconstrained {option}"
    assert f"{command} {path.relative_to(ROOT).as_posix()}" in header


def test_recipes_name_no_absolute_path() -> None:
    for path in FILES:
        for _, value in walk(Document.read(path).data):
            assert not (isinstance(value, str) and Path(value).is_absolute()), f"{path}: {value}"
