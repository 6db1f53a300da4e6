"""The recipe and table as they may be published: Hub models at their commits, no path of a machine.

Comments, order and layout of the author stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from mergekit_unconstrained.config.document import Document, Place, walk
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.config.table import short_name
from mergekit_unconstrained.hub.names import cached_id, sanitise_paths

MODEL_KEYS = ("model", "base_model", "tokenizer_source", "source", "base")
FILE_KEYS = ("dataset", "chat_template", "coefficients")
TABLE = "coefficients.yml"


def places(parents: Iterable[Parent]) -> dict[str, str]:
    """Path of every model and adapter -> what the pinned recipe calls it, no two alike."""
    found: dict[str, str] = {}
    for parent in parents:
        for model in filter(None, (parent.reference.model, parent.reference.lora)):
            name = plain = portable(model.path)
            number = 2
            while name in (v for k, v in found.items() if k != model.path):
                name, number = f"{plain}-{number}", number + 1
            found.setdefault(model.path, name)
    return found


def pinned_name(parent: Parent, names: Mapping[str, str] | None = None) -> str:
    """A model as others can find it: `org/name@commit`, or a local folder's portable name.

    names: of `places`, for all the models of a recipe.
    """
    names = names or places([parent])
    reference = parent.reference
    name = names[reference.model.path]
    revision = parent.commit or reference.model.revision
    if revision is not None and not lies_here(reference.model.path):
        name += f"@{revision}"
    if reference.lora is None:
        return name
    name += f"+{names[reference.lora.path]}"
    revision = adapter_commit(parent) or reference.lora.revision
    return f"{name}@{revision}" if revision and not lies_here(reference.lora.path) else name


def lies_here(path: str) -> bool:
    """Whether a model is a folder of its owner, and none of the Hub's cache."""
    return Path(path).is_dir() and cached_id(path) is None


def adapter_commit(parent: Parent) -> str | None:
    """The commit of a parent's adapter that was read from the Hub's cache."""
    folder = next((f.parent for f in parent.adapter_files), None)
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def portable(path: str) -> str:
    """A path without what it tells of this machine: relative ones stay, others keep their end."""
    if (cached := cached_id(path)) is not None:
        return cached[0]
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    outside = absolute or path.startswith("~") or ".." in PurePosixPath(path).parts
    return short_name(path) if outside or path.startswith("..") else path


def portable_file(path: str) -> str:
    """The same of a file, whose name may hold any character."""
    return path if portable(path) == path else PurePosixPath(path.replace("\\", "/")).name


def is_file(value: Any) -> bool:
    """Whether a value of a recipe names a file or folder that is here."""
    if not isinstance(value, str) or "\n" in value:
        return False
    try:
        return Path(value).expanduser().exists()
    except OSError:  # too long to be a name
        return False


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
    names = places(parents.values())
    for place, value in walk(document.data):
        if place and place[-1] in MODEL_KEYS and str(value) in parents:
            changes[place] = pinned_name(parents[str(value)], names)
        elif has_table and place[-1:] == ("coefficients",) and isinstance(value, str):
            changes[place] = TABLE
        elif place and place[-1] in FILE_KEYS and is_file(value):
            changes[place] = portable_file(str(value))
        elif settings is not None and place == ("parameters", "settings") and value:
            changes[place] = settings
    if document.text is None:
        return clean(yaml.safe_dump(_replaced(document.data, changes), sort_keys=False), parents)
    spans = {document.spans[p]: v for p, v in changes.items() if p in document.spans}
    text = document.text
    for (start, end), value in sorted(spans.items(), reverse=True):
        if text[start:end].strip("'\"") != value:
            # A block of text (|) reaches over the end of its last line, which has to stay.
            end = start + len(text[start:end].rstrip("\n"))
            text = text[:start] + json.dumps(value, ensure_ascii=False) + text[end:]
    return clean(text, parents)


def clean(text: str, parents: Mapping[str, Parent]) -> str:
    """A text without absolute paths, comments included; the parents keep their portable names."""
    models = {}
    for parent in parents.values():
        lora = parent.reference.lora
        models[str(parent.reference.model)] = parent.reference.model.path
        if lora is not None:
            models[str(lora)] = lora.path
    names = places(parents.values())
    shown = {k: names[path] for k, path in models.items()}
    return sanitise_paths(text, {k: v for k, v in shown.items() if k != v})


def _replaced(data: Any, changes: Mapping[Place, str], place: Place = ()) -> Any:
    if place in changes:
        return changes[place]
    if isinstance(data, Mapping):
        return {k: _replaced(v, changes, (*place, k)) for k, v in data.items()}
    if isinstance(data, list):
        return [_replaced(v, changes, (*place, i)) for i, v in enumerate(data)]
    return data
