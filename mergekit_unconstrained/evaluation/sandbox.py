"""Model-written Python, run apart: its own process, folder, limits and (on Linux) namespaces.

What holds it:

* a fresh interpreter in a session of its own with an empty environment and a temporary folder,
  killed with all it started when its time is over or it ends;
* limits of the operating system on memory, processor time, file size, open files and core dumps
  (macOS does not enforce the one on memory);
* where Linux allows them, user, network, process and IPC namespaces: no network device at all,
  and no process outlives or sees out of the sandbox (`namespaces()` says whether; containers
  often forbid them);
* an audit hook that refuses sockets, starting processes, signals, files outside the folder (the
  Python installation may be read), and native modules that could go round it (ctypes, ...).

It is a guard rail, not a jail. The hook stops what a model writes in good faith or in error; a
program written to defeat it, by memory corruption or native code, can read what the user can
read, and without namespaces reach the network too. Who expects hostile programs runs the whole
evaluation in a virtual machine or a container that holds nothing of value.
"""

from __future__ import annotations

import contextlib
import functools
import marshal
import os
import secrets
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from mergekit_unconstrained.errors import UnconstrainedError

Status = Literal["ok", "error", "timeout", "memory", "killed"]

OUTPUT_LIMIT = 64 * 1024
"""Bytes kept of each of stdout (its beginning) and stderr (its end, where the error stands)."""
FILE_LIMIT = 16 * 1024 * 1024
"""Bytes that one file, stdout and stderr included, may grow to."""

_CHILD = Path(__file__).with_name("sandbox_child.py")
# Not -I: it would ignore PYTHONHASHSEED, and sets would print in another order every time.
_PYTHON = (sys.executable, "-s", "-P", "-S", "-B", "-u")


@dataclass(frozen=True)
class Ran:
    """What came of a program.

    status: ok; error (an exception, or an exit status other than 0: stderr says which); timeout;
    memory (an allocation failed); killed (it ended without a word: a crash of the interpreter,
    os._exit, the operating system). complete: it ran to its last line; a program that leaves by
    sys.exit(0) is ok and not complete. cut: stdout or stderr was longer than the limit.
    """

    stdout: str
    stderr: str
    status: Status
    complete: bool = False
    seconds: float = 0.0
    cut: bool = False


def run_python(
    code: str,
    *,
    seconds: float,
    memory_mb: int,
    stdin: str = "",
    files: Mapping[str, str] | None = None,
    packages: Sequence[str] = (),
) -> Ran:
    """Run a program and wait for its end, `seconds` of wall-clock time at most.

    memory_mb: of address space, the interpreter's own (some 30) included. files: text by name,
    relative to the program's folder, which it starts in and may import from. packages: installed
    packages it may import besides the standard library, where they are installed.
    """
    if os.name != "posix":
        raise UnconstrainedError(
            "model-written Python is run on Linux and macOS only: this system has no limits that "
            "would hold it"
        )
    token = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        # Resolved: the audit hook compares paths as text.
        made = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)
        )
        folder = Path(made).resolve()
        for name, text in {**(files or {}), "program.py": code}.items():
            _write(folder, name, text)
        job = {"folder": str(folder), "code": code, "token": token}
        job |= _restrictions(seconds, memory_mb, packages)
        out, err = _spool(stack), _spool(stack)
        read, write = os.pipe()
        stack.callback(os.close, read)
        started = time.monotonic()
        try:
            process = _started(
                folder,
                write,
                job=_spool(stack, marshal.dumps(job)),
                given=_spool(stack, stdin.encode("utf-8", "surrogatepass")),
                out=out,
                err=err,
            )
        finally:
            os.close(write)
        try:
            word, in_time = _word(read, started + seconds)
        finally:
            _kill(process, read)
        status, complete = _judged(word, in_time, token)
        stdout, cut_out = _head(out)
        stderr, cut_err = _tail(err)
        took = time.monotonic() - started
        return Ran(stdout, stderr, status, complete, took, cut_out or cut_err)


def _restrictions(seconds: float, memory_mb: int, packages: Sequence[str]) -> dict[str, Any]:
    """What the child holds the program to."""
    return {
        "namespaces": namespaces(),
        "readable": _standard_library(),
        "packages": _installed(tuple(packages)),
        "limits": {
            "AS": memory_mb * 1024 * 1024,
            "CPU": int(seconds) + 2,  # the wall clock comes first but for many threads
            "FSIZE": FILE_LIMIT,
            "NOFILE": 64,
            "CORE": 0,
        },
    }


def _started(
    folder: Path, write: int, *, job: IO[bytes], given: IO[bytes], out: IO[bytes], err: IO[bytes]
) -> subprocess.Popen[bytes]:
    """The child at work in its folder. write: the pipe's end on which it says how it ended."""
    return subprocess.Popen(
        [*_PYTHON, str(_CHILD), "enter", str(job.fileno()), str(write)],
        stdin=given,
        stdout=out,
        stderr=err,
        cwd=folder,
        env=_environment(folder),
        pass_fds=(job.fileno(), write),
        start_new_session=True,
    )


@functools.cache
def namespaces() -> bool:
    """Whether this system lets us put a program into namespaces of its own; tried once."""
    if not sys.platform.startswith("linux"):
        return False
    tried = subprocess.run(
        [*_PYTHON, str(_CHILD), "try"], env=_environment(Path("/")), capture_output=True
    )
    return tried.returncode == 0


def _environment(folder: Path) -> dict[str, str]:
    """Everything the program finds in os.environ: no tokens, no paths of the user."""
    return {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONHASHSEED": "0",
        # A thread a core, each with a stack, would not fit the address space.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@functools.cache
def _standard_library() -> list[str]:
    """Folders every program may read."""
    named = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    found = [path for path in named if path]
    return sorted({*found, *(str(Path(path).resolve()) for path in found)})


@functools.cache
def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Of the packages that are installed: name -> folder it lies in."""
    found = {}
    for name in packages:
        for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
            if folder and Path(folder, name).is_dir():
                found[name] = folder
    return found


def _write(folder: Path, name: str, text: str) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{name}: a file of a program lies in the program's folder")
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def _spool(stack: contextlib.ExitStack, content: bytes = b"") -> IO[bytes]:
    """A nameless file: unlike a pipe it never fills up, so neither side waits for the other."""
    file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    file.write(content)
    file.flush()
    file.seek(0)
    return file


def _word(read: int, until: float) -> tuple[str, bool]:
    """What the child says at its end ("" when it ends without a word), and whether in time."""
    said = b""
    while not said.endswith(b"\n"):
        if not _readable(read, until):
            return "", False
        more = os.read(read, 256)
        if not more:
            break
        said += more
    return said.decode("ascii", "replace").strip(), True


def _judged(word: str, in_time: bool, token: str) -> tuple[Status, bool]:
    """Only who knows the token is believed: the program itself could write to the same pipe."""
    if not in_time:
        return "timeout", False
    told, _, status = word.partition(" ")
    if told != token:
        return "killed", False
    if status == "memory":
        return "memory", False
    if status in ("complete", "left"):
        return "ok", status == "complete"
    return "error", False


def _kill(process: subprocess.Popen[bytes], read: int) -> None:
    """End the program and its whole session, and wait a second at most until it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # `process` may be the parent of the program itself, whose end of the pipe closes last.
    until = time.monotonic() + 1
    while _readable(read, until) and os.read(read, 256):
        pass


def _readable(read: int, until: float) -> bool:
    """Wait for something to read, or the end of it; False when the time is over."""
    # poll, not select: a process with many open files has descriptors that select cannot take
    waiting = select.poll()
    waiting.register(read, select.POLLIN | select.POLLHUP)
    left = until - time.monotonic()
    return left > 0 and bool(waiting.poll(left * 1000))


def _head(file: IO[bytes]) -> tuple[str, bool]:
    file.seek(0)
    kept = file.read(OUTPUT_LIMIT + 1)
    return kept[:OUTPUT_LIMIT].decode("utf-8", "replace"), len(kept) > OUTPUT_LIMIT


def _tail(file: IO[bytes]) -> tuple[str, bool]:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - OUTPUT_LIMIT))
    return file.read(OUTPUT_LIMIT).decode("utf-8", "replace"), size > OUTPUT_LIMIT
