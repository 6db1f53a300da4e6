"""Trying again what the Hub, or the way to it, could not do this time.

huggingface_hub itself tries again some requests (preupload, LFS, tree) and not others (create,
validate-yaml, commit, tag, settings). Everything goes through here, and a wait that the Hub asks
for by its rate-limit headers is kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import parse_ratelimit_headers

T = TypeVar("T")
PASSING = (408, 429, 500, 502, 503, 504)
"""Answers that may be another one next time."""
LONGEST_WAIT = 900.0
"""Seconds; the Hub counts requests in windows of five minutes. A longer wait is the user's."""
WRONG_ADDRESS = ("UnsupportedProtocol", "InvalidURL", "TooManyRedirects")


@dataclass(frozen=True)
class Patience:
    """How often, and how long to wait in between (seconds) where the Hub does not say.

    tell: gets a sentence before each wait.
    """

    waits: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    sleep: Callable[[float], object] = field(default=time.sleep)
    tell: Callable[[str], object] = field(default=lambda _: None)


def patiently(call: Callable[[], T], patience: Patience, also: tuple[int, ...] = ()) -> T:
    """The result of a call that may be made again; its last error when it goes on failing.

    also: statuses beside PASSING.
    """
    for pause in (*patience.waits, None):
        try:
            return call()
        except Exception as error:
            asked = wait_asked(error)
            hopeless = not passing(error) and status_of(error) not in also
            if pause is None or hopeless or (asked or 0.0) > LONGEST_WAIT:
                raise
            seconds = pause if asked is None else asked + 1  # as told, rounded up
            patience.tell(f"{short(error)}; trying again in {seconds:.0f} s")
            patience.sleep(seconds)
    raise AssertionError


def passing(error: BaseException) -> bool:
    """Whether the same request may well succeed later."""
    cause = root(error)
    if isinstance(cause, HfHubHTTPError):
        # Where a large file is sent to is good for a while only; the next look gives another place,
        # or tells that the file has arrived.
        moved = cause is not error and cause.response.status_code in (400, 403, 404, 409)
        return moved or cause.response.status_code in PASSING
    if isinstance(cause, HTTPError):  # no answer came
        return type(cause).__name__ not in WRONG_ADDRESS
    return isinstance(cause, json.JSONDecodeError)  # a proxy's page in the place of an answer


def lost(error: BaseException) -> bool:
    """Whether a request may have had its effect although it failed.

    The connection broke, a gateway gave up waiting, or (412) a first, unanswered one did it.
    """
    cause = root(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in (*PASSING, 409, 412)  # 412: it moved, perhaps by us
    return isinstance(cause, HTTPError | json.JSONDecodeError)


def root(error: BaseException) -> BaseException:
    """What is behind the RuntimeError in which huggingface_hub wraps a failed upload."""
    wrapped = isinstance(error, RuntimeError) and error.__cause__ is not None
    return root(error.__cause__) if wrapped and error.__cause__ else error


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error, None where no answer came."""
    cause = root(error)
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None


def wait_asked(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, None where it does not."""
    cause = root(error)
    if not isinstance(cause, HfHubHTTPError):
        return None
    headers = cause.response.headers
    limits = parse_ratelimit_headers(headers)
    if status_of(error) == 429 and limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    value = str(headers.get("Retry-After") or "").strip()
    return float(value) if value.isdigit() else None


def short(error: BaseException) -> str:
    """`the Hub answers 503`, `the connection broke (ReadError)`."""
    status = status_of(error)
    if status == 429:
        return "the Hub limits the rate of requests (429)"
    if status is not None:
        return f"the Hub answers {status}"
    if isinstance(root(error), json.JSONDecodeError):
        return "the Hub answers with a page that is not its own"
    return f"the connection broke ({type(root(error)).__name__})"
