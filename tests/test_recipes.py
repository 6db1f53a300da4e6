"""Every YAML in recipes/ is read strictly, wherever it lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mergekit_unconstrained import compat, jobs
from mergekit_unconstrained.config.document import Document, walk
from mergekit_unconstrained.config.recipe import check_recipe
from mergekit_unconstrained.config.table import load_table

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "recipes").rglob("*.yml"))
HEADINGS = ("Question", "Parents", "Command")


def is_recipe(path: Path) -> bool:
    return "merge_method" in yaml.safe_load(path.read_text())


def test_there_are_recipes() -> None:
    assert len([f for f in FILES if is_recipe(f)]) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_recipe_and_table_is_read_without_complaint(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    if not is_recipe(path):
        load_table(str(path))
        return
    document, _, method = jobs.load_recipe(str(path))
    if compat.is_ours(method):
        check_recipe(document, method)
    table = (document.data.get("parameters") or {}).get("coefficients")
    if table:
        models = [m["model"] for m in document.data["models"]]
        parsed = load_table(table)
        assert {parsed.key_for(m) for m in models} == set(parsed.experts)


@pytest.mark.parametrize(
    "path", [f for f in FILES if is_recipe(f)], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_every_recipe_says_what_it_asks_needs_and_costs(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    for heading in HEADINGS:
        assert heading in header, f"{path.name} has no {heading!r} in its header"
    assert f"mergekit-yaml {path.relative_to(ROOT).as_posix()}" in header


def test_recipes_name_no_absolute_path() -> None:
    for path in FILES:
        for _, value in walk(Document.read(path).data):
            assert not (isinstance(value, str) and Path(value).is_absolute()), f"{path}: {value}"
