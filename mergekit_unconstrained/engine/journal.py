"""What a merge has finished, tensor by tensor, so that a killed one goes on where it was.

The first line says what is being merged: recipe, layout and every input file. Each further line
names a finished tensor and the hash of its bytes; every line begins with a hash of itself. Lines
reach the system at once and the disk every second; the weights themselves are not forced to the
disk, but what is resumed is read again and held against its hash, so whatever a power failure lost
is computed anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from mergekit_unconstrained import __version__

NAME = "journal.jsonl"
SYNC_SECONDS = 1.0


class JournalError(Exception):
    """A journal that cannot be gone on with; the message says why."""


def identity_of(job: str, files: Iterable[Path]) -> dict[str, Any]:
    """What a merge that is gone on with must share with the one before.

    job: the hash of what is asked for. files: the inputs.
    """
    states = {str(f): f.stat() for f in files}
    return {
        "the recipe": job,
        "this package's version": __version__,
        "inputs": {f: [s.st_size, s.st_mtime_ns] for f, s in states.items()},
    }


def read(path: Path, identity: Mapping[str, Any]) -> dict[str, str]:
    """Finished tensor -> hash. JournalError when the journal is damaged or of something else.

    A last line that was cut short is a tensor that was not finished.
    """
    lines = path.read_bytes().split(b"\n")
    lines.pop()  # empty, or what a kill cut short
    entries = [_parsed(line, number) for number, line in enumerate(lines, start=1)]
    if not entries:
        raise JournalError("its journal is empty")
    before, *finished = entries
    if (reason := difference(before, identity)) is not None:
        raise JournalError(reason)
    try:
        return {entry["tensor"]: entry["hash"] for entry in finished}
    except (KeyError, TypeError):
        raise JournalError("its journal holds a line that is no tensor") from None


def _parsed(line: bytes, number: int) -> Any:
    digest, _, text = line.partition(b" ")
    if digest.decode("ascii", "replace") != xxhash.xxh3_64_hexdigest(text):
        raise JournalError(f"line {number} of its journal is damaged")
    return json.loads(text)


def difference(before: Any, now: Mapping[str, Any]) -> str | None:
    """What changed between two identities, in words; None when nothing did."""
    if not isinstance(before, Mapping) or "inputs" not in before:
        return "its journal does not say what was merged"
    for key in (*now, *before):
        if key != "inputs" and before.get(key) != now.get(key):
            return f"{key} is not what it was"
    old, new = before["inputs"], now["inputs"]
    for file in (*new, *old):
        if file not in old:
            return f"{file} is new"
        if file not in new:
            return f"{file} is no longer an input"
        if old[file] != new[file]:
            (size, _), (size_now, _) = old[file], new[file]
            how = f"from {size:,} to {size_now:,} bytes" if size != size_now else "(its time)"
            return f"{file} has changed {how}"
    return None


class Journal:
    """Appends to a journal; a new one begins with the identity."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, new: bool) -> None:
        self._file = path.open("wb" if new else "r+b", buffering=0)
        try:
            if new:
                self._append(identity)
            else:
                kept = path.read_bytes().rfind(b"\n") + 1
                self._file.truncate(kept)
                self._file.seek(kept)
            self.sync()
        except BaseException:
            self.close()
            raise

    def add(self, tensor: str, digest: str) -> None:
        """Note a tensor whose bytes the system has."""
        self._append({"tensor": tensor, "hash": digest})
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def _append(self, entry: Mapping[str, Any]) -> None:
        text = json.dumps(entry, separators=(",", ":")).encode()
        line = xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"
        if self._file.write(line) != len(line):
            raise OSError(28, os.strerror(28))  # the disk took a part of the line: it is full

    def sync(self) -> None:
        """Force the journal to the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Nothing is added any more."""
        self._file.close()
