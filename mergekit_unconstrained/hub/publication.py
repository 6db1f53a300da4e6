"""What a finished folder remembers of its publication, in a file that is not published itself.

    OUT/.publication.json    {"job": ..., "repo": "alice/merged", "commit": null}

job: what made the folder, so that the same recipe, run again, goes on with the push instead of
refusing a folder that is not empty. commit: null until the push is done.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.errors import HubError

NOTE = ".publication.json"
PROVENANCE = "provenance.json"


def read(folder: Path) -> dict[str, Any]:
    """The note; nothing where there is none, or none that can be read."""
    try:
        found = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(folder: Path, **note: Any) -> None:
    """Add to the note."""
    text = json.dumps({**read(folder), **note}, indent=1)
    with replacing(folder / NOTE) as stream:
        stream.write(text.encode())


def begin(folder: Path, repo_id: str) -> bool:
    """Note that a push begins; whether an earlier one to the same repository did not end."""
    note = read(folder)
    begun = note.get("repo") == repo_id and note.get("commit") is None
    with contextlib.suppress(OSError):  # a folder may be read-only, and is published all the same
        write(folder, repo=repo_id, commit=None)
    return begun


def finish(folder: Path, repo_id: str, commit: str) -> None:
    """Note that it ended."""
    with contextlib.suppress(OSError):
        write(folder, repo=repo_id, commit=commit)


def check_hashes(folder: Path, found: Mapping[str, str]) -> None:
    """HubError where a file is not the one that provenance.json tells of.

    found: sha256 by name.
    """
    for name, sha256 in recorded(folder).items():
        if name in found and found[name] != sha256:
            raise HubError(
                f"{folder / name} is not what the merge wrote ({PROVENANCE} has another sha256): "
                f"see `mergekit-unconstrained verify {folder}`, and merge again"
            )


def recorded(folder: Path) -> dict[str, str]:
    """sha256 of the output files by name, as provenance.json has them."""
    try:
        data = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        return {str(one["name"]): str(one["sha256"]) for one in data.get("files") or ()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
