"""A recipe that somebody typed: strict, small, and away from files."""

from __future__ import annotations

import pytest

from mergekit_unconstrained.errors import ModelError, RecipeError
from mergekit_unconstrained.space.own_recipe import checked, runnable

GOOD = """\
merge_method: layerwise
base_model: base
models:
  - model: a
    parameters: {weight: 0.5}
  - model: org/b
    parameters: {weight: [0, 1]}
parameters: {operator: ties}
"""


def test_a_good_one_names_its_models():
    assert runnable(checked(GOOD)) == ("base", ("a", "org/b"))


def test_a_table_inside_is_taken():
    table = "  coefficients: |\n    layers: 2\n    experts: {a: 0.5, b: 0.1}\n"
    text = GOOD.replace("parameters: {operator: ties}\n", "parameters:\n" + table)
    assert runnable(checked(text))[0] == "base"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("operator", "operater"), r"recipe\.yml:8.*operator"),
        (("layerwise", "layerwize"), "layerwise"),
        (("layerwise", "linear"), "mergekit's own"),
        (("merge_method: layerwise\n", ""), "merge_method"),
        (("weight: 0.5", "weight: high"), r"recipe\.yml:5"),
        (("models:", "models: ["), "not YAML"),
        ((GOOD, "- 1"), "mapping"),
        ((GOOD, "a: &a [1]\nb: *a"), "aliases"),
        ((GOOD, "# " + "x" * 70_000), "limit"),
        ((GOOD, "!!python/object/apply:os.system ['id']"), "YAML"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(RecipeError, match=message):
        checked(GOOD.replace(*change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("base_model: base", "base_model: /etc"), "no model's name"),
        (("base_model: base", "base_model: ../up"), "no model's name"),
        (("model: a", "model: a+/home/adapter"), "no model's name"),
        (("{operator: ties}", "{operator: ties, coefficients: /etc/passwd}"), "table itself"),
        (("parameters: {operator", "tokenizer_source: /etc\nparameters: {operator"), "base"),
        (("parameters: {operator", "chat_template: /etc/x\nparameters: {operator"), "not taken"),
        (("parameters: {operator", "slices: []\nparameters: {operator"), "not taken"),
    ],
)
def test_what_would_reach_a_file_does_not_run(change, message):
    with pytest.raises((RecipeError, ModelError), match=message):
        runnable(checked(GOOD.replace(*change)))


def test_a_fusion_is_checked_and_not_run():
    text = "merge_method: distribution_fusion\nbase_model: a\nmodels: [{model: b}]\n"
    document = checked(text)
    with pytest.raises(RecipeError, match="only `layerwise` runs here"):
        runnable(document)
