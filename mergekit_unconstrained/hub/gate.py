"""What stands before a public push: the licences that provenance.json tells of. Not legal advice.

Private pushes pass: nothing is given away. `refused` never becomes public; `review` and `conflict`
do when somebody answers for having read the licences.
"""

from __future__ import annotations

from pathlib import Path

from mergekit_unconstrained.errors import HubError
from mergekit_unconstrained.hub import provenance
from mergekit_unconstrained.hub.folder_facts import card_facts
from mergekit_unconstrained.hub.licences import NOT_LEGAL_ADVICE, Verdict, kept_private, told

ANSWERED = "say --i-checked-the-licences when you know that it may be public"


def check_gate(folder: Path, checked: bool, repo_id: str) -> None:
    """HubError where a folder may not be published openly as repo_id. checked: the user looked."""
    if not (folder / provenance.FILE).is_file():
        if not checked:
            raise HubError(
                f"{folder} has no {provenance.FILE}, so nothing is known of the licences of what "
                f"went into it: publish it privately, or {ANSWERED}"
            )
        return
    known = provenance.load(folder)
    if provenance.sealed(known) and not checked:
        raise HubError(
            f"{folder / provenance.FILE} was changed after it was written, so what it says of "
            f"licences cannot be relied on: publish it privately, or {ANSWERED}"
        )
    refuse(_verdict(folder, known, repo_id), checked)


def licence_lines(folder: Path, repo_id: str) -> tuple[str, ...]:
    """What is known of the licences of a folder that gets this name, for a terminal."""
    if not (folder / provenance.FILE).is_file():
        return (f"nothing is known of the licences: there is no {provenance.FILE}",)
    return told(_verdict(folder, provenance.load(folder), repo_id))


def private_only(folder: Path, repo_id: str) -> str | None:
    """Why a folder is only for a private repository; None where it may be public, or may be so."""
    if not (folder / provenance.FILE).is_file():
        return None
    return kept_private(_verdict(folder, provenance.load(folder), repo_id))


def _verdict(folder: Path, known: provenance.Provenance, repo_id: str) -> Verdict:
    """Of a result under the name that it is pushed to, which a licence may want to begin so."""
    return card_facts(folder, known.model_copy(update={"repo_id": repo_id})).verdict


def refuse(found: Verdict, checked: bool) -> None:
    """HubError where a verdict forbids a public push."""
    why = " ".join(found.reasons)
    if found.status == "refused":
        raise HubError(
            f"the licences forbid to publish this: {why} Publish it privately. {NOT_LEGAL_ADVICE}"
        )
    if not found.may_be_public and not checked:
        raise HubError(
            f"the licences need a look before this is public ({found.status}): {why} Publish it "
            f"privately, read them, and {ANSWERED}. {NOT_LEGAL_ADVICE}"
        )
