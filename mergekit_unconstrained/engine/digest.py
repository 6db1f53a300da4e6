"""sha256 of weight files, computed while something else runs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(file: Path) -> str:
    """The hash of a file. A large file of the Hub's cache is named by it, and is not read again."""
    real = file.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class BackgroundDigests:
    """Hashes of many files in one background thread (hashlib releases the interpreter's lock)."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._futures: dict[Path, Future[str]] = {f: self._pool.submit(sha256, f) for f in files}

    def __getitem__(self, file: Path) -> str:
        """The hash, waited for."""
        return self._futures[file].result()

    def __contains__(self, file: Path) -> bool:
        """Whether the hash of a file was asked for."""
        return file in self._futures

    def close(self) -> None:
        """Drop what has not begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)
