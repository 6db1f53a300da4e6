"""What is made to go wrong: at which endpoint, at which of its requests, and how."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Cut = Literal["request", "answer", "after"]
"""Close the connection while the body comes in; within the answer; when the work is done, before
the answer."""


@dataclass
class Fault:
    """One thing that goes wrong.

    endpoint: a name of server.ROUTES, or "any". status: what is answered, None for a cut. acted:
    whether the request has its effect all the same. skip: requests that are let pass before it.
    times: how many are hit. path: a part of the address that is meant, any by default. hold: the
    request waits until `release` is called. then: what goes wrong from the first hit on.
    """

    endpoint: str
    status: int | None = None
    cut: Cut | None = None
    acted: bool = False
    skip: int = 0
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    path: str = ""
    hold: bool = False
    then: tuple[Fault, ...] = ()
    hits: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let a held request go on."""
        self.released.set()


class Faults:
    """Those that are still to come, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Ask for one."""
        with self._lock:
            self._left.append(fault)
        return fault

    def clear(self) -> None:
        """Nothing goes wrong any more; what is held goes on."""
        with self._lock:
            for fault in self._left:
                fault.release()
            self._left.clear()

    def next(self, endpoint: str, path: str) -> Fault | None:
        """The fault of this request, if any."""
        with self._lock:
            for fault in self._left:
                if fault.endpoint not in (endpoint, "any") or fault.path not in path:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    return None
                fault.times -= 1
                fault.hits += 1
                self._left += fault.then if fault.hits == 1 else ()
                if not fault.times:
                    self._left.remove(fault)
                return fault
        return None
