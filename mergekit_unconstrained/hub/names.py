"""What models are called in public: nothing that tells where they lie on somebody's disk."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mergekit_unconstrained.errors import HubError

_HUB_ID = re.compile(r"(?!\.\.?/)[\w.-]+(?:/[\w.-]+)?", re.ASCII)
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)[\\/]snapshots[\\/]([0-9a-f]{40})[\\/]?$")
_TAG = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
_PATH = re.compile(
    r"(?<![\w:/.~\\-])(?:file://)?(?:~|/|\\\\|[A-Za-z]:[\\/])[^\s'\"`,;:{}()\[\]<>|]*"
)


def display_name(model: str, local: bool = False) -> str:
    """A model as a reader may see it: its Hub id, or the last part of its path.

    model: as in a recipe, `path[@revision][+adapter[@revision]]`. local: whether it is known to be
    a folder; without that, `org/name` is taken for a Hub id.

    >>> display_name("/home/alice/models/math")
    'math'
    >>> display_name("org/name@main+/home/alice/adapters/code")
    'org/name@main + code'
    """
    parts = model.split("+")
    if len(parts) > 2:  # no adapter reference, whatever it is
        parts = [model]
    return " + ".join(_part(part, local) for part in parts)


def cached_id(path: str) -> tuple[str, str] | None:
    """Hub id and commit of a folder in the Hub's cache; None for any other path."""
    found = _SNAPSHOT.search(path)
    return (f"{found[1]}/{found[2]}", found[3]) if found else None


def sanitise_paths(text: str, models: Mapping[str, str] | None = None) -> str:
    """A text without absolute paths.

    models: what to write for a model that the text may name, by the name used in the recipe; any
    other absolute or home path keeps its last part only. URLs stay.
    """
    for model, shown in sorted((models or {}).items(), key=lambda item: -len(item[0])):
        whole = rf"(?<![\w./~-]){re.escape(model)}(?![\w/-])(?!\.\w)"
        text = re.sub(whole, shown.replace("\\", r"\\"), text)
    return _PATH.sub(lambda match: _last(match[0]) or match[0], text)


def _part(path: str, local: bool) -> str:
    snapshot = _SNAPSHOT.search(path)
    if snapshot:
        return f"{snapshot[1]}/{snapshot[2]}@{snapshot[3]}"
    place, _, revision = path.rpartition("@") if path.count("@") == 1 else (path, "", "")
    if not local and _HUB_ID.fullmatch(place):
        return f"{place}@{revision}" if revision else place
    return _last(place) or "model"


def _last(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2].lstrip("~")


def check_tag_name(tag: str | None, branch: bool = False) -> None:
    """HubError for what git takes for no tag. branch: it may be a branch's name, with slashes."""
    parts = tag.split("/") if tag is not None and branch else [tag]
    for part in parts:
        if part is None:
            continue
        if not _TAG.fullmatch(part) or ".." in part or part.endswith(".lock"):
            raise HubError(
                f"{tag!r} is no name for a tag: letters, digits, `.`, `-` and `_`, as in v1"
            )
