"""What can be said against a recipe before torch and mergekit are imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from mergekit_unconstrained.config.document import Document, walk

MODEL_KEYS = ("model", "base_model")


def read_recipe(path: str) -> Document:
    """Read a recipe file; RecipeError when it is none, or names a folder that is not there."""
    document = Document.read(path)
    if not isinstance(document.data, dict):
        document.fail((), "a recipe is a mapping with `merge_method` and `models`")
    if "merge_method" not in document.data:
        document.fail((), "names no `merge_method`")
    for place, value in walk(document.data):
        if place and place[-1] in MODEL_KEYS and isinstance(value, str):
            model, _, adapter = value.partition("+")
            for kind, name in (("model", model), ("adapter", adapter)):
                folder = name.partition("@")[0]
                if folder.startswith((".", "/", "~")) and not Path(folder).exists():
                    document.fail(place, missing(kind, folder))
    return document


def missing(kind: str, folder: str) -> str:
    """What is said of a folder that is not there. kind: model or adapter."""
    return (
        f"the {kind} folder {folder} does not exist (paths are relative to the current directory)"
    )


def looks_local(path: str) -> bool:
    """Whether a model's path cannot be meant as a name on the Hub."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or "\\" in path
