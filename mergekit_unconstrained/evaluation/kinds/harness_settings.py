"""Settings of `kind: harness`: which benchmark of lm-evaluation-harness, and which documents."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from mergekit_unconstrained.evaluation.records import Split
from mergekit_unconstrained.evaluation.settings import PromptSettings, TaskSettings

_SLICE = re.compile(r"(?:(?P<docs>train|validation|test)(?:\[(?P<range>.*)\])?|(?P<bare>.*))")
_RANGE = re.compile(r"\s*(\d*)\s*:\s*(\d*)\s*")


class HarnessSettings(PromptSettings):
    """Of `kind: harness`."""

    unkeyed: ClassVar[frozenset[str]] = TaskSettings.unkeyed | {"splits", "task"}

    task: str
    """A task of lm-evaluation-harness, or the path of a YAML file (relative to the tasks file)."""
    splits: dict[Split, str] = Field(default={"test": ":"})
    """Which documents: "0:100" of those that lm-eval evaluates on, or "train", "train[0:100]",
    "validation[100:]", "test[:50]"; a plain text is the test split."""
    metric: str | None = None
    """Of the task's metrics; its first where not given."""
    filter: str | None = None
    """Of the task's filters; its first where not given."""
    fewshot: int | None = Field(default=None, ge=0)
    """Worked examples in front of every question; as the task says where not given."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest answer; as the task says where not given."""
    chat: Literal["auto"] | bool = False
    """Whether the tokenizer's chat template is used; auto: where it has one. lm-eval's way is
    false."""

    @field_validator("splits", mode="before")
    @classmethod
    def _one_slice_is_the_test(cls, value: Any) -> Any:
        return {"test": value} if isinstance(value, str) else value

    @field_validator("splits")
    @classmethod
    def _slices_are_readable(cls, value: dict[Split, str]) -> dict[Split, str]:
        if not value:
            raise ValueError("name the documents of at least one split")
        for text in value.values():
            read_slice(text)
        return value


def read_slice(text: str) -> tuple[str | None, int | None, int | None]:
    """`train[5:10]` as (train, 5, 10), `:10` as (None, None, 10); ValueError for anything else."""
    found = _SLICE.fullmatch(text.strip())
    inner = None
    if found is not None:
        inner = ":" if found["docs"] and found["range"] is None else found["range"] or found["bare"]
    bounds = _RANGE.fullmatch(inner or "")
    if found is None or bounds is None:
        raise ValueError(
            f'{text!r} is no choice of documents: write "0:100", "train", "train[0:100]", '
            '"validation[:50]" or "test[100:]"'
        )
    first, last = (int(bound) if bound else None for bound in bounds.groups())
    if first is not None and last is not None and first >= last:
        raise ValueError(f"{text!r} holds no documents: the first number must be the smaller one")
    return found["docs"], first, last
