"""From sliders to a recipe: what the recipe says is what was chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_unconstrained import _activate, compat
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.recipe import check_recipe
from mergekit_unconstrained.config.table import Coefficients, load_table
from mergekit_unconstrained.numerics.roles import Role
from mergekit_unconstrained.numerics.settings import OPERATORS
from mergekit_unconstrained.space.state import (
    Curve,
    Expert,
    Group,
    State,
    kinds_of,
    recipe_text,
    start,
    takes_density,
)

NAMES = ("org/math", "deep/code", "one_more")


@pytest.fixture(autouse=True)
def _hook() -> None:
    _activate.install()


def state_of(experts: dict[str, Expert], layers: int = 6, **others: Any) -> State:
    group = Group("org/base", tuple(experts), layers)
    return State("org/base", "layerwise", (group,), experts, **others)


def strictly(text: str) -> dict[str, Any]:
    """The recipe's data, after our own strict reader took it."""
    document = Document.parse(text, "recipe.yml")
    check_recipe(document, compat.get(document.data["merge_method"]))
    compat.MergeConfiguration.model_validate(document.data)
    return document.data


def test_a_start_is_the_uniform_merge_and_has_no_table():
    data = strictly(recipe_text(start("org/base", "layerwise", (Group("org/base", NAMES, 6),))))
    assert [m["model"] for m in data["models"]] == list(NAMES)
    assert [m["parameters"] for m in data["models"]] == [{"weight": 0.3333}] * 3
    assert data["parameters"] == {"operator": "task_arithmetic"}


weights = st.floats(-1, 2).map(lambda x: round(x, 2))
curves = st.builds(Curve, weights, weights, weights)


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.lists(
        st.builds(
            Expert,
            st.just(""),
            curves,
            curves,
            weights,
            st.floats(0.05, 1).map(lambda x: round(x, 2)),
        ),
        min_size=1,
        max_size=3,
    ),
    layers=st.integers(1, 40),
    operator=st.sampled_from(sorted(OPERATORS)),
    strength=weights,
)
def test_every_number_of_the_recipe_is_the_sliders(chosen, layers, operator, strength):
    experts = {
        n: Expert(n, e.attention, e.mlp, e.rest, e.density)
        for n, e in zip(NAMES, chosen, strict=False)
    }
    data = strictly(recipe_text(state_of(experts, layers, operator=operator, strength=strength)))
    assert data["parameters"]["operator"] == operator
    assert data["parameters"].get("lambda", 1.0) == pytest.approx(strength, abs=1e-9)
    text = data["parameters"].get("coefficients")
    table = load_table(text) if text else None
    own = {m["model"]: m.get("parameters", {}) for m in data["models"]}
    for name, expert in experts.items():
        knots = np.array([0, (layers - 1) / 2, layers - 1])
        for layer in range(layers):
            for kind, curve in (("q", expert.attention), ("down", expert.mlp)):
                points = [curve.start, curve.middle, curve.end]
                wanted = np.interp(layer, knots, points) if layers > 1 else curve.start
                assert found(table, own, name, Role(kind, layer)).weight == pytest.approx(
                    wanted, abs=5.1e-5
                )
        for role in (Role("norm", 0), Role("embedding")):
            cell = found(table, own, name, role)
            assert cell.weight == pytest.approx(expert.rest, abs=5.1e-5)
            density = expert.density if takes_density(operator) else 1.0
            assert (1.0 if cell.density is None else cell.density) == pytest.approx(density)


def found(table: Any, own: dict[str, Any], name: str, role: Role) -> Any:
    said = Coefficients(own[name].get("weight"), own[name].get("density"))
    return table.lookup(name, role).over(said) if table is not None else said


def test_an_operator_that_keeps_everything_is_told_no_density():
    expert = Expert("org/math", Curve(0, 1, 0), Curve(1, 1, 1), 1.0, density=0.3)
    for operator in OPERATORS:
        text = recipe_text(state_of({"org/math": expert}, operator=operator))
        assert ("density" in text) == takes_density(operator)


def test_kinds_that_a_model_lacks_have_no_rows():
    expert = Expert("org/math", Curve(0, 1, 0), Curve(0, 0, 1), 0.0)
    group = Group("org/base", ("org/math",), 4, kinds_of(("gate", "up", "norm")))
    state = State("org/base", "layerwise", (group,), {"org/math": expert})
    text = strictly(recipe_text(state))["parameters"]["coefficients"]
    assert "mlp" in text
    assert "attention" not in text


def test_a_mixture_names_the_bases_of_other_groups_and_gives_each_its_own_table():
    first = Group("llama", ("llama-math", "llama-code"), 4)
    second = Group("qwen", ("qwen-math", "qwen-code"), 7)
    alone = Group(None, ("gpt",))
    chosen = start("llama", "mixture", (first, second, alone))
    expert = Expert("qwen-math", Curve(0, 0.5, 1), Curve(1, 1, 1), 0.5)
    chosen = dataclasses.replace(chosen, experts={**chosen.experts, "qwen-math": expert})
    data = strictly(recipe_text(chosen))
    parameters = {m["model"]: m.get("parameters") for m in data["models"]}
    assert parameters["llama-math"] == {"weight": 0.5}
    assert parameters["gpt"] is None
    for name in second.experts:
        assert parameters[name]["base"] == "qwen"
        assert load_table(parameters[name]["coefficients"]).layers == 7
    assert data["parameters"]["dataset"] == "problems.jsonl"


def test_a_fusion_names_its_pivot_its_sources_and_its_data():
    groups = (Group(None, ()), Group(None, ("a",)), Group(None, ("b",)))
    data = strictly(recipe_text(start("pivot", "fusion", groups)))
    assert data["base_model"] == "pivot"
    assert data["models"] == [{"model": "a"}, {"model": "b"}]
    assert "operator" not in data["parameters"]


@settings(deadline=None)
@given(name=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_whatever_a_name_is_it_stays_a_name(name):
    expert = Expert(name, Curve(0, 1, 0), Curve(1, 1, 1), 1.0)
    group = Group("base", (name,), 3)
    text = recipe_text(State("base", "layerwise", (group,), {name: expert}))
    data = yaml.safe_load(text)
    assert set(data) == {"merge_method", "base_model", "models", "parameters", "dtype"}
    assert data["models"] == [{"model": name}]


def test_renaming_reaches_everything():
    state = start("base", "layerwise", (Group("base", ("a", "b"), 4),))
    renamed = state.renamed({"base": "/m/base", "a": "/m/a", "b": "/m/b"})
    assert recipe_text(renamed) == recipe_text(state).replace("base\n", "/m/base\n", 1).replace(
        "model: a", "model: /m/a"
    ).replace("model: b", "model: /m/b")


def test_somebodys_own_recipe_counts_instead():
    state = start("base", "layerwise", (Group("base", ("a",), 4),))
    assert recipe_text(dataclasses.replace(state, own="merge_method: linear\n")) == (
        "merge_method: linear\n"
    )
