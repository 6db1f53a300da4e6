"""The output folder: nothing carries its final name before it is complete.

A run writes into OUT.partial and renames it at the end. OUT.partial holds a note of what is being
made (`job.json`): the same job goes on with it where it can be gone on with, and starts it afresh
otherwise; another job leaves it alone and says so.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mergekit_unconstrained.errors import OutputError, UnconstrainedError

LOG = logging.getLogger(__name__)
NOTE = "job.json"


def partial_of(out: Path) -> Path:
    """Where a run for `out` writes."""
    return out.with_name(out.name + ".partial")


def check_out(out: Path) -> None:
    """Refuse an output folder that holds anything, or that could not be renamed to."""
    if out.name in ("", ".."):
        raise OutputError(f"{out} is no name for an output folder: choose one such as `merged`")
    if out.is_symlink():
        raise OutputError(f"{out} is a symbolic link: name the folder itself")
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.is_file():
        raise OutputError(f"{out} is a file: choose another name for the output folder")
    if out.exists():
        raise OutputError(f"{out} exists and is not empty: choose another folder or remove it")


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold. needed: bytes."""
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"the disk of {out} has {free / 2**30:.1f} GiB free, the result takes "
            f"{needed / 2**30:.1f} GiB: make room or choose another disk"
        )


@contextmanager
def staged(out: Path, job: str, resumable: str | None = None) -> Iterator[Path]:
    """Give a folder to write into, and rename it to `out` when the block ends without error.

    job: what identifies the work (a hash). resumable: the name of a file; where an OUT.partial of
    the same job holds it, the folder is given as it is, and a full disk, too little memory or
    Ctrl-C leave it there. Without one the folder is started afresh.
    """
    check_out(out)
    partial = partial_of(out)
    if not _kept(partial, job, resumable):
        try:
            partial.mkdir(parents=True)
            (partial / NOTE).write_text(json.dumps({"job": job}), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write to {partial}: {error.strerror}") from error
    try:
        with (partial / NOTE).open("r+", encoding="utf-8") as note:
            lock(note, partial)
            yield partial
        if resumable is not None:
            (partial / resumable).unlink(missing_ok=True)
        if out.is_dir():
            out.rmdir()  # empty: check_out saw to that
        partial.rename(out)
        # Last: a kill just before it leaves a note too many, not a folder that nobody recognises.
        (out / NOTE).unlink()
    except BaseException as error:
        full = disk_full(error)
        lasting = full or isinstance(error, KeyboardInterrupt | MemoryError)
        keeps = lasting and resumable is not None and (partial / resumable).exists()
        if not keeps:
            # It cannot be gone on with, so it would only stand in the way of a mended recipe. After
            # a kill it stays; the next run of the same job clears it.
            shutil.rmtree(partial, ignore_errors=True)
        elif not full:
            LOG.warning("%s keeps what is finished: the same command goes on from there", partial)
        if isinstance(error, UnconstrainedError) or not full:
            raise
        rest = "what is finished is kept" if keeps else "nothing was left behind"
        raise OutputError(
            f"the disk is full; {rest}: make room for {out} and run the same command again"
        ) from error


def _kept(partial: Path, job: str, resumable: str | None) -> bool:
    """Whether an interrupted run of the same job left something to go on with; else it is removed.

    OutputError when it is somebody else's.
    """
    if not partial.exists():
        return False
    try:
        with (partial / NOTE).open("r+", encoding="utf-8") as note:
            lock(note, partial)
            same = json.load(note).get("job") == job
    except (OSError, ValueError):
        same = not any(partial.iterdir())
    if not same:
        raise OutputError(
            f"{partial} was left by another recipe (or by something else): remove it, or choose "
            "another output folder"
        )
    if resumable is not None and (partial / resumable).exists():
        return True
    shutil.rmtree(partial)
    return False


def lock(note: IO[str], partial: Path) -> None:
    """Keep a second run out; the system drops the lock when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: two runs at a time are the user's to avoid
        return
    try:
        fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OutputError(f"another run is writing {partial} at this moment") from None


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there was no room left."""
    # safetensors wraps the system's error into its own text; torch's writer does not say why.
    text = str(error)
    torch_writer = "inline_container.cc" in text and "PytorchStreamReader" not in text
    no_space = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
    return no_space or torch_writer
