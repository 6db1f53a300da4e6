"""The recipe that is published is still the recipe."""

from __future__ import annotations

import pytest
import yaml

from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.hub.pinning import TABLE, pinned_recipe

TABLES = "layers: 2\nexperts:\n  a: 0.5\n"


@pytest.mark.parametrize(
    "behind", ["dtype: bfloat16\n", "\n\ndtype: bfloat16\n", "", "# the end\n"]
)
@pytest.mark.parametrize("style", ["|", ">", "|-", "|+", '"'])
def test_a_table_inside_gives_way_to_its_file_and_nothing_else_changes(behind, style):
    indented = "".join(f"    {line}\n" for line in TABLES.splitlines())
    value = f"{style}\n{indented}" if style != '"' else '"a\\nb"\n'
    text = f"merge_method: layerwise\nparameters:\n  coefficients: {value}{behind}"
    wanted = yaml.safe_load(text)
    wanted["parameters"]["coefficients"] = TABLE
    found = pinned_recipe(Document.parse(text, "recipe.yml"), {}, has_table=True)
    assert yaml.safe_load(found) == wanted
