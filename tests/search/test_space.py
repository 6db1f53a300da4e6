"""The genome from a method's own specification, and the recipes that candidates mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeConfiguration
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.recipe import check_recipe
from mergekit_unconstrained.config.table import Table, parse_table
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.numerics.roles import Role
from mergekit_unconstrained.numerics.settings import OPERATORS
from mergekit_unconstrained.search.genome import Gene, Genome, layer_groups
from mergekit_unconstrained.search.settings import GenomeSettings
from mergekit_unconstrained.search.space import Candidate, Space, make_space

LAYERS = 6
EXPERTS = ("org/code", "org/math")


def recipe_of(method: str = "layerwise", **parameters: Any) -> dict[str, Any]:
    models = [{"model": name} for name in EXPERTS]
    return {
        "merge_method": method,
        "base_model": EXPERTS[0] if method in ("slerp", "nearswap", "linear") else "org/base",
        "models": models,
        **({"parameters": parameters} if parameters else {}),
    }


def space_of(recipe: dict[str, Any] | None = None, **genome: Any) -> Space:
    recipe = recipe or recipe_of()
    settings = GenomeSettings(**genome)
    text = yaml.safe_dump({"recipe": recipe, "genome": settings.model_dump()})
    document = Document.parse(text, "search.yml")
    return make_space(document, recipe, compat.get(recipe["merge_method"]), LAYERS, settings)


def names(space: Space) -> list[str]:
    return [g.name for g in space.genome.genes]


def draw(space: Space, seed: int = 0) -> dict[str, float]:
    return space.genome.from_unit(np.random.default_rng(seed).random(len(space.genome)))


def accept(candidate: Candidate) -> dict[str, Any]:
    """The recipe as written, after mergekit and our strict check have read it."""
    document = Document.parse(candidate.text("table.yml"), "merge.yml")
    config = MergeConfiguration.model_validate(document.data)
    check_recipe(document, compat.get(config.merge_method))
    data: dict[str, Any] = document.data
    return data


def table_of(candidate: Candidate) -> Table:
    assert candidate.table is not None
    return parse_table(Document.parse(candidate.table, "table.yml"))


# -- which genes ----------------------------------------------------------------------------------


def test_a_small_genome_in_full() -> None:
    space = space_of(layers=3)
    assert names(space) == [
        "code weight layers 0-2 attention",
        "code weight layers 0-2 mlp",
        "code weight layers 3-5 attention",
        "code weight layers 3-5 mlp",
        "code weight elsewhere",
        "math weight layers 0-2 attention",
        "math weight layers 0-2 mlp",
        "math weight layers 3-5 attention",
        "math weight layers 3-5 mlp",
        "math weight elsewhere",
    ]
    assert space.genome.groups == ((0, 2), (3, 5))
    assert {(g.low, g.high, g.start) for g in space.genome.genes} == {(0.0, 1.5, 0.5)}


@pytest.mark.parametrize(
    ("genome", "count"),
    [
        ({}, 2 * (6 * 2 + 1)),
        ({"layers": 4}, 2 * (2 * 2 + 1)),
        ({"layers": 0}, 2 * (2 + 1)),
        ({"layers": 0, "kinds": ()}, 2),
        ({"layers": 2, "kinds": ()}, 2 * (3 + 1)),
        ({"kinds": ("q", "k", "down")}, 2 * (6 * 3 + 1)),
        ({"models": "tied"}, 6 * 2 + 1),
        ({"outer": "free"}, 2 * (6 * 2 + 1 + 3)),
        ({"outer": "free", "models": "tied", "layers": 0, "kinds": ()}, 1 + 3),
    ],
)
def test_every_part_of_the_genome_counts(genome: dict[str, Any], count: int) -> None:
    space = space_of(**genome)
    assert len(space.genome) == count
    assert len(set(names(space))) == count
    accept(space.candidate(draw(space)))


@pytest.mark.parametrize(
    ("operator", "parameters"),
    [
        ("task_arithmetic", {"weight"}),
        ("linear", {"weight"}),
        ("varm", {"weight"}),
        ("ties", {"weight", "density"}),
        ("dare_ties", {"weight", "density"}),
        ("breadcrumbs", {"weight", "density", "gamma"}),
        ("della", {"weight", "density", "epsilon"}),
        ("sce", {"weight"}),
    ],
)
def test_an_operator_has_the_parameters_that_mean_something(
    operator: str, parameters: set[str]
) -> None:
    space = space_of(recipe_of(operator=operator), layers=0, kinds=())
    assert {g.address[1] for g in space.genome.genes} == parameters
    accept(space.candidate(draw(space)))


def test_every_operator_has_a_genome() -> None:
    for operator in OPERATORS:
        space = space_of(recipe_of(operator=operator))
        accept(space.candidate(space.genome.start))


def test_bounds_come_from_the_meaning() -> None:
    space = space_of(recipe_of(operator="della"), layers=0, kinds=(), models="tied")
    found = {g.address[1]: (g.low, g.high, g.start) for g in space.genome.genes}
    assert found == {
        "weight": (0.0, 1.5, 0.5),
        "density": (0.05, 1.0, 1.0),
        "epsilon": (0.0, 1.0, 0.15),
    }
    (gene,) = space_of(negative_weights=True, layers=0, kinds=(), models="tied").genome.genes
    assert (gene.low, gene.high) == (-1.5, 1.5)


def test_bounds_can_be_given() -> None:
    given = {"weight": {"low": 0.1, "high": 0.9, "start": 0.2}, "lambda": {"low": 0.5, "high": 2}}
    space = space_of(parameters=given, layers=0, kinds=(), models="tied")
    found = {g.address[1]: (g.low, g.high, g.start) for g in space.genome.genes}
    assert found == {"weight": (0.1, 0.9, 0.2), "lambda": (0.5, 2.0, 1.0)}


def test_three_experts_start_at_a_third() -> None:
    recipe = recipe_of()
    recipe["models"] = [{"model": f"org/{name}"} for name in "abc"]
    space = space_of(recipe)
    assert set(space.genome.start.values()) == {0.3333}


def test_models_of_one_short_name_are_told_apart() -> None:
    recipe = recipe_of()
    recipe["models"] = [{"model": "one/math"}, {"model": "two/math"}, {"model": "org/code"}]
    space = space_of(recipe, layers=0, kinds=())
    assert names(space) == ["one/math weight", "two/math weight", "code weight"]
    table = table_of(space.candidate(dict(zip(names(space), (0.1, 0.2, 0.3), strict=True))))
    role = Role("q", 0, LAYERS)
    found = [table.lookup(m, role).weight for m in space.models]
    assert found == [0.1, 0.2, 0.3]


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("genome", "message"),
    [
        ({"parameters": {"wieght": {}}}, r"no number of that name. Did you mean 'weight'"),
        ({"parameters": {"operator": {}}}, r"parameters.operator: layerwise has no number"),
        ({"kinds": ("atention",)}, r"no kind 'atention'. Did you mean 'attention'"),
        ({"kinds": ("embedding",)}, r"no kind 'embedding'"),
        ({"parameters": {"lambda": {}}}, "has no bounds of its own: give `low` and `high`"),
        ({"parameters": {"weight": {"low": 2.0}}}, "needs low < high and a start between them"),
        ({"parameters": {"weight": {"start": 2.0}}}, "needs low < high and a start between them"),
        ({"parameters": {}}, "leaves nothing to search"),
        (
            {"parameters": {"weight": {"low": 0.00001}}},
            "values have 4 decimals, which 1e-05 does not fit",
        ),
        (
            {"parameters": {"seed": {"low": 0.5, "high": 9, "start": 1}}},
            "is a whole number, and 0.5 is none",
        ),
    ],
)
def test_a_wrong_genome_is_one_clear_error(genome: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as found:
        space_of(**genome)
    assert "\n" not in str(found.value)
    assert "search.yml" in str(found.value)


def test_a_recipe_without_models_is_an_error() -> None:
    with pytest.raises(RecipeError, match="names no models"):
        space_of({"merge_method": "layerwise", "base_model": "org/base", "models": []})


def test_every_method_has_a_genome_or_says_why_not() -> None:
    with_genome, refused = set(), {}
    for method in compat.registered():
        if isinstance(method, compat.ModelMethod):
            continue
        recipe = recipe_of(method.spec.name)
        try:
            space = space_of(
                recipe, layers=3, kinds=() if method.spec.name == "layerwise" else ("attn", "mlp")
            )
        except RecipeError as error:
            refused[method.spec.name] = str(error)
            continue
        with_genome.add(method.spec.name)
        for seed in range(3):
            accept(space.candidate(draw(space, seed)))
    assert all("\n" not in message for message in refused.values())
    assert with_genome >= {
        "linear", "slerp", "nuslerp", "multislerp", "nearswap", "task_arithmetic", "ties",
        "dare_ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear",
    }  # fmt: skip


# -- candidates of layerwise ----------------------------------------------------------------------


def inner(kind: str, layer: int) -> Role:
    return Role(kind, layer, LAYERS)


@pytest.mark.parametrize("seed", range(5))
def test_the_table_says_what_the_candidate_is(seed: int) -> None:
    space = space_of(
        recipe_of(operator="ties"),
        layers=4, kinds=("q", "mlp"), outer="free", negative_weights=True,
    )  # fmt: skip
    values = draw(space, seed)
    table = table_of(space.candidate(values))
    for model in EXPERTS:
        name = model.removeprefix("org/")
        for parameter in ("weight", "density"):

            def said(role: Role, model: str = model, parameter: str = parameter) -> float:
                return float(getattr(table.lookup(model, role), parameter))

            for layer in range(LAYERS):
                place = f"{name} {parameter} layers {'4-5' if layer > 3 else '0-3'}"
                assert said(inner("q", layer)) == values[f"{place} q"]
                assert said(inner("up", layer)) == values[f"{place} mlp"]
                assert said(inner("down", layer)) == values[f"{place} mlp"]
                assert said(inner("k", layer)) == values[f"{name} {parameter} elsewhere"]
                assert said(inner("norm", layer)) == values[f"{name} {parameter} elsewhere"]
            for kind in ("embedding", "final_norm", "head"):
                assert said(Role(kind)) == values[f"{name} {parameter} {kind}"]
            assert said(Role("other")) == values[f"{name} {parameter} elsewhere"]


@pytest.mark.parametrize(
    "kinds", [("q", "k"), ("q", "gate"), ("gate", "up"), ("attention", "q", "k"), ("all", "up")]
)
def test_equal_values_of_some_kinds_say_nothing_of_others(kinds: tuple[str, ...]) -> None:
    space = space_of(layers=0, kinds=kinds)
    elsewhere = {"code weight elsewhere": 0.7, "math weight elsewhere": 0.7}
    at_the_bound = dict.fromkeys(names(space), 0.0) | elsewhere
    table = table_of(space.candidate(at_the_bound))
    covered = {"q", "k", "v", "o"} if "attention" in kinds else set(kinds)
    for kind in ("q", "k", "v", "o", "gate", "up", "down", "norm"):
        expected = 0.0 if kind in covered or "all" in kinds else 0.7
        assert table.lookup(EXPERTS[0], inner(kind, 2)).weight == expected, kind


def test_layers_alone_have_all_kinds() -> None:
    space = space_of(layers=3, kinds=())
    values = draw(space)
    table = table_of(space.candidate(values))
    for kind in ("q", "norm", "up"):
        assert table.lookup(EXPERTS[1], inner(kind, 5)).weight == values["math weight layers 3-5"]
    assert table.lookup(EXPERTS[1], Role("head")).weight == values["math weight elsewhere"]


def test_values_tied_between_models_are_equal() -> None:
    space = space_of(recipe_of(operator="della"), models="tied", layers=3)
    candidate = space.candidate(draw(space))
    table = table_of(candidate)
    for role in (inner("q", 0), inner("up", 5), Role("head")):
        assert table.lookup(EXPERTS[0], role) == table.lookup(EXPERTS[1], role)
    one, two = accept(candidate)["models"]
    assert one["parameters"] == two["parameters"] == {"epsilon": draw(space)["epsilon"]}


def test_what_a_table_cannot_hold_lands_in_the_recipe() -> None:
    given = {"weight": {}, "lambda": {"low": 0.0, "high": 2.0}, "gamma": {}}
    space = space_of(recipe_of(operator="breadcrumbs", seed=3), parameters=given)
    values = draw(space)
    data = accept(space.candidate(values))
    assert data["parameters"] == {
        "operator": "breadcrumbs",
        "seed": 3,
        "lambda": values["lambda"],
        "coefficients": "table.yml",
    }
    for entry, name in zip(data["models"], ("code", "math"), strict=True):
        assert entry["parameters"] == {"gamma": values[f"{name} gamma"]}


def test_a_whole_number_stays_whole() -> None:
    space = space_of(parameters={"weight": {}, "seed": {"low": 0, "high": 9}}, layers=0, kinds=())
    for seed in range(5):
        data = accept(space.candidate(draw(space, seed)))
        assert float(data["parameters"]["seed"]).is_integer()


def test_a_base_among_the_models_has_no_coefficients() -> None:
    recipe = recipe_of()
    recipe["models"].insert(0, {"model": "org/base"})
    for models in ("free", "tied"):
        space = space_of(recipe, models=models)
        candidate = space.candidate(draw(space))
        assert set(table_of(candidate).experts) == {"code", "math"}
        accept(candidate)


def test_the_recipe_itself_is_not_touched() -> None:
    recipe = recipe_of("ties", **{"lambda": 0.5})
    before = json.dumps(recipe)
    space = space_of(recipe)
    assert space.candidate(draw(space, 1)).recipe != space.candidate(draw(space, 2)).recipe
    assert json.dumps(recipe) == before


def test_a_fixed_gene_keeps_its_start() -> None:
    space = space_of(layers=3, kinds=())
    genome = space.genome.fixing(lambda g: g.address[2] == 1)
    fixed = Space(space.recipe, genome, space.layers, space.models, space.in_table)
    values = draw(fixed)
    assert len(values) == 4
    table = table_of(fixed.candidate(values))
    assert table.lookup(EXPERTS[0], inner("q", 5)).weight == 0.5
    assert table.lookup(EXPERTS[0], inner("q", 0)).weight == values["code weight layers 0-2"]


# -- candidates of every other method -------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_slices_cover_every_layer_once(size: int) -> None:
    space = space_of(recipe_of("ties", **{"lambda": 0.5}), layers=size, kinds=("attn",))
    data = accept(space.candidate(draw(space)))
    assert "models" not in data
    assert data["parameters"] == {"lambda": 0.5}
    covered = []
    for part in data["slices"]:
        ranges = {tuple(s["layer_range"]) for s in part["sources"]}
        assert len(ranges) == 1
        covered += list(range(*ranges.pop()))
        assert [s["model"] for s in part["sources"]] == [*EXPERTS, "org/base"]
    assert covered == list(range(LAYERS))


def test_kinds_are_mergekits_filters_the_rest_last() -> None:
    space = space_of(recipe_of("task_arithmetic"), layers=0, kinds=("attn", "mlp"),
                     parameters={"weight": {}})  # fmt: skip
    values = draw(space)
    data = accept(space.candidate(values))
    assert data["models"][1]["parameters"]["weight"] == [
        {"filter": "attn", "value": values["math weight attn"]},
        {"filter": "mlp", "value": values["math weight mlp"]},
        {"filter": None, "value": values["math weight"]},
    ]


def test_the_t_of_slerp_belongs_to_the_whole_slice() -> None:
    space = space_of(recipe_of("slerp"), layers=3, kinds=())
    assert names(space) == ["t layers 0-2", "t layers 3-5"]
    assert space.genome.start == {"t layers 0-2": 0.5, "t layers 3-5": 0.5}
    values = draw(space)
    data = accept(space.candidate(values))
    for part, value in zip(data["slices"], values.values(), strict=True):
        assert part["parameters"] == {"t": value}
        assert all("parameters" not in s for s in part["sources"])
    flat = space_of(recipe_of("slerp"), layers=0, kinds=())
    assert accept(flat.candidate({"t": 0.25}))["parameters"] == {"t": 0.25}


def test_the_parameters_of_a_model_are_kept() -> None:
    recipe = recipe_of("ties")
    recipe["models"][0]["parameters"] = {"density": 0.3, "weight": 9.0}
    space = space_of(recipe, layers=3, kinds=(), parameters={"weight": {}})
    values = draw(space)
    for part, place in zip(accept(space.candidate(values))["slices"], ("0-2", "3-5"), strict=True):
        expected = {"density": 0.3, "weight": values[f"code weight layers {place}"]}
        assert part["sources"][0]["parameters"] == expected


# -- genes ----------------------------------------------------------------------------------------


def test_groups_of_layers() -> None:
    assert layer_groups(7, 3) == ((0, 2), (3, 5), (6, 6))
    assert layer_groups(4, 4) == ((0, 3),)
    assert layer_groups(3, 9) == ((0, 2),)
    genome = Genome((), layer_groups(7, 3))
    assert [genome.group_of(i) for i in range(7)] == [0, 0, 0, 1, 1, 1, 2]


def test_the_unit_cube_and_back() -> None:
    space = space_of(negative_weights=True)
    values = draw(space)
    assert space.genome.from_unit(space.genome.to_unit(values)) == values
    corners = space.genome.from_unit([-0.5, 1.5] * (len(space.genome) // 2))
    assert set(corners.values()) == {-1.5, 1.5}


def test_values_are_what_a_recipe_can_say() -> None:
    gene = Gene(("m", "weight", None, ""), -1.0, 1.0, 0.0)
    assert gene.rounded(0.123456) == 0.1235
    assert gene.rounded(7.0) == 1.0
    whole = Gene(("m", "seed", None, ""), 0.0, 9.0, 0.0, whole=True)
    assert whole.rounded(3.6) == 4.0


def test_the_text_names_the_table(tmp_path: Path) -> None:
    space = space_of()
    candidate = space.candidate(draw(space))
    path = str(tmp_path / "a table.yml")
    assert yaml.safe_load(candidate.text(path))["parameters"]["coefficients"] == path
    other = space_of(recipe_of("ties"))
    assert "coefficients" not in other.candidate(draw(other)).text(path)
