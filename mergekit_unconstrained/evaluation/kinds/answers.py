"""Answers in the model's own words: equal to the target, the same number, or of a given form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from pydantic import Field, field_validator

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.evaluation.configured import FileTask, SpokenTask
from mergekit_unconstrained.evaluation.records import Example
from mergekit_unconstrained.evaluation.settings import FileSettings, GenerationSettings

_MARKER = re.compile(
    r"####|\banswer[*_]*\s*(?:\b(?:is|was|are)\b|[:=])\s*:?|\\boxed\s*\{", re.IGNORECASE
)
_LATEX = (
    (re.compile(r"(?<=\d)\s*(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2 "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[!,;: ]"), ""),
    (re.compile(r"\\(?=[$%])"), ""),
    (re.compile(r"[−‐‑–]"), "-"),
)
_DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d])|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?![\d]))?"
)
_NUMBER = re.compile(
    rf"(?<!\w)(?<!\d\.)"  # not inside a word, nor the rest of 1.2.3
    rf"(?:(?<![\w)\]}}])(?P<sign>[-+]))?(?:[$€£]\s?)?(?P<minus>-)?"
    rf"(?:(?P<whole>\d+)\s(?=\d+\s?/\s?\d))?"
    rf"(?P<over>{_DIGITS})(?:\s?/\s?(?P<under>{_DIGITS}))?"
)


class WordsSettings(GenerationSettings, FileSettings):
    """What answers in words may be told."""

    pattern: str | None = None
    """A regular expression; its last match in the answer (its first group, where it has one) is
    judged instead of the whole. No match: no answer."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value


class ExactSettings(WordsSettings):
    """Of `kind: exact`."""

    ignore_case: bool = False
    """Whether upper and lower case are the same."""


class NumericSettings(WordsSettings):
    """Of `kind: numeric`."""

    tolerance: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    """How far off a number may be: absolutely up to 1, beyond that in proportion to the target."""


class RegexSettings(WordsSettings):
    """Of `kind: regex`."""

    search: bool = False
    """Whether the target may match a part of the answer; else all of it, white space around it
    apart."""


class ExactTask(SpokenTask[ExactSettings], FileTask[ExactSettings]):
    """Right when the answer is the target, white space and a final punctuation mark apart."""

    settings_class = ExactSettings
    unit = "exact match"

    def judge(self, example: Example, said: str) -> float:
        """As in SpokenTask."""
        part = extracted(self.settings.pattern, said)
        fold = self.settings.ignore_case
        return float(part is not None and normal(part, fold) == normal(example.target, fold))


class NumericTask(SpokenTask[NumericSettings], FileTask[NumericSettings]):
    """Right when the answer's number is the target's."""

    settings_class = NumericSettings
    unit = "numeric match"

    def example(self, id: str, row: Mapping[str, Any], where: str) -> Example:
        """As in FileTask."""
        found = super().example(id, row, where)
        if answer_number(found.target) is None:
            raise DataError(
                f"{where}: {self.settings.target!r} holds no number: {found.target[:60]!r}"
            )
        return found

    def judge(self, example: Example, said: str) -> float:
        """As in SpokenTask."""
        part = extracted(self.settings.pattern, said)
        got = None if part is None else answer_number(part)
        return float(same_number(got, answer_number(example.target), self.settings.tolerance))


class RegexTask(SpokenTask[RegexSettings], FileTask[RegexSettings]):
    """Right when the target, a regular expression, matches the answer, or what `pattern` leaves."""

    settings_class = RegexSettings
    unit = "regex match"

    def example(self, id: str, row: Mapping[str, Any], where: str) -> Example:
        """As in FileTask."""
        found = super().example(id, row, where)
        try:
            re.compile(found.target)
        except re.error as error:
            raise DataError(
                f"{where}: {self.settings.target!r} is not a regular expression: {error}"
            ) from None
        return found

    def judge(self, example: Example, said: str) -> float:
        """As in SpokenTask."""
        part = extracted(self.settings.pattern, said)
        if part is None:
            return 0.0
        if self.settings.search:
            return float(re.search(example.target, part) is not None)
        return float(re.fullmatch(example.target, part.strip()) is not None)


def extracted(pattern: str | None, said: str) -> str | None:
    """The part of an answer that is judged; None when the pattern is nowhere in it."""
    if pattern is None:
        return said
    matches = list(re.finditer(pattern, said))
    if not matches:
        return None
    last = matches[-1]
    return (last[1] or "") if last.re.groups else last[0]


def normal(text: str, fold: bool = False) -> str:
    """Text for comparing: white space collapsed, no punctuation at the end, case folded or not.

    A text that is nothing but punctuation keeps it.
    """
    plain = " ".join(text.split())
    plain = plain.rstrip(".,;:!?").rstrip() or plain
    return plain.casefold() if fold else plain


def answer_number(text: str) -> Fraction | None:
    """The number an answer gives; None when it gives none.

    Behind the last marker (####, \\boxed{, "answer:", "answer is") the first number of the line, or
    the one behind its last equals sign; without marker, or without a number there, the last one of
    the text. Read are 1,234.50, -3, 1/2, 2 1/2, $5, 2e-3, 50% (as 50) and LaTeX's \\frac.
    """
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    marks = list(_MARKER.finditer(text))
    if marks:
        lines = text[marks[-1].end() :].strip().split("\n", 1)[0]
        sentence = re.split(r"[.!?;]\s", lines, maxsplit=1)[0]
        said = _numbers(sentence.rpartition("=")[2]) or _numbers(sentence)
        if said:
            return said[0]
    found = _numbers(text)
    return found[-1] if found else None


def same_number(got: Fraction | None, right: Fraction | None, tolerance: float) -> bool:
    """Whether |got - right| <= tolerance * max(1, |right|)."""
    if got is None or right is None:
        return False
    return abs(got - right) <= Fraction(tolerance) * max(Fraction(1), abs(right))


def _numbers(text: str) -> list[Fraction]:
    found = []
    for match in _NUMBER.finditer(text):
        try:
            number = Fraction(match["over"].replace(",", ""))
            if match["under"]:
                number /= Fraction(match["under"].replace(",", ""))
            if match["whole"]:
                number += int(match["whole"])
        except (ValueError, ZeroDivisionError):  # thousands of digits; x/0
            continue
        found.append(-number if (match["sign"] == "-") != bool(match["minus"]) else number)
    return found
