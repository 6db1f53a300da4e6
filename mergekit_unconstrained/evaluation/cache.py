"""Scores that are known already, on disk: by weights, task and content of the example.

One append-only JSONL file for each task's key. A line is one score; a torn last line (a run was
killed) and anything else that is no score are passed over. Several processes may read and append at
once: a write is one call, under a lock where the system has one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mergekit_unconstrained.errors import OutputError
from mergekit_unconstrained.evaluation.records import Example, Scored

try:
    import fcntl
except ImportError:  # Windows: appends of one call do without
    fcntl = None  # type: ignore[assignment]


class ScoreCache:
    """A folder of known scores; made when it is not there. OutputError when it cannot be used."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the score cache {str(folder)!r} cannot be made: {error.strerror}"
            ) from error
        self._files: dict[str, _File] = {}

    def known(self, weights: str, key: str, examples: Sequence[Example]) -> list[Scored | None]:
        """For each example its score, None where there is none. weights: "" is never known."""
        if not weights:
            return [None] * len(examples)
        return self._file(key).known(weights, examples)

    def add(
        self, weights: str, key: str, examples: Sequence[Example], scored: Sequence[Scored]
    ) -> None:
        """Keep some scores. weights: "" keeps nothing."""
        if weights and scored:
            self._file(key).add(weights, examples, scored)

    def _file(self, key: str) -> _File:
        if key not in self._files:
            self._files[key] = _File(self._folder / f"{key[:32]}.jsonl")
        return self._files[key]


class _File:
    """The scores of one task's key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_to = 0
        self._scores: dict[tuple[str, str], tuple[float, str, str]] = {}

    def known(self, weights: str, examples: Sequence[Example]) -> list[Scored | None]:
        self._read_on()
        found: list[Scored | None] = []
        for example in examples:
            score = self._scores.get((weights, example.digest))
            found.append(None if score is None else Scored(example.id, *score))
        return found

    def add(self, weights: str, examples: Sequence[Example], scored: Sequence[Scored]) -> None:
        lines = [
            {
                "weights": weights,
                "example": example.digest,
                "value": one.value,
                "said": one.said,
                "failure": one.failure,
            }
            for example, one in zip(examples, scored, strict=True)
        ]
        # surrogates that a tokenizer made are no UTF-8: escaped, they come back as they were
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        try:
            with self._path.open("ab", buffering=0) as file, _locked(file.fileno()):
                if _torn(self._path):
                    data = b"\n" + data
                file.write(data)
        except OSError as error:
            raise OutputError(
                f"cannot write the score cache {str(self._path)!r}: {error.strerror}"
            ) from error

    def _read_on(self) -> None:
        """Take in what has been written since the last time, by whomever."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_to)
                data = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise OutputError(
                f"cannot read the score cache {str(self._path)!r}: {error.strerror}"
            ) from error
        whole = data[: data.rfind(b"\n") + 1]  # the rest is still being written, or torn
        self._read_to += len(whole)
        for line in whole.splitlines():
            score = _score(line)
            if score is not None:
                key, value = score
                self._scores[key] = value


def _score(line: bytes) -> tuple[tuple[str, str], tuple[float, str, str]] | None:
    try:
        row = json.loads(line)
        key = str(row["weights"]), str(row["example"])
        value = float(row["value"]), str(row["said"]), str(row["failure"])
    except (ValueError, KeyError, TypeError):
        return None
    return (key, value) if math.isfinite(value[0]) else None


def _torn(path: Path) -> bool:
    """Whether a file ends inside a line."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
