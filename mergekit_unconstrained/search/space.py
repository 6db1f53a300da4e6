"""The genome of a method, from its own specification; and the recipe that a candidate means.

`layerwise` has a table of coefficients; every other method gets a slice for each group of layers
and conditional values for kinds, which is how mergekit's own search writes its recipes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mergekit_unconstrained.catalog import ALIAS_PREFIX
from mergekit_unconstrained.compat import MergeMethod, ParameterScope, ParameterSpec
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.table import LAYER_WORDS, short_name
from mergekit_unconstrained.config.table_text import dump_table
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.numerics.roles import OUTER_KINDS
from mergekit_unconstrained.numerics.settings import OPERATORS
from mergekit_unconstrained.search.genome import (
    DIGITS,
    Address,
    Gene,
    Genome,
    Values,
    layer_groups,
    place_of,
)
from mergekit_unconstrained.search.settings import GenomeSettings, Range

SHARED = "*"
"""The owner of genes that are no single model's."""
IN_TABLE = ("weight", "density")
FRACTIONS = ("density", "gamma", "epsilon", "t", "select_topk")
"""Between 0 and 1 by their meaning; mergekit's specifications mostly state no bounds."""
LOWEST_DENSITY = 0.05
HIGHEST_WEIGHT = 1.5


@dataclass(frozen=True)
class Candidate:
    """A recipe in full. table: the text of its coefficient table, where it has one."""

    recipe: dict[str, Any]
    table: str | None = None

    def in_one(self) -> str:
        """The recipe as a file of its own, the table as a block of text inside."""
        return self.text(self.table or "")

    def text(self, table_path: str = "coefficients.yml") -> str:
        """The recipe as a file that lies beside its table."""
        recipe = dict(self.recipe)
        if self.table is not None:
            parameters = recipe.get("parameters") or {}
            recipe["parameters"] = {**parameters, "coefficients": table_path}
        return yaml.dump(recipe, Dumper=_Blocks, sort_keys=False)


class _Blocks(yaml.SafeDumper):
    """Writes text of several lines as a block."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Blocks.add_representer(str, _block)


@dataclass(frozen=True)
class Space:
    """What is searched of a recipe. models: as it lists them."""

    recipe: Mapping[str, Any]
    genome: Genome
    layers: int
    models: tuple[str, ...]
    in_table: bool
    smooth: bool = False

    def candidate(self, values: Values) -> Candidate:
        """The recipe with a candidate's values in it."""
        return self._with_table(values) if self.in_table else self._with_slices(values)

    # -- layerwise --------------------------------------------------------------------------------

    def _with_table(self, values: Values) -> Candidate:
        found = self.genome.at(values)
        names = table_names(self.models)
        experts: dict[str, Any] = {}
        recipe = _copy(self.recipe)
        for model, entry in zip(self.models, recipe["models"], strict=True):
            if model == recipe.get("base_model"):
                continue
            cells: dict[tuple[int | None, str], dict[str, float]] = {}
            for (owner, parameter, group, kind), value in found.items():
                if owner not in ("", model):
                    continue
                if parameter in IN_TABLE:
                    cells.setdefault((group, kind), {})[parameter] = value
                else:
                    entry.setdefault("parameters", {})[parameter] = value
            experts[names[model]] = self._expert(cells)
        shared = {p: value for (owner, p, _, _), value in found.items() if owner == SHARED}
        if shared:
            recipe["parameters"] = {**(recipe.get("parameters") or {}), **shared}
        # Kinds that happen to be equal stay apart: their group has members that are no gene.
        table = dump_table({"layers": self.layers, "experts": experts}, join=False)
        return Candidate(recipe, table)

    def _expert(self, cells: Mapping[tuple[int | None, str], dict[str, float]]) -> dict[str, Any]:
        expert: dict[str, Any] = {}
        layers: dict[int, dict[str, Any]] = {}
        for (group, kind), cell in cells.items():
            value = cell["weight"] if set(cell) == {"weight"} else cell
            if not kind and group is None:
                expert["default"] = value
            elif kind in OUTER_KINDS and group is None:
                expert[kind] = value
            else:
                first, last = (0, self.layers - 1) if group is None else self.genome.groups[group]
                for layer in range(first, last + 1):
                    layers.setdefault(layer, {})[kind or "all"] = value
        if layers:
            expert["layers"] = dict(sorted(layers.items()))
        return expert

    # -- every other method -----------------------------------------------------------------------

    def _with_slices(self, values: Values) -> Candidate:
        found = self.genome.at(values)
        groups = sorted({group for _, _, group, _ in found if group is not None})
        recipe = _copy(self.recipe)
        if self.smooth:
            for model, entry in zip(self.models, recipe["models"], strict=True):
                entry.setdefault("parameters", {}).update(_gradients(found, model, groups))
            recipe.setdefault("parameters", {}).update(_gradients(found, SHARED, groups))
            return Candidate(recipe)
        if not groups:
            for model, entry in zip(self.models, recipe["models"], strict=True):
                entry.setdefault("parameters", {}).update(_conditional(found, model, None))
            recipe.setdefault("parameters", {}).update(_conditional(found, SHARED, None))
            return Candidate(recipe)
        entries = recipe.pop("models")
        base = recipe.get("base_model")
        recipe["slices"] = []
        for group in groups:
            first, last = self.genome.groups[group]
            sources = []
            for model, entry in zip(self.models, entries, strict=True):
                parameters = {**(entry.get("parameters") or {})}
                parameters |= _conditional(found, model, group)
                source = {"model": model, "layer_range": [first, last + 1]}
                sources.append(source | ({"parameters": parameters} if parameters else {}))
            if base is not None and base not in self.models:
                sources.append({"model": base, "layer_range": [first, last + 1]})
            shared = _conditional(found, SHARED, group)
            recipe["slices"].append(
                {"sources": sources} | ({"parameters": shared} if shared else {})
            )
        return Candidate(recipe)


def _conditional(found: Mapping[Address, float], model: str, group: int | None) -> dict[str, Any]:
    """Values of one model ("*": those of the whole merge) in one slice, as mergekit writes them."""
    result: dict[str, list[dict[str, Any]]] = {}
    for (owner, parameter, where, kind), value in found.items():
        if where == group and (owner == model or (owner == "" and model != SHARED)):
            result.setdefault(parameter, []).append({"filter": kind or None, "value": value})
    ordered = {k: sorted(v, key=lambda one: one["filter"] is None) for k, v in result.items()}
    return {
        k: v[0]["value"] if len(v) == 1 and v[0]["filter"] is None else v
        for k, v in ordered.items()
    }


def _gradients(found: Mapping[Address, float], model: str, groups: Sequence[int]) -> dict[str, Any]:
    """As `_conditional`, each value a list over the groups."""
    each = [_conditional(found, model, group) for group in groups]
    result: dict[str, Any] = {}
    for parameter, first in (each[0] if each else {}).items():
        values = [one[parameter] for one in each]
        if isinstance(first, list):
            result[parameter] = [
                {"filter": cell["filter"], "value": [v[i]["value"] for v in values]}
                for i, cell in enumerate(first)
            ]
        else:
            result[parameter] = values
    return result


def table_names(models: Sequence[str]) -> dict[str, str]:
    """What a coefficient table calls the models: their short names where these are distinct."""
    counts = Counter(short_name(m) for m in models)
    return {m: short_name(m) if counts[short_name(m)] == 1 else m for m in models}


def _copy(recipe: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(recipe), sort_keys=False))
    return copied


# -- the genome from the specification ------------------------------------------------------------


def make_space(
    document: Document,
    recipe: Mapping[str, Any],
    method: MergeMethod,
    layers: int,
    settings: GenomeSettings,
    *,
    tied_head: bool = False,
) -> Space:
    """The genome that the settings ask for; RecipeError where they fit neither method nor model.

    tied_head: whether the models' output layer is their embedding, and has no values of its own.
    """
    name = method.spec.name.removeprefix(ALIAS_PREFIX)
    in_table = name == "layerwise"
    models = tuple(str(entry["model"]) for entry in recipe.get("models") or ())
    if not models:
        document.fail(("recipe", "models"), "names no models")
    groups = layer_groups(layers, settings.layers or layers)
    if in_table:
        for kind in settings.kinds:
            if kind not in LAYER_WORDS:
                document.fail(
                    ("genome", "kinds"), f"no kind {kind!r}. {suggest(kind, LAYER_WORDS)}"
                )
    experts = [m for m in models if m != recipe.get("base_model")]
    called = table_names(models)
    genes = []
    for spec in searched(document, recipe, method, settings):
        given = (settings.parameters or {}).get(spec.name) or Range()
        bounds = _bounds(document, spec, given, len(experts), settings)
        shared = spec.scope == ParameterScope.SHARED
        takers = experts if spec.scope == ParameterScope.NON_BASE else models
        owners = [SHARED] if shared else [""] if settings.models == "tied" else takers
        fine = not in_table or spec.name in IN_TABLE
        for owner in owners:
            for group, kind in _places(settings, len(groups), fine, in_table):
                if kind == "head" and tied_head:
                    continue
                address = (owner, spec.name, group, kind)
                finer = fine and in_table and bool(settings.layers or settings.kinds)
                span = None if group is None else groups[group]
                place = "" if group is None and kind else place_of(span, finer=finer)
                gene = Gene(address, *bounds, called=called.get(owner, ""), place=place)
                genes.append(gene)
    if not genes:
        document.fail(("genome",), "leaves nothing to search")
    if settings.smooth and (in_table or not settings.layers):
        document.fail(
            ("genome", "smooth"), "needs groups of `layers`, and a method other than layerwise"
        )
    genome = Genome(tuple(genes), groups)
    return Space(recipe, genome, layers, models, in_table, settings.smooth)


def _places(
    settings: GenomeSettings, groups: int, fine: bool, in_table: bool
) -> Iterator[tuple[int | None, str]]:
    """(group, kind) of every gene of one parameter and model."""
    if not fine:
        yield None, ""
        return
    each: Sequence[int | None] = range(groups) if settings.layers else (None,)
    if not in_table:
        yield from itertools.product(each, (*settings.kinds, ""))
        return
    # Layers where nothing finer is asked for; and what lies outside them, or is no listed kind.
    yield from itertools.product(each, settings.kinds or (("",) if settings.layers else ()))
    yield None, ""
    if settings.outer == "free":
        yield from ((None, kind) for kind in OUTER_KINDS if kind != "other")


def searched(
    document: Document, recipe: Mapping[str, Any], method: MergeMethod, settings: GenomeSettings
) -> list[ParameterSpec]:
    """The parameters to search, in the specification's order."""
    known = {spec.name: spec for spec in method.spec.parameters if number_of(spec) is not None}
    if settings.parameters is not None:
        for name in settings.parameters:
            if name not in known:
                document.fail(
                    ("genome", "parameters", name),
                    f"{method.spec.name} has no number of that name. {suggest(name, known)}",
                )
        return [spec for name, spec in known.items() if name in settings.parameters]
    operator = (recipe.get("parameters") or {}).get("operator", "task_arithmetic")
    optional = OPERATORS[operator].parameters if operator in OPERATORS else frozenset()
    ours = "operator" in {spec.name for spec in method.spec.parameters}
    return [
        spec
        for spec in known.values()
        if (spec.scope != ParameterScope.SHARED and (not ours or _means(spec.name, optional)))
        or (spec.scope == ParameterScope.SHARED and spec.required)
    ]


def _means(name: str, optional: frozenset[str]) -> bool:
    return name == "weight" or name in optional


def number_of(spec: ParameterSpec) -> dict[str, Any] | None:
    """The part of a parameter's schema that is a number, or None."""
    try:
        schema = spec._adapter.json_schema()
    except Exception:
        return None
    found = [
        s for s in (schema, *schema.get("anyOf", ())) if s.get("type") in ("number", "integer")
    ]
    return found[0] if found else None


def _bounds(
    document: Document,
    spec: ParameterSpec,
    given: Range,
    experts: int,
    settings: GenomeSettings,
) -> tuple[float, float, float, bool]:
    """low, high, start and whether it is a whole number."""
    schema = number_of(spec) or {}
    low, high = schema.get("minimum"), schema.get("maximum")
    if spec.name in FRACTIONS:
        low, high = (LOWEST_DENSITY if spec.name == "density" else low or 0.0), high or 1.0
    elif spec.name == "weight":
        low, high = (-HIGHEST_WEIGHT if settings.negative_weights else 0.0), HIGHEST_WEIGHT
    low = given.low if given.low is not None else low
    high = given.high if given.high is not None else high
    if low is None or high is None:
        document.fail(
            ("genome", "parameters", spec.name),
            f"{spec.name} has no bounds of its own: give `low` and `high`",
        )
    default = 1.0 / max(experts, 1) if spec.name == "weight" else None
    if default is None:
        default = (low + high) / 2 if spec.required or spec.default is None else spec.default
    start = given.start if given.start is not None else min(max(float(default), low), high)
    if not low < high or not low <= start <= high:
        document.fail(
            ("genome", "parameters", spec.name),
            f"needs low < high and a start between them, not {low:g}, {high:g} and {start:g}",
        )
    whole = schema.get("type") == "integer"
    for bound in (low, high):
        digits = 0 if whole else DIGITS
        if round(bound, digits) != bound:
            document.fail(
                ("genome", "parameters", spec.name),
                f"{spec.name} is a whole number, and {bound:g} is none"
                if whole
                else f"values have {DIGITS} decimals, which {bound:g} does not fit",
            )
    return float(low), float(high), start, whole
