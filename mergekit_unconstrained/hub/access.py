"""Whether something may be published, found out before anything expensive is done.

whoami -> name and namespace -> the repository (made if it is not there) -> the right to write ->
the parents that are not here yet
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from mergekit_unconstrained.errors import HubError, UnconstrainedError
from mergekit_unconstrained.hub.names import check_tag_name
from mergekit_unconstrained.hub.refusals import OFFLINE, explained, no_token
from mergekit_unconstrained.hub.retry import Patience, patiently, status_of

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """A repository that may be written. head: the commit of its main branch.

    private: as it is now. created: whether this call made it.
    """

    repo_id: str
    user: str
    head: str
    private: bool
    created: bool


@dataclass(frozen=True)
class Hub:
    """The client, how patient it is, and what becomes of its errors."""

    api: HfApi
    patience: Patience

    def ask(self, call: Callable[[], T], doing: str, repo_id: str, also: tuple[int, ...] = ()) -> T:
        """The result of a call, tried again while that helps; HubError otherwise.

        also: further statuses that may be another one next time.
        """
        try:
            return patiently(call, self.patience, also)
        except UnconstrainedError:
            raise
        except Exception as error:
            raise explained(error, doing, repo_id, self.api) from error


def connect(api: HfApi | None = None, patience: Patience | None = None) -> Hub:
    """Whatever HF_ENDPOINT and the token of the environment or of `hf auth login` say."""
    api = api or HfApi(library_name="mergekit-unconstrained")
    return Hub(api, patience or Patience())


def check_ready() -> None:
    """HubError where nothing can be published as things are; asks nobody."""
    api = HfApi()
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"cannot publish: {OFFLINE}")
    if huggingface_hub.get_token() is None:
        raise HubError(f"cannot publish: {no_token(api)}")


def check_access(
    repo_id: str,
    *,
    private: bool = True,
    tag: str | None = None,
    pr: bool = False,
    parents: Iterable[str] = (),
    create: bool = True,
    api: HfApi | None = None,
    patience: Patience | None = None,
) -> Access:
    """Find out whether `repo_id` may be written, and make it, private, if it is not there.

    private: what is wanted; an existing public repository is then refused. pr: only to be read.
    parents: models on the Hub that will be needed. create: False for a dry run, in which head is
    "" for a repository that is not there. HubError names cause and remedy.
    """
    check_tag_name(tag)
    hub = connect(api, patience)
    who = hub.ask(lambda: _whoami(hub.api), "publish to", repo_id)
    full = _named(repo_id, who, hub)
    for parent in dict.fromkeys(parents):
        hub.ask(lambda name=parent: hub.api.auth_check(name), "read", parent)  # type: ignore[misc]
    info = _info(hub, full)
    created = info is None
    if info is None:
        if pr:
            raise HubError(f"{full} is not there, so there is nothing to open a pull request on")
        _check_namespace(full, who)
        if not create:
            return Access(full, str(who["name"]), "", True, False)
        hub.ask(lambda: _create(hub.api, full), "create", full)
    elif private and not pr and info.private is False:
        raise HubError(
            f"{full} is public, and publishing is private unless asked: say --public (in a recipe "
            "`hub_private: false`), or choose another name"
        )
    hub.ask(lambda: hub.api.auth_check(full, write=not pr), "write to", full)
    if info is None:
        info = hub.ask(lambda: hub.api.repo_info(full), "read", full)
    return Access(full, str(who["name"]), str(info.sha), bool(info.private), created)


def _whoami(api: HfApi) -> dict[str, Any]:
    strange = f"{api.endpoint} does not answer as the Hub does: see whether HF_ENDPOINT is right"
    try:
        who: Any = api.whoami(cache=True)  # the Hub allows few of these
    except HfHubHTTPError as error:
        if status_of(error) in (404, 405):
            raise HubError(strange) from error
        raise
    if not isinstance(who, Mapping) or "name" not in who:
        raise HubError(strange)
    return dict(who)


def _named(repo_id: str, who: Mapping[str, Any], hub: Hub) -> str:
    """The whole name, checked; also that the token may write at all."""
    full = repo_id if "/" in repo_id else f"{who['name']}/{repo_id}"
    try:
        validate_repo_id(full)
    except ValueError as error:
        raise explained(error, "publish to", repo_id, hub.api) from None
    access = (who.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise HubError(
            f"cannot publish to {full}: the token {access.get('displayName')!r} of {who['name']} "
            f"may only read. Make one with write access at {hub.api.endpoint}/settings/tokens and "
            "set HF_TOKEN to it, or run `hf auth login`"
        )
    return full


def _check_namespace(full: str, who: Mapping[str, Any]) -> None:
    """Before a repository is made: whose name it is."""
    owner = full.partition("/")[0]
    orgs = [str(org["name"]) for org in who.get("orgs") or () if "name" in org]
    if owner.lower() not in (name.lower() for name in (str(who["name"]), *orgs)):
        own = ", ".join([str(who["name"]), *orgs])
        raise HubError(
            f"cannot create {full}: the token's account is {who['name']}, and {owner} is neither "
            f"it nor one of its organisations. Publish under one of {own}, or use another token"
        )


def _create(api: HfApi, full: str) -> None:
    """A private repository; one that is there already is right as well."""
    # huggingface_hub takes every 409 for "is there" and looks for its address: whether it is there
    # comes out when the right to write is asked for.
    with contextlib.suppress(KeyError):
        api.create_repo(full, private=True, exist_ok=True)


def _info(hub: Hub, full: str) -> Any:
    """What the Hub tells of a repository, None if it is not there (or not to be seen)."""

    def ask() -> Any:
        try:
            return hub.api.repo_info(full)
        except RepositoryNotFoundError:
            return None
        except HfHubHTTPError as error:
            if status_of(error) == 401:  # what an older Hub answers for a missing one
                return None
            raise

    return hub.ask(ask, "read", full)
