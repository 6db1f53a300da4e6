"""What a task asks and what came of it, one example at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Split = Literal["search", "development", "test"]
"""search: what a search optimises. development: what chooses among its finalists. test: what is
reported, opened once."""
SPLITS: tuple[Split, ...] = ("search", "development", "test")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. role: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One question of a task.

    id: unique within its task and split, and the same in every run. messages: what the model is
    asked. target: the right answer, as the task's kind reads it. choices: the possible answers of
    a multiple choice. extra: what else the scorer needs (a verifier's entry, tests of code).
    """

    id: str
    messages: tuple[Message, ...]
    target: str = ""
    choices: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Of everything but the id: equal for equal content."""
        content = [
            [[m.role, m.content] for m in self.messages],
            self.target,
            list(self.choices),
            dict(self.extra),
        ]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Scored:
    """What one model achieved on one example.

    value: higher is better; 0 to 1 for tasks that are right or wrong, nats per byte for
    likelihoods. said: the model's words, where it spoke. failure: why no answer could be had or
    judged ("" when it could); such an example counts with its value, 0 or the worst.
    """

    id: str
    value: float
    said: str = ""
    failure: str = ""
