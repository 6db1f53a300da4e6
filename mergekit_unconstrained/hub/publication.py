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
from mergekit_unconstrained.hub import card, folder_facts, provenance

NOTE = ".publication.json"


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
    if not (folder / provenance.FILE).is_file():
        return
    for file in provenance.load(folder).files:
        if found.get(file.name, file.sha256) != file.sha256:
            raise HubError(
                f"{folder / file.name} is not what was written there ({provenance.FILE} has "
                f"another sha256): see `mergekit-unconstrained verify {folder}`, and make it again"
            )


def address(folder: Path, repo_id: str, tag: str | None) -> None:
    """Let the card say where the model will be. One that was edited by hand stays as it is."""
    if not (folder / provenance.FILE).is_file():
        return
    known = provenance.load(folder)
    if (known.repo_id, known.tag) == (repo_id, tag or known.tag):
        return
    readme = (folder / "README.md").read_text(encoding="utf-8")
    if readme == card.render(folder_facts.card_facts(folder, known)):
        folder_facts.rewrite(folder, repo_id=repo_id, tag=tag)
