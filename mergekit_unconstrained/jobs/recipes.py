"""Reading recipes, for our own commands and for what mergekit's front ends hand over."""

from __future__ import annotations

import click
import yaml
from pydantic import ValidationError

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeConfiguration, MergeMethod, MergeOptions
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.first_look import read_recipe
from mergekit_unconstrained.config.recipe import check_recipe
from mergekit_unconstrained.engine.plan import Plan, make_plan
from mergekit_unconstrained.errors import RecipeError, UnknownMethodError


def load_recipe(path: str) -> tuple[Document, MergeConfiguration, MergeMethod]:
    """Read a recipe file for our own commands: one clear error for whatever is wrong with it."""
    document = read_recipe(path)
    try:
        method = compat.get(str(document.data["merge_method"]))
    except UnknownMethodError as error:
        where = document.where(("merge_method",))
        raise UnknownMethodError(f"{where}: {error.message}") from None
    try:
        config = MergeConfiguration.model_validate(document.data)
    except Exception as error:
        if compat.is_ours(method):
            check_recipe(document, method)  # names the place, where pydantic only names the type
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            place = tuple(part for part in first["loc"] if part in _parts(document))
            document.fail(place, f"{first['input']!r} will not do: {first['msg']}")
        raise RecipeError(f"{path}: {' '.join(str(error).split())}") from error
    return document, config, method


def _parts(document: Document) -> set[str | int]:
    """Every word and index that a place in a document may hold."""
    return {part for place in document.lines for part in place}


def plan_recipe(path: str, options: MergeOptions | None = None) -> Plan:
    """Check a recipe of one of our tensor methods and say what it would do."""
    document, config, method = load_recipe(path)
    if not compat.is_ours(method) or isinstance(method, compat.ModelMethod):
        kind = "works on whole models" if compat.is_ours(method) else "is mergekit's own method"
        raise RecipeError(
            f"{document.where(('merge_method',))}: {method.spec.name!r} {kind}; only recipes of "
            "ours that work tensor by tensor have coefficients"
        )
    return make_plan(document, config, method, options or MergeOptions())


def document_of(config: MergeConfiguration, source: str | None) -> Document:
    """The recipe with its lines where the text survived the front end, else its parsed content."""
    if source is None:
        return Document("recipe", yaml.safe_load(config.to_yaml()))
    context = click.get_current_context(silent=True)
    name = (context.params.get("config_file") if context else None) or "recipe"
    return Document.parse(source, str(name))
