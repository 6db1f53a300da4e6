"""sha256 of weight files, computed while something else runs."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_known: dict[tuple[str, int, int], Future[str]] = {}
"""Path, size and time of a file -> its hash: pre-pass and card read a file once for both."""
_lock = threading.Lock()


def sha256(file: Path) -> str:
    """The hash of a file. A large file of the Hub's cache is named by it, and is not read again."""
    real = file.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    stat = real.stat()
    key = (str(real), stat.st_size, stat.st_mtime_ns)
    with _lock:
        future = _known.get(key)
        mine = future is None
        if future is None:
            future = _known[key] = Future()
    if mine:
        try:
            with real.open("rb") as stream:
                future.set_result(hashlib.file_digest(stream, "sha256").hexdigest())
        except BaseException as error:
            del _known[key]
            future.set_exception(error)
    return future.result()


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
