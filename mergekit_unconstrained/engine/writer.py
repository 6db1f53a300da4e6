"""Output files, written in place at known offsets under temporary names.

A file gets its final name when all its tensors are there and on the disk, to which they are sent as
they are written: left to itself, the system keeps gigabytes back until the end is waited for. Its
sha256 follows the finished tensors in the order of the file, reading them back while the system
still holds them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import xxhash

from mergekit_unconstrained.engine.layout import INDEX, Layout, Shard, Slot

UNFINISHED = ".unfinished"
BLOCK = 1 << 20
WORTH_SENDING = 1 << 20
"""Bytes from which on a part is sent to the disk at once; smaller ones share pages."""


class Writer:
    """The shards of one layout. Every method may be called from any thread."""

    def __init__(self, folder: Path, layout: Layout, *, hashes: bool = True) -> None:
        """hashes: whether the sha256 of the files is wanted."""
        self.layout = layout
        self._folder = folder
        self.hashes = hashes
        self._shards = [_ShardFile(folder, shard) for shard in layout.shards]

    def recheck(self, finished: Mapping[str, str]) -> set[str]:
        """Those of the tensors finished before whose bytes are still what they were."""
        good = set()
        for name, digest in finished.items():
            slot = self.layout.slots.get(name)
            if slot is not None and self._shards[slot.shard].digest(slot) == digest:
                self._shards[slot.shard].done(slot)
                good.add(name)
        return good

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> str:
        """Write a tensor, part after part, to its place; gives the hash of its bytes."""
        slot = self.layout.slots[name]
        shard = self._shards[slot.shard]
        at = slot.start
        found = xxhash.xxh3_128()
        for part in parts:
            raw = part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            assert at + len(raw) <= slot.end, f"{name} has more bytes than were planned"
            shard.write(raw, at)
            found.update(raw)
            at += len(raw)
        assert at == slot.end, f"{name} has fewer bytes than were planned"
        return found.hexdigest()

    def done(self, name: str) -> None:
        """A tensor is written, maybe by another process."""
        slot = self.layout.slots[name]
        self._shards[slot.shard].done(slot)

    def follow(self) -> None:
        """Let the sha256 of all files catch up with what is written, unless another thread does."""
        for shard in self._shards if self.hashes else ():
            shard.follow(wait=False)

    def finish(self) -> dict[str, str]:
        """Give all files their names; file name -> sha256, where it is wanted."""
        digests = {}
        for shard in self._shards:
            if self.hashes:
                shard.follow(wait=True)
                digests[shard.name] = shard.digest_of_all()
            shard.finish()
        if self.layout.index is not None:
            (self._folder / INDEX).write_text(self.layout.index, encoding="utf-8")
        return digests

    def close(self) -> None:
        """Close what is still open."""
        for shard in self._shards:
            shard.close()


def verify(folder: Path, digests: Mapping[str, str]) -> Iterable[str]:
    """The files whose content is not what was written."""
    for name, digest in digests.items():
        with (folder / name).open("rb") as stream:
            if hasattr(os, "posix_fadvise"):  # from the disk, as far as the system obeys
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                yield name


def _sender() -> Callable[[int, int, int], object]:
    """Linux's call to begin writing a range of a file to the disk; elsewhere one that does nothing.

    Python has no name for it. Whether it works does not matter: `finish` waits for everything.
    """
    call = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if call is None:
        return lambda file, start, count: None  # noqa: ARG005
    begin = 2  # SYNC_FILE_RANGE_WRITE: begin, do not wait
    return lambda file, start, count: call(
        file, ctypes.c_int64(start), ctypes.c_int64(count), begin
    )


_send = _sender()


class _ShardFile:
    def __init__(self, folder: Path, shard: Shard) -> None:
        self.name = shard.name
        self._final = folder / shard.name
        self._path = folder / (shard.name + UNFINISHED)
        if self._final.exists():  # the run before was killed after the rename
            self._final.rename(self._path)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        self._open = True
        try:
            os.ftruncate(self._file, shard.size)
            self.write(memoryview(shard.header), 0)
        except BaseException:
            self.close()
            raise
        self._slots = shard.slots
        self._size = shard.size
        self._done = [False] * len(shard.slots)
        self._number = {slot.output.name: i for i, slot in enumerate(shard.slots)}
        self._hash = hashlib.sha256(shard.header)
        self._hashed = 0  # how many tensors the sha256 has seen
        self._following = threading.Lock()

    def write(self, data: memoryview, at: int) -> None:
        start, count = at, len(data)
        while data:
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written
        if count >= WORTH_SENDING:
            _send(self._file, start, count)

    def done(self, slot: Slot) -> None:
        self._done[self._number[slot.output.name]] = True

    def digest(self, slot: Slot) -> str:
        found = xxhash.xxh3_128()
        for block in self._read(slot):
            found.update(block)
        return found.hexdigest()

    def _read(self, slot: Slot) -> Iterable[bytes]:
        for at in range(slot.start, slot.end, BLOCK):
            yield os.pread(self._file, min(BLOCK, slot.end - at), at)

    def follow(self, *, wait: bool) -> None:
        if not self._following.acquire(blocking=wait):
            return
        try:
            while self._hashed < len(self._slots) and self._done[self._hashed]:
                for block in self._read(self._slots[self._hashed]):
                    self._hash.update(block)
                self._hashed += 1
        finally:
            self._following.release()

    def digest_of_all(self) -> str:
        return self._hash.hexdigest()

    def finish(self) -> None:
        missing = [
            s.output.name for s, done in zip(self._slots, self._done, strict=True) if not done
        ]
        assert not missing, f"{missing[0]} was never written"
        os.fsync(self._file)
        self.close()
        self._path.rename(self._final)

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._file)
