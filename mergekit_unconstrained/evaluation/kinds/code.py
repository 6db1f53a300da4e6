"""Programming tasks in the manner of HumanEval and MBPP: right when all tests of an example pass.

HumanEval: `prompt` is the beginning of a function, `tests` defines `check(candidate)`, and
`entry_point` names the function. MBPP: `prompt` is in words, `tests` is a list of assertions.
Chen et al. 2021, arXiv 2107.03374; Austin et al. 2021, arXiv 2108.07732.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import model_validator

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.evaluation.programs import (
    Program,
    ProgramSettings,
    ProgramTask,
    blocks,
    parses,
    run_programs,
    stopped,
)
from mergekit_unconstrained.evaluation.prompts import between, is_templated
from mergekit_unconstrained.evaluation.reading import text_of, value_of
from mergekit_unconstrained.evaluation.records import Example, Scored
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.evaluation.task import Advance

# The answer is not `__main__`: what it does when run as a script is no part of the task. Its parts
# have files of their own because `from __future__ import ...` must stand first.
_BEFORE_TESTS = """\
import sys
__name__ = "answer"
sys.modules[__name__] = sys.modules["__main__"]
for __file__ in FILES:
    with open(__file__, encoding="utf-8", errors="surrogatepass") as file:
        exec(compile(file.read(), __file__, "exec", dont_inherit=True), globals())
"""
_TRIES = 400
"""Lines given up at the end of an answer that is not Python as a whole."""


class CodeSettings(ProgramSettings):
    """Of `kind: code`."""

    unkeyed: ClassVar[frozenset[str]] = ProgramSettings.unkeyed | {"tests", "entry_point", "setup"}

    target: str = "target"
    """Not for `kind: code`: the tests judge an answer."""
    tests: str = "test"
    """Column of the tests: Python, or a list of Python statements."""
    entry_point: str | None = None
    """Column of the name of the function that is tested; the tests then define `check(function)`,
    as HumanEval's do, or call it by its name."""
    setup: str | None = None
    """Column of Python that is run before the tests (MBPP: test_setup_code)."""

    @model_validator(mode="after")
    def _has_no_target(self) -> CodeSettings:
        if "target" in self.model_fields_set:
            raise ValueError("`kind: code` has no `target`: the tests judge an answer")
        return self


class CodeTask(ProgramTask[CodeSettings]):
    """Right when all tests pass. The answer is a fenced block, or continues the prompt."""

    settings_class = CodeSettings
    unit = "tests passed"

    def example(self, id: str, row: Mapping[str, Any], where: str) -> Example:
        """As in FileTask."""
        settings = self.settings
        extra = {"tests": _tests(row, settings.tests, where)}
        if settings.entry_point is not None:
            name = text_of(row, settings.entry_point, "entry_point", where)
            if not name.isidentifier():
                raise DataError(
                    f"{where}: {settings.entry_point!r} is no name of a function: {name!r}"
                )
            extra["entry_point"] = name
        if settings.setup is not None:
            extra["setup"] = str(value_of(row, settings.setup, "setup", where) or "")
        return Example(id, self.messages(row, where), extra=extra)

    def score(
        self, subject: Subject, examples: Sequence[Example], advance: Advance = lambda _: None
    ) -> list[Scored]:
        """As in Task."""
        spoken = subject.continuations(
            [example.messages for example in examples],
            max_new_tokens=self.settings.max_new_tokens,
            stop=self.settings.stop,
            chat=self.chat,
            separator=self.separator,
            advance=advance,
        )
        joined = "" if is_templated(subject.tokenizer, self.chat) else self.separator
        programs = [
            tested(example, answer_parts(example, one.text, joined))
            for example, one in zip(examples, spoken, strict=True)
        ]
        return [
            Scored(
                example.id,
                # complete: sys.exit(0) in the answer must not leave before the tests
                float(ran.status == "ok" and ran.complete),
                one.text,
                one.failure or stopped(ran, self.settings),
            )
            for example, one, ran in zip(
                examples, spoken, run_programs(programs, self.settings), strict=True
            )
        ]


def answer_parts(example: Example, said: str, separator: str = "") -> tuple[str, ...]:
    """The program that an answer means, as parts to be run one after the other.

    The first fenced block that defines the entry point, else the last block, else the words
    themselves. What does not define the entry point continues the prompt; what does is run behind
    the prompt where that is Python (it may import what the function needs). separator: what the
    model read between prompt and answer, as prompts.py has it.
    """
    prompt = example.messages[-1].content if example.messages else ""
    name = example.extra.get("entry_point")
    fenced = blocks(said)
    own = [code for code in fenced if name is not None and _defines(code, name)]
    code = own[0] if own else fenced[-1] if fenced else said
    if name is not None and not _defines(code, name):
        return (_longest_python(prompt + between(prompt, separator), code),)
    return (*([prompt] if parses(prompt) else []), _longest_python("", code))


def tested(example: Example, parts: Sequence[str]) -> Program:
    """An answer with its tests behind it."""
    files = {f"answer{number}.py": part for number, part in enumerate(parts)}
    before = _BEFORE_TESTS.replace("FILES", repr(list(files)))
    lines = [before, example.extra.get("setup", ""), example.extra["tests"]]
    name = example.extra.get("entry_point")
    if name is not None and _defines(example.extra["tests"], "check"):
        lines.append(f"check({name})")
    return Program("\n".join(lines) + "\n", files)


def _tests(row: Mapping[str, Any], column: str, where: str) -> str:
    value = value_of(row, column, "tests", where)
    lines = value if isinstance(value, list) else [value]
    if not lines or not all(isinstance(line, str) for line in lines):
        raise DataError(f"{where}: {column!r} must be Python, or a list of Python statements")
    found = "\n".join(lines)
    if not found.strip():
        raise DataError(f"{where}: {column!r} is empty: every answer would pass")
    if not parses(found):
        raise DataError(f"{where}: {column!r} is not Python: {found[:60]!r}")
    return found


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b", code, re.M) is not None


def _longest_python(before: str, code: str) -> str:
    """The whole where it is Python, else without the lines at its end that keep it from being so:
    words behind a function, the rest of an answer that was cut."""
    whole = before + code
    lines = code.split("\n")
    for kept in range(len(lines), max(0, len(lines) - _TRIES), -1):
        part = before + "\n".join(lines[:kept])
        if parses(part):
            return part
    return whole
