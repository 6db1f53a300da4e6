"""From an error of the Hub to one sentence that names the cause and the remedy. No token in it."""

from __future__ import annotations

import json
import re
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from mergekit_unconstrained.errors import HubError
from mergekit_unconstrained.hub.retry import root, status_of, wait_asked

TAG, MAKE_PUBLIC = "tag", "make public"
"""What is done behind the commit."""
OFFLINE = "HF_HUB_OFFLINE is set: unset it to publish"
ELSEWHERE = ", another name, or --pr"
AGAIN = "Nothing was lost: run the same command again to go on"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}|(?i:bearer)\s+\S+")


def redacted(text: str, api: HfApi | None = None) -> str:
    """A text without tokens: those that look like one, and the one in use."""
    own = api.token if api is not None and isinstance(api.token, str) else None
    for secret in {own, _saved_token()} - {None, ""}:
        text = text.replace(str(secret), "hf_***")
    return _TOKEN.sub("hf_***", text)


def explained(error: BaseException, doing: str, repo_id: str, api: HfApi) -> HubError:
    """The error to raise. doing: what failed, `upload to`; the repository follows."""
    cause = root(error)
    where = f"cannot {doing} {repo_id}"
    # Behind the commit all files are there, and another place is no remedy.
    elsewhere = "" if doing in (TAG, MAKE_PUBLIC) else ELSEWHERE
    return HubError(redacted(f"{where}: {_reason(cause, repo_id, api, elsewhere)}", api))


def _reason(cause: BaseException, repo_id: str, api: HfApi, elsewhere: str) -> str:
    if isinstance(cause, LocalTokenNotFoundError):
        return no_token(api)
    if isinstance(cause, OfflineModeIsEnabled):
        return OFFLINE
    if isinstance(cause, HFValidationError):
        return f"that is no name of a repository: {_one_line(cause)}"
    if isinstance(cause, GatedRepoError):
        return (
            f"it is gated: ask for access at {api.endpoint}/{repo_id} with the account of this "
            "token, and run the same command again when it is granted"
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"there is no such revision ({_said(cause)})"
    if isinstance(cause, HfHubHTTPError):
        return _answer(cause, repo_id, api, elsewhere)
    if isinstance(cause, json.JSONDecodeError):
        return (
            f"{api.endpoint} answers with a page that is not the Hub's, as a proxy or an outage "
            f"does. {AGAIN}; if it stays so, see whether HF_ENDPOINT is right"
        )
    if isinstance(cause, HTTPError):
        return _no_answer(cause, api)
    if isinstance(cause, ConnectionError):
        return f"the large file storage refuses: {_xet_reason(repo_id, api) or _one_line(cause)}"
    return _one_line(cause)


def _answer(cause: HfHubHTTPError, repo_id: str, api: HfApi, elsewhere: str) -> str:
    """elsewhere: where it may be published instead, behind a comma."""
    status, said = cause.response.status_code, _said(cause)
    if status == 401:
        return (
            f"the Hub does not accept the token ({said}): it was revoked or is mistyped. "
            f"{log_in(api)}, and run the same command again"
        )
    if status in (402, 403, 413) and re.search(r"storage|quota|limit|billing|payment", said, re.I):
        return (
            f"there is no room left ({said}): free some, publish it openly (--public), or see "
            f"{api.endpoint}/settings/billing; then run the same command again"
        )
    if status in (402, 403):
        return (
            f"the token has no right to do that ({said}): use one with write access to "
            f"{repo_id.partition('/')[0]} ({api.endpoint}/settings/tokens){elsewhere}. {AGAIN}"
        )
    if status == 404:
        return (
            f"it is not there (any more), or this token may not see it ({said}): look at "
            f"{api.endpoint}/{repo_id}. {AGAIN}"
        )
    if status == 409:
        return f"something else is being done to it at this moment ({said}). {AGAIN}"
    if status == 412:
        return (
            f"somebody else changed it meanwhile ({said}): look at {api.endpoint}/{repo_id}/commits"
            "/main. Nothing was overwritten; run the same command again to put these files on top"
        )
    if status == 429:
        wait = wait_asked(cause)
        when = "in a few minutes" if wait is None else f"in {_minutes(wait)}"
        return f"the Hub limits the rate of requests ({said}). {AGAIN} {when}"
    if status >= 500:
        return f"the Hub answers {status} again and again: it is down or overloaded. {AGAIN} later"
    return f"the Hub answers {status}: {said}"


def _no_answer(cause: HTTPError, api: HfApi) -> str:
    kind = type(cause).__name__
    if kind in ("UnsupportedProtocol", "InvalidURL"):
        return f"HF_ENDPOINT is {api.endpoint!r}, which is no address: it begins with https://"
    if kind in ("ConnectError", "ConnectTimeout"):
        return (
            f"{api.endpoint} cannot be reached ({_one_line(cause)}): no network, or HF_ENDPOINT is "
            f"wrong. {AGAIN} when there is a connection"
        )
    return f"the connection to {api.endpoint} breaks again and again ({kind}). {AGAIN}"


def no_token(api: HfApi) -> str:
    """What is said where nobody is logged in."""
    return f"there is no token. {log_in(api)}"


def log_in(api: HfApi) -> str:
    """How to give a token."""
    return (
        "Run `hf auth login`, or set HF_TOKEN, with a token that may write "
        f"({api.endpoint}/settings/tokens)"
    )


def _said(error: HfHubHTTPError) -> str:
    """The Hub's own words."""
    told = error.server_message or error.response.headers.get("X-Error-Message")
    return " ".join(str(told or f"status {status_of(error)}").split()).rstrip(".")


def _xet_reason(repo_id: str, api: HfApi) -> str | None:
    """Why there is no token for the Xet storage: hf_xet itself drops what the Hub said."""
    url = f"{api.endpoint}/api/models/{repo_id}/xet-write-token/main"
    try:
        headers = huggingface_hub.utils.build_hf_headers(token=api.token)
        answer: Any = huggingface_hub.get_session().get(url, headers=headers)
        huggingface_hub.utils.hf_raise_for_status(answer)
    except HfHubHTTPError as error:
        return _answer(error, repo_id, api, ELSEWHERE)
    except Exception:
        return None
    return None


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _saved_token() -> str | None:
    try:
        return huggingface_hub.get_token()
    except Exception:  # a token that cannot be fetched cannot be in a text
        return None
