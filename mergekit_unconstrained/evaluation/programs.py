"""What kinds of tasks that run model-written Python have in common."""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from pydantic import Field

from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.evaluation.configured import FileTask
from mergekit_unconstrained.evaluation.sandbox import Ran, run_python
from mergekit_unconstrained.evaluation.settings import FileSettings, GenerationSettings

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.S | re.M)
_ANY_BLOCK = re.compile(r"^[ \t]*```[ \t]*([^\n`]*)\n(.*?)(?:^[ \t]*```|\Z)", re.S | re.M)


class ProgramSettings(GenerationSettings, FileSettings):
    """A task that runs what the model writes; a kind adds to it."""

    unkeyed: ClassVar[frozenset[str]] = FileSettings.unkeyed | {"allow_code"}

    max_new_tokens: int = Field(default=512, ge=1)
    """Longest answer, of one round where there are several; one that has not ended by then counts
    as a failure, scored all the same."""
    allow_code: bool = False
    """Whether Python that the model writes may be run (in a sandbox, see evaluation/sandbox.py)."""
    time_limit: float = Field(default=5.0, gt=0, le=600)
    """Seconds of wall-clock time for a program."""
    memory_mb: int = Field(default=1024, ge=64)
    """Address space of a program; not enforced by macOS."""
    packages: tuple[str, ...] = ()
    """Installed packages that a program may import besides the standard library."""


@dataclass(frozen=True)
class Program:
    """A program and the files that lie beside it."""

    code: str
    files: Mapping[str, str] = field(default_factory=dict)


class Block(NamedTuple):
    """A fenced block of Python. end: where in the text it is over. closed: its fence is there."""

    code: str
    end: int
    closed: bool


P = TypeVar("P", bound=ProgramSettings)


class ProgramTask(FileTask[P]):
    """A task that runs what the model writes; RecipeError unless that is allowed."""

    def __init__(self, name: str, settings: P, folder: Path) -> None:
        if not settings.allow_code:
            raise RecipeError(
                f"task {name!r} runs Python that the model writes, in a sandbox that is a guard "
                "rail and not a jail: allow it with --allow-code, or with `allow_code: true` in "
                "the task"
            )
        super().__init__(name, settings, folder)


def run_programs(programs: Sequence[Program], settings: ProgramSettings) -> list[Ran]:
    """Run programs, several at a time; half of the cores, so that time limits mean something."""

    def run(program: Program) -> Ran:
        return run_python(
            program.code,
            seconds=settings.time_limit,
            memory_mb=settings.memory_mb,
            files=program.files,
            packages=settings.packages,
        )

    workers = min(len(programs), max(1, (os.cpu_count() or 1) // 2))
    if workers <= 1:
        return [run(program) for program in programs]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, programs))


def stopped(ran: Ran, settings: ProgramSettings) -> str:
    """Why a program did not come to an end of its own; "" when it did."""
    return {
        "timeout": f"the program ran longer than {settings.time_limit:g} seconds",
        "memory": f"the program needed more than {settings.memory_mb} MB of memory",
        "killed": "the program ended without a word",
    }.get(ran.status, "")


def first_block(text: str) -> Block | None:
    """The first fenced block that says it is Python; the end of the text ends it too."""
    found = _BLOCK.search(text)
    if found is None:
        return None
    return Block(found[1], found.end(), found[0].rstrip(" \t").endswith("```"))


def blocks(text: str) -> list[str]:
    """The fenced blocks that are Python or do not say what they are."""
    found = _ANY_BLOCK.findall(text)
    return [code for kind, code in found if kind.strip().lower() in ("", "py", "python", "python3")]


def without_blocks(text: str) -> str:
    """A text without any fenced block."""
    return _ANY_BLOCK.sub("\n", text)


def parses(code: str) -> bool:
    """Whether this is Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escape sequences; not ours to mend
        try:
            ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True
