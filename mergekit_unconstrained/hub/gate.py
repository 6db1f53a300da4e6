"""What stands before a public push: the licences that provenance.json tells of. Not legal advice.

Private pushes pass: nothing is given away. `refused` never becomes public; `review` and `conflict`
do when somebody answers for having read the licences.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergekit_unconstrained.errors import HubError
from mergekit_unconstrained.hub.licences import NOT_LEGAL_ADVICE, Named, Verdict, verdict
from mergekit_unconstrained.hub.publication import PROVENANCE


def check_gate(folder: Path, checked: bool) -> None:
    """HubError where a folder may not be published openly. checked: the user looked."""
    found = verdict_of(folder)
    if found is None and not checked:
        raise HubError(
            f"{folder} has no {PROVENANCE}, so nothing is known of the licences of what went into "
            "it: publish it privately, or say --i-checked-the-licences when you know that it may "
            "be public"
        )
    if found is not None:
        refuse(found, checked)


def refuse(found: Verdict, checked: bool) -> None:
    """HubError where a verdict forbids a public push."""
    told = " ".join(found.reasons)
    if found.status == "refused":
        raise HubError(
            f"the licences forbid to publish this: {told} Publish it privately. {NOT_LEGAL_ADVICE}"
        )
    if not found.may_be_public and not checked:
        raise HubError(
            f"the licences need a look before this is public ({found.status}): {told} Publish it "
            "privately, or say --i-checked-the-licences when you have read them and it may be. "
            f"{NOT_LEGAL_ADVICE}"
        )


def verdict_of(folder: Path) -> Verdict | None:
    """The verdict on what provenance.json says; None where there is none that can be read."""
    try:
        data = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        teachers = [t["name"] for t in (data.get("fusion") or {}).get("teachers") or ()]
        learned = {"source", *(f"base of {name}" for name in teachers)} if teachers else set()
        parents = data["parents"]
        return verdict(
            _named([p for p in parents if p["role"] not in learned]),
            _named([p for p in parents if p["role"] in learned]),
            [
                (d["name"], d.get("licence"))
                for d in data.get("data") or ()
                if d["role"] == "training"
            ],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _named(parents: list[dict[str, Any]]) -> list[Named]:
    """A model and its adapter, with what their cards say."""
    sources = [p[key] for p in parents for key in ("model", "adapter") if p.get(key)]
    return [(str(source["name"]), source.get("licence")) for source in sources]
