"""Merges that run here: our own command in a process of its own, one for each person at a time.

The command is a list of arguments and never passes a shell; the process gets a few variables of the
environment, its own folder, and nobody's token but that of the person it runs for.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_unconstrained.errors import OutputError

COMMAND = "from mergekit_unconstrained.cli import main; main()"
KEPT = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "HF_ENDPOINT", "HF_HOME",
    "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "MERGEKIT_UNCONSTRAINED_CACHE",
)  # fmt: skip
"""What a job's process sees of our environment."""
TAIL = 64 * 1024
GRACE = 5.0
LEFT_BEHIND = 24 * 3600.0
_TOKEN = re.compile(r"hf_(?:oauth_)?[A-Za-z0-9.\-]{20,}")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PERCENT = re.compile(r"(?:^|[\r\n])(?!Warmup)[^\r\n%]*?(\d{1,3})%\|")


@dataclass(frozen=True)
class Progress:
    """What is seen of a job. fraction: in 0..1. returncode: None while it runs."""

    fraction: float
    lines: tuple[str, ...]
    seconds: float
    returncode: int | None = None


@dataclass
class Job:
    """One run of a recipe. folder: all of it. out: the result, there once it has succeeded."""

    owner: str
    folder: Path
    out: Path
    process: subprocess.Popen[bytes]
    secrets: tuple[str, ...]
    names: Mapping[str, str]
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    cancelled: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether the result is there."""
        return self.process.poll() == 0 and self.out.is_dir()

    def progress(self) -> Progress:
        """How far it is, and the end of its log."""
        code = self.process.poll()
        if code is not None and self.ended is None:
            self.ended = time.monotonic()
        text = self._text()
        found = _PERCENT.findall(text)
        fraction = min(int(found[-1]), 100) / 100 if found else 0.0
        lines = tuple(_last_state(line) for line in text.split("\n"))
        seconds = (self.ended or time.monotonic()) - self.started
        done = 1.0 if code == 0 else fraction
        return Progress(done, tuple(line for line in lines if line), seconds, code)

    def _text(self) -> str:
        try:
            with (self.folder / "log.txt").open("rb") as stream:
                stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL))
                text = stream.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        for path, name in sorted(self.names.items(), key=lambda item: -len(item[0])):
            text = text.replace(path, name)
        return scrubbed(_ANSI.sub("", text), self.secrets)

    def stop(self) -> None:
        """End the process and all it started, and remove what it left."""
        if self.process.poll() is None:
            self.cancelled = True
            self._signal(signal.SIGTERM)
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
                self.process.wait()
            self._signal(signal.SIGKILL)  # what it started and left behind
            shutil.rmtree(self.out.with_name(self.out.name + ".partial"), ignore_errors=True)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            return


class Jobs:
    """The jobs of one Space: one for each person, a few at a time.

    folder: where they live. most: at a time, of all people. minutes: after which one is stopped.
    separate: whether every job has its own cache of models, as where people must not see each
    other's. results: where results go to stay; None where they go with the page or the next job.
    """

    def __init__(
        self,
        folder: Path,
        *,
        most: int = 2,
        minutes: float = 60,
        separate: bool = False,
        results: Path | None = None,
    ) -> None:
        self.folder, self.most, self.minutes, self.separate = folder, most, minutes, separate
        self.results = results
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("job-*"):  # by a page that was killed
            if time.time() - left.stat().st_mtime > LEFT_BEHIND:
                shutil.rmtree(left, ignore_errors=True)

    def start(
        self, owner: str, recipe: str, name: str, models: Path, token: str | None = None
    ) -> Job:
        """Run a recipe; OutputError when this person has a job already, or too many run.

        name: of the result's folder. models: the folder that local names are relative to.
        """
        with self._lock:
            running = [j for j in self._jobs.values() if j.process.poll() is None]
            if any(j.owner == owner for j in running):
                raise OutputError("a merge of yours is running: wait for it, or cancel it")
            if len(running) >= self.most:
                raise OutputError(f"{len(running)} merges are running: try again in a while")
            self._forget(owner)
            folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="job-"))
            (folder / "recipe.yml").write_text(recipe, encoding="utf-8")
            job = self._run(owner, folder, name, models, token)
            self._jobs[owner] = job
            return job

    def _run(self, owner: str, folder: Path, name: str, models: Path, token: str | None) -> Job:
        # Written where it stays, so that not even a page that is killed takes it along.
        out = folder / name if self.results is None else self._free(self.results, name)
        arguments = ["yaml", str(folder / "recipe.yml"), str(out)]
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *arguments],
                cwd=models,
                env=self._environment(folder, token),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        names = {f"{folder}/": "", f"{models}/": "", str(folder): ".", str(models): "."}
        return Job(owner, folder, out, process, (token,) if token else (), names)

    def _free(self, folder: Path, name: str) -> Path:
        """A folder of that name that nobody has or writes: NAME, else NAME-2 and so on."""
        folder.mkdir(parents=True, exist_ok=True)
        taken = {entry.name.removesuffix(".partial") for entry in folder.iterdir()}
        taken |= {j.out.name for j in self._jobs.values() if j.process.poll() is None}
        names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        return folder / next(n for n in names if n not in taken)

    def _environment(self, folder: Path, token: str | None) -> dict[str, str]:
        kept = {key: os.environ[key] for key in KEPT if key in os.environ}
        scratch = folder / "tmp"
        scratch.mkdir()
        found = {
            **kept,
            "TMPDIR": str(scratch),
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        }
        if self.separate:
            found |= {"HF_HOME": str(folder / "hub"), "HOME": str(folder)}
            found.pop("HF_HUB_CACHE", None)
        found |= {"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        return found

    def follow(self, job: Job, pause: float = 0.4) -> Iterator[Progress]:
        """What is seen of a job until it ends; the last one has a return code."""
        while True:
            seen = job.progress()
            if seen.returncode is None and seen.seconds > self.minutes * 60:
                job.stop()
                seen = job.progress()
            yield seen
            if seen.returncode is not None:
                self._tidy(job)
                return
            time.sleep(pause)

    def of(self, owner: str) -> Job | None:
        """This person's job, running or done."""
        return self._jobs.get(owner)

    def cancel(self, owner: str) -> bool:
        """Stop this person's job; whether there was one."""
        job = self._jobs.get(owner)
        if job is None or job.process.poll() is not None:
            return False
        job.stop()
        return True

    def leave(self, owner: str) -> None:
        """Stop a person's job, and remove a result that was to stay nowhere: the page is gone."""
        with self._lock:
            self._forget(owner)

    def close(self) -> None:
        """Stop everything."""
        with self._lock:
            for owner in list(self._jobs):
                self._forget(owner)

    def _forget(self, owner: str) -> None:
        job = self._jobs.pop(owner, None)
        if job is not None:
            job.stop()
            shutil.rmtree(job.folder, ignore_errors=True)

    @staticmethod
    def _tidy(job: Job) -> None:
        """Drop what only the run needed; recipe, log and result stay."""
        for name in ("tmp", "hub"):
            shutil.rmtree(job.folder / name, ignore_errors=True)


def scrubbed(text: str, secrets: tuple[str, ...] = ()) -> str:
    """Text without tokens: the given ones, and whatever looks like one of the Hub's."""
    for secret in secrets:
        text = text.replace(secret, "hf_***")
    return _TOKEN.sub("hf_***", text)


def _last_state(line: str) -> str:
    """What a terminal would show of a line that was drawn over again and again."""
    states = [s for s in line.split("\r") if s.strip()]
    return states[-1].rstrip() if states else ""
