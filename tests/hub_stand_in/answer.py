"""What an endpoint gets and gives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.hub_stand_in.store import Refused, Token


@dataclass(frozen=True)
class Query:
    """A request. groups: of the route. body: a file, which an endpoint may take away."""

    groups: Mapping[str, str]
    parameters: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: Path
    token: Token | None

    @property
    def kind(self) -> str:
        """model, dataset or space."""
        return self.groups.get("kinds", "models").removesuffix("s")

    @property
    def repo(self) -> str:
        """The repository's id."""
        return self.groups["repo"]

    @property
    def revision(self) -> str:
        """Which commit is meant; main by default."""
        return self.groups.get("revision", "main")

    def text(self) -> str:
        """The body."""
        return self.body.read_text(encoding="utf-8")

    def json(self) -> Any:
        """The body, read; 400 where it is no JSON."""
        try:
            return json.loads(self.body.read_bytes())
        except ValueError:
            raise Refused(400, "the body is no JSON") from None

    def form(self) -> dict[str, list[str]]:
        """The body as a form or as JSON."""
        if "json" in self.headers.get("Content-Type", ""):
            return {k: v if isinstance(v, list) else [v] for k, v in self.json().items()}
        return parse_qs(self.text())

    def parameter(self, name: str, default: str = "") -> str:
        """One parameter of the address."""
        return self.parameters.get(name, [default])[0]


@dataclass(frozen=True)
class Answer:
    """A status, headers, and bytes or a range of a file."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Path = b""
    start: int = 0
    end: int | None = None

    @classmethod
    def json(cls, data: Any, status: int = 200, **headers: str) -> Answer:
        """Data as JSON."""
        return cls(
            status, {"Content-Type": "application/json", **headers}, json.dumps(data).encode()
        )

    @property
    def size(self) -> int:
        """Bytes that are sent."""
        if isinstance(self.body, bytes):
            return len(self.body)
        whole = self.body.stat().st_size
        return (whole if self.end is None else self.end) - self.start

    def blocks(self) -> Iterator[bytes]:
        """The bytes, piece by piece."""
        if isinstance(self.body, bytes):
            yield self.body
            return
        left = self.size
        with self.body.open("rb") as stream:
            stream.seek(self.start)
            while left and (block := stream.read(min(left, 2**20))):
                left -= len(block)
                yield block

    def bytes(self) -> bytes:
        """All of them."""
        return b"".join(self.blocks())


def ranged(query: Query, whole: bytes | Path, headers: Mapping[str, str]) -> Answer:
    """What a Range header asks for: `bytes=5-`, `bytes=5-9`, `bytes=-5`."""
    size = len(whole) if isinstance(whole, bytes) else whole.stat().st_size
    start, end, status = 0, size, 200
    asked = {k.lower(): v for k, v in query.headers.items()}.get("range")
    extra = {"Accept-Ranges": "bytes", **headers}
    if asked is not None:
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else size - int(last)
        end = min(int(last) + 1, size) if first and last else size
        if not 0 <= start < end:
            return Answer(416, {"Content-Range": f"bytes */{size}"})
        status = 206
        extra["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    if isinstance(whole, bytes):
        return Answer(status, extra, whole[start:end])
    return Answer(status, extra, whole, start, end)
