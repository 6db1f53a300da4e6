"""The recipe and table as they may be published: Hub models at their commits, no path of a machine.

Comments, order and layout of the author stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from mergekit_unconstrained.config.document import Document, Place, walk
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.config.table import short_name
from mergekit_unconstrained.hub.names import sanitise_paths

MODEL_KEYS = ("model", "base_model", "tokenizer_source", "source", "base")
TABLE = "coefficients.yml"


def pinned_name(parent: Parent) -> str:
    """A model as others can find it: `org/name@commit`, or a local folder's portable name."""
    reference = parent.reference
    name = portable(reference.model.path)
    revision = parent.commit or reference.model.revision
    if revision is not None:
        name += f"@{revision}"
    return f"{name}+{portable(str(reference.lora))}" if reference.lora is not None else name


def portable(path: str) -> str:
    """A path without what it tells of this machine: relative ones stay, others keep their end."""
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return short_name(path) if absolute or path.startswith(("~", "..")) else path


def pinned_recipe(
    document: Document,
    parents: Mapping[str, Parent],
    has_table: bool,
    settings: str | None = None,
) -> str:
    """The recipe's text with its models pinned, and its table and settings beside it.

    parents: by the model's name in the recipe. settings: the settings file's name there; the recipe
    of a fusion that names one then names this one.
    """
    changes: dict[Place, str] = {}
    for place, value in walk(document.data):
        if place and place[-1] in MODEL_KEYS and str(value) in parents:
            changes[place] = pinned_name(parents[str(value)])
        elif has_table and place[-1:] == ("coefficients",) and isinstance(value, str):
            changes[place] = TABLE
        elif settings is not None and place == ("parameters", "settings") and value:
            changes[place] = settings
    if document.text is None:
        return clean(yaml.safe_dump(_replaced(document.data, changes), sort_keys=False), parents)
    spans = {document.spans[p]: v for p, v in changes.items() if p in document.spans}
    text = document.text
    for (start, end), value in sorted(spans.items(), reverse=True):
        if text[start:end].strip("'\"") != value:
            text = text[:start] + json.dumps(value, ensure_ascii=False) + text[end:]
    return clean(text, parents)


def clean(text: str, parents: Mapping[str, Parent]) -> str:
    """A text without absolute paths, comments included; the parents keep their portable names."""
    models = {}
    for parent in parents.values():
        models[parent.reference.model.path] = portable(parent.reference.model.path)
        if parent.reference.lora is not None:
            models[str(parent.reference.lora)] = portable(str(parent.reference.lora))
    return sanitise_paths(text, {k: v for k, v in models.items() if k != v})


def _replaced(data: Any, changes: Mapping[Place, str], place: Place = ()) -> Any:
    if place in changes:
        return changes[place]
    if isinstance(data, Mapping):
        return {k: _replaced(v, changes, (*place, k)) for k, v in data.items()}
    if isinstance(data, list):
        return [_replaced(v, changes, (*place, i)) for i, v in enumerate(data)]
    return data
