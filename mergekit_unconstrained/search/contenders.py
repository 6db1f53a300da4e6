"""The methods of a comparison: a recipe and a few numbers to tune for each, by its specification.

Every method gets the same models, the same candidates to tune with, and only numbers that matter to
it: one weight an expert for the whole model, and what else is listed in RANGES. Bounds are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import BasePolicy, MergeMethod, ParameterSpec
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.search.settings import GenomeSettings, Range
from mergekit_unconstrained.search.space import number_of

RANGES: dict[str, Range] = {
    "weight": Range(low=0.0, high=1.5),
    "lambda": Range(low=0.0, high=2.0),
    "density": Range(low=0.05, high=1.0),
    "drop": Range(low=0.0, high=0.95),
    "select_topk": Range(low=0.05, high=1.0),
    "t": Range(low=0.0, high=1.0),
    "threshold": Range(low=0.0, high=1.0),
    "tall_lambda": Range(low=0.0, high=1.0),
    "rank_fraction": Range(low=0.05, high=1.0),
    "calibration": Range(low=0.0, high=2.0),
    "eta": Range(low=0.01, high=0.5),
    "top": Range(low=0.05, high=1.0),
    "alpha": Range(low=0.0, high=1.0, start=0.5),
    "beta": Range(low=0.0, high=1.5, start=0.5),
    "r": Range(low=0.0, high=1.0),
}
"""Numbers of methods that are tuned, and between what."""
LAYERS = ("bottom", "top", "transition")
"""Counts of layers, up to a quarter of them."""
OPTIONAL = {
    "widen": {"threshold": Range(low=0.0, high=3.0)},
    "nearswap": {"t": Range(low=0.0, high=0.02)},  # a distance of two entries, not a share
    # Between 0 and 1 even with the default epsilon of 0.15 more or less, as mergekit asks.
    "della": {"density": Range(low=0.2, high=0.8, start=0.5)},
    "della_linear": {"density": Range(low=0.2, high=0.8, start=0.5)},
}
"""Where a name means something else, or its usual range is refused."""
SCALED = frozenset(
    {"dare_exact", "lines", "pcb", "tsvm", "widen"}
    | {"task_arithmetic", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"}
    | {"della_linear"}
)
"""Methods whose weights scale all that is added, as `lambda` does, which is not tuned then."""
NO_MERGE = ("passthrough",)


def contenders(wanted: str) -> list[MergeMethod]:
    """The methods named, or `all` of ours and mergekit's that merge tensors, ours first.

    RecipeError names a wrong one.
    """
    found = {
        m.spec.name: m
        for m in compat.registered()
        if not isinstance(m, compat.ModelMethod) and m.spec.name not in NO_MERGE
        and not m.spec.name.startswith("mku_")
    }  # fmt: skip
    ordered = sorted(found.values(), key=lambda m: not compat.is_ours(m))
    if wanted == "all":
        return ordered
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in found:
            raise RecipeError(f"--methods: no method {name!r} of tensors. {suggest(name, found)}")
    return [found[name] for name in dict.fromkeys(names)]


def recipe_for(method: MergeMethod, given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a method for the models of a search's recipe.

    Its own method keeps its parameters. Methods of two models, and those without a base, merge the
    experts: the first one stands where mergekit wants a base.
    """
    if given["merge_method"] == method.spec.name:
        return dict(given)
    experts = [m["model"] for m in given["models"] if m["model"] != given.get("base_model")]
    contract = method.spec.contract
    baseless = contract.base in (BasePolicy.IGNORED, BasePolicy.FORBIDDEN)
    base = experts[0] if baseless or contract.max_inputs == 2 else given.get("base_model")
    recipe = {
        "merge_method": method.spec.name,
        "base_model": base,
        "models": [{"model": m} for m in experts],
    }
    return recipe | {k: given[k] for k in ("dtype", "out_dtype") if k in given}


def genome_for(method: MergeMethod, given: Mapping[str, Any], layers: int) -> GenomeSettings | None:
    """Which numbers of a method are tuned, None where it has none that matter.

    given: the search's recipe; layers: of the models.
    """
    special = OPTIONAL.get(method.spec.name, {})
    parameters = {}
    for spec in method.spec.parameters:
        own = special.get(spec.name)
        found = own or range_of(spec, layers)
        if found is not None and _matters(spec, method, given):
            kept = own is not None and own.start is not None
            parameters[spec.name] = found if kept else starting_at_default(found, spec)
    if not parameters:
        return None
    return GenomeSettings(parameters=parameters, layers=0, kinds=(), outer="tied")


def range_of(spec: ParameterSpec, layers: int) -> Range | None:
    """The range in which a parameter is tuned, None where it is not."""
    schema = number_of(spec)
    if schema is None:
        return None
    if schema.get("type") == "integer":
        return Range(low=0, high=max(1, layers // 4)) if spec.name in LAYERS else None
    return RANGES.get(spec.name)


def starting_at_default(found: Range, spec: ParameterSpec) -> Range:
    """A range whose start is the method's own default, where that is a number."""
    if spec.required or not isinstance(spec.default, int | float):
        return found
    return found.model_copy(update={"start": float(spec.default)})


def _matters(spec: ParameterSpec, method: MergeMethod, given: Mapping[str, Any]) -> bool:
    """Whether a parameter does anything: mergekit's task_arithmetic takes a density and lets it."""
    if method.spec.name == "task_arithmetic":
        return spec.name == "weight"
    if method.spec.name in SCALED:
        return spec.name != "lambda"
    if method.spec.name == "layerwise":
        operator = (given.get("parameters") or {}).get("operator", "task_arithmetic")
        return spec.name == "weight" or (spec.name == "density" and "ties" in operator)
    return True


def tuned(settings: GenomeSettings | None) -> Sequence[str]:
    """The names of the numbers that are tuned."""
    return tuple(settings.parameters or ()) if settings is not None else ()
