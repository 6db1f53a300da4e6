"""Every fault at every endpoint: nothing lost, nothing twice, and a sentence that says what to do.

The whole matrix is slow; of each kind of fault one endpoint is tried in the unit tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from mergekit_unconstrained.errors import HubError
from mergekit_unconstrained.hub.push import Pushed, push
from tests.hub.conftest import Clock, holds
from tests.hub_stand_in import Fault, HubStandIn

REPO = "alice/merged"
ENDPOINTS = (
    *("whoami", "info", "create", "auth-check", "tree", "refs", "validate-yaml", "preupload"),
    *("lfs-batch", "lfs-put", "lfs-part", "lfs-complete", "lfs-verify", "commit", "tag"),
    "settings",
)
PASSING: dict[str, dict[str, Any]] = {
    "429 with RateLimit": {"status": 429, "headers": {"RateLimit": '"api";r=0;t=55'}},
    "429 with Retry-After": {"status": 429, "headers": {"Retry-After": "7"}},
    "500": {"status": 500},
    "502 of a proxy, in HTML": {"status": 502},
    "503": {"status": 503},
    "504": {"status": 504},
    "504 although it was done": {"status": 504, "acted": True},
    "cut in the request": {"cut": "request"},
    "cut in the answer": {"cut": "answer"},
    "cut after it was done": {"cut": "after"},
}
FINAL: dict[str, dict[str, Any]] = {
    "401": {"status": 401},
    "403": {"status": 403},
    "404": {"status": 404},
    "409": {"status": 409},
    "412": {"status": 412},
}
DONE = ("504 although it was done", "cut after it was done", "cut in the answer")
KNOWN_BY_LOOKING = ("commit", "tag", "lfs-put", "lfs-part", "lfs-complete")
"""Where such a fault, however often, is none: a look at the Hub tells that it was done."""
UNIT = {  # the fault -> the endpoints tried without `slow`
    "429 with RateLimit": ("commit", "create"),
    "429 with Retry-After": ("tag",),
    "500": ("commit",),
    "502 of a proxy, in HTML": ("validate-yaml", "commit"),
    "503": ("lfs-put",),
    "504": ("settings",),
    "504 although it was done": ("commit",),
    "cut in the request": ("lfs-part", "commit"),
    "cut in the answer": ("commit", "create"),
    "cut after it was done": ("commit", "tag", "create"),
    "401": ("whoami", "commit"),
    "403": ("lfs-batch", "commit"),
    "404": ("commit",),
    "409": ("create", "tag"),
    "412": ("commit",),
}


def cases(faults: dict[str, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(
            *(endpoint, name),
            marks=() if endpoint in UNIT[name] else pytest.mark.slow,
            id=f"{endpoint}: {name}",
        )
        for name in faults
        for endpoint in ENDPOINTS
    ]


def publish(folder: Path, api: HfApi, clock: Clock) -> Pushed:
    """A public push with a tag, so that every endpoint is asked."""
    return push(
        folder, REPO, private=False, tag="v1", checked_licences=True,
        api=api, patience=clock.patience, quiet=True,
    )  # fmt: skip


def attempt(folder: Path, api: HfApi, clock: Clock) -> tuple[Pushed | None, HubError | None]:
    """What was published, or why it was not."""
    try:
        return publish(folder, api, clock), None
    except HubError as error:
        return None, error


def check_done(hub: HubStandIn, folder: Path, done: Pushed | None) -> None:
    """All of it is there, in one commit, tagged and public."""
    assert done is not None
    assert holds(hub, REPO, folder)
    assert [c.sha for c in hub.commits(REPO)][:1] == [done.commit]
    assert len(hub.commits(REPO)) == 2
    assert hub.repo(REPO).refs["refs/tags/v1"] == done.commit
    assert not hub.repo(REPO).private
    assert not hub.seen("delete")


@pytest.mark.parametrize(("endpoint", "fault"), cases(PASSING))
def test_what_passes_is_waited_for(
    hub: HubStandIn, api: HfApi, folder: Path, clock: Clock, endpoint: str, fault: str
) -> None:
    injected = hub.add(Fault(endpoint, **PASSING[fault]))
    check_done(hub, folder, publish(folder, api, clock))
    assert injected.hits == 1
    if clock.waits:  # else huggingface_hub itself, or a look at the repository, was enough
        asked = {"429 with RateLimit": 56.0, "429 with Retry-After": 8.0}.get(fault, 1.0)
        assert clock.waits == [asked]
        assert "trying again in" in clock.told[0]


@pytest.mark.parametrize(("endpoint", "fault"), cases(PASSING))
def test_what_stays_is_one_sentence_and_the_next_run_goes_on(
    hub: HubStandIn, api: HfApi, folder: Path, clock: Clock, endpoint: str, fault: str
) -> None:
    injected = hub.add(Fault(endpoint, **PASSING[fault], times=10_000))
    done, error = attempt(folder, api, clock)
    if error is not None:
        sentence(error, hub)
        assert "run the same command again" in error.message
        assert len(clock.waits) == 2
    else:  # done although no answer ever came
        assert (fault in DONE and endpoint in KNOWN_BY_LOOKING) or endpoint == "lfs-verify"
        check_done(hub, folder, done)
    assert injected.hits
    hub.faults.clear()
    check_done(hub, folder, publish(folder, api, clock))


@pytest.mark.parametrize(("endpoint", "fault"), cases(FINAL))
def test_a_refusal_is_one_sentence_and_the_next_run_goes_on(
    hub: HubStandIn, api: HfApi, folder: Path, clock: Clock, endpoint: str, fault: str
) -> None:
    injected = hub.add(Fault(endpoint, **FINAL[fault], times=10_000))
    done, error = attempt(folder, api, clock)
    if error is not None:
        sentence(error, hub)
    else:  # the next look tells that the file has arrived
        assert endpoint == "lfs-verify"
        check_done(hub, folder, done)
    assert injected.hits
    hub.faults.clear()
    check_done(hub, folder, publish(folder, api, clock))


def sentence(error: HubError, hub: HubStandIn) -> None:
    """One line, that names what it is about, without a token or a traceback's words."""
    print(error.message)
    assert "\n" not in error.message
    assert REPO in error.message or hub.url in error.message
    assert hub.token not in error.message
    assert "Traceback" not in error.message
    assert "Error(" not in error.message
