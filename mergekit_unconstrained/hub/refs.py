"""Where a push goes to and what it is called: branches, tags, pull requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from mergekit_unconstrained.errors import HubError
from mergekit_unconstrained.hub.access import Hub
from mergekit_unconstrained.hub.refusals import TAG
from mergekit_unconstrained.hub.retry import status_of

TITLE = "Upload with mergekit-unconstrained"


@dataclass(frozen=True)
class PullRequest:
    """ref: what is committed to. url: where people look at it."""

    ref: str
    url: str


def head_of(hub: Hub, repo_id: str, ref: str) -> str:
    """The commit that a branch or a pull request is at."""
    return str(hub.ask(lambda: hub.api.repo_info(repo_id, revision=ref), "read", repo_id).sha)


def tagged(hub: Hub, repo_id: str, tag: str) -> str | None:
    """The commit that has a tag."""
    refs = hub.ask(lambda: hub.api.list_repo_refs(repo_id), "read", repo_id)
    return next((str(one.target_commit) for one in refs.tags if one.name == tag), None)


def check_tag(hub: Hub, repo_id: str, tag: str, commit: str | None) -> None:
    """HubError for a tag that another commit has. commit: None for one that is yet to come."""
    there = tagged(hub, repo_id, tag)
    if there is not None and there != commit:
        raise HubError(
            f"{repo_id} has a tag {tag} already, on another commit ({there[:12]}): choose another "
            "name; tags are never moved"
        )


def set_tag(hub: Hub, repo_id: str, tag: str, commit: str) -> None:
    """Tag a commit, once, whatever becomes of the answer."""

    def attempt() -> None:
        try:
            hub.api.create_tag(repo_id, tag=tag, revision=commit)
        except HfHubHTTPError as error:
            if status_of(error) != 409 or tagged(hub, repo_id, tag) is None:
                raise
            check_tag(hub, repo_id, tag, commit)  # there since a lost answer, or by somebody else

    hub.ask(attempt, TAG, repo_id, also=(409,))


def own_pull_request(hub: Hub, repo_id: str, user: str) -> PullRequest:
    """An open pull request of ours, or a new one: never a second one after a lost answer."""

    def own() -> Any:
        return next(
            (
                one
                for one in hub.api.get_repo_discussions(repo_id)
                if one.is_pull_request
                and (one.title, one.author) == (TITLE, user)
                and one.status in ("draft", "open")
            ),
            None,
        )

    def attempt() -> Any:
        return own() or hub.api.create_pull_request(repo_id, title=TITLE)

    pull = hub.ask(attempt, "open a pull request on", repo_id)
    url = f"{hub.api.endpoint}/{repo_id}/discussions/{pull.num}"
    return PullRequest(str(pull.git_reference or f"refs/pr/{pull.num}"), url)
