"""A recipe that somebody typed: checked word by word, and kept away from files and code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_unconstrained import _activate, compat
from mergekit_unconstrained.catalog import ALIAS_PREFIX
from mergekit_unconstrained.compat import MergeConfiguration
from mergekit_unconstrained.config.document import Document, walk
from mergekit_unconstrained.config.recipe import check_recipe
from mergekit_unconstrained.config.table import parse_table
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import RecipeError, UnconstrainedError
from mergekit_unconstrained.space.confine import check_recipe_text, checked_name

KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "tokenizer_source")
"""What a recipe that is run here may say at its top."""
RUNS = ("layerwise", ALIAS_PREFIX + "layerwise")
JOB_ONLY = ("push_to_hub", "hub_private", "hub_tag")


def checked(text: str) -> Document:
    """The document of a recipe of ours; RecipeError with the line of the first mistake."""
    _activate.install()
    document = Document.parse(check_recipe_text(text), "recipe.yml")
    data = document.data
    if not isinstance(data, Mapping):
        document.fail((), "a recipe is a mapping with `merge_method` and `models`")
    if "merge_method" not in data:
        document.fail((), "names no `merge_method`")
    try:
        method = compat.get(str(data["merge_method"]))
    except RuntimeError:
        names = [m.spec.name for m in compat.registered()]
        document.fail(
            ("merge_method",), f"no such method. {suggest(str(data['merge_method']), names)}"
        )
    if not compat.is_ours(method):
        document.fail(("merge_method",), "a method of mergekit's own, which has no strict check")
    check_recipe(document, method)
    return document


def runnable(document: Document) -> tuple[str, tuple[str, ...]]:
    """The base model and the experts of a recipe that may be run here; else RecipeError."""
    data = document.data
    if str(data["merge_method"]) not in RUNS:
        document.fail(
            ("merge_method",), "only `layerwise` runs here; take the command of step 4 for this"
        )
    for key in data:
        if key not in KEYS:
            document.fail((key,), "is not taken here; run this recipe in a terminal")
    if data.get("tokenizer_source") not in (None, "base", "union"):
        document.fail(("tokenizer_source",), "`base` or `union` here")
    for place, value in walk(data):
        if place and place[-1] == "coefficients" and isinstance(value, str):
            if "\n" not in value:
                document.fail(place, "the table itself here, as a block of text (|), not a file")
            parse_table(Document.parse(check_recipe_text(value, "table"), "the table"))
        if place and place[-1] in JOB_ONLY:
            document.fail(place, "is not taken here: push in step 5")
    try:
        config = MergeConfiguration.model_validate(data)
    except UnconstrainedError:
        raise
    except Exception as error:
        raise RecipeError(f"{document.name}: {' '.join(str(error).split())[:300]}") from None
    if config.base_model is None:
        document.fail((), "names no `base_model`")
    names = [checked_name(n) for n in _models(data)]
    base = checked_name(data["base_model"])
    experts = tuple(n for n in names if n != base)
    if not experts:
        document.fail((), "names no expert beside the base model")
    return base, experts


def _models(data: Mapping[str, Any]) -> list[str]:
    return [str(m["model"]) for m in data.get("models") or []]
