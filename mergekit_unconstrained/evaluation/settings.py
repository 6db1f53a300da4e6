"""The tasks file: what every kind of task may be told, and the reading of it.

Strict: an unknown key or an impossible value is one error that names file, line and key. What only
one kind may be told stands in the kind's own file (kinds/).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mergekit_unconstrained.config.document import Document, Place
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.evaluation.kinds import KINDS, kind_class
from mergekit_unconstrained.evaluation.records import Split

if TYPE_CHECKING:
    from mergekit_unconstrained.evaluation.configured import ConfiguredTask


class TaskSettings(BaseModel):
    """What every task may be told.

    unkeyed: fields on which the score of a given example does not depend (they choose examples, or
    weigh scores); a kind with more of them adds to the set.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    unkeyed: ClassVar[frozenset[str]] = frozenset({"weight", "limit", "allow_test_split"})

    kind: str
    """How answers are had and judged."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """In the mean over tasks that a search maximises."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many examples of every split only."""
    allow_test_split: bool = False
    """Let a search optimise on what looks like a published benchmark's test split."""

    def digest(self, **more: Any) -> str:
        """Hash of the fields that a score depends on, and of `more` (JSON values)."""
        fields = self.model_dump(mode="json", exclude=set(self.unkeyed))
        text = json.dumps([fields, more], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


class PromptSettings(TaskSettings):
    """A task that puts questions to the model."""

    system: str = ""
    """A system message before every question."""
    chat: Literal["auto"] | bool = "auto"
    """Whether the tokenizer's chat template is used; auto: where it has one. Without it, the
    messages are joined by newlines, earlier answers end as the model ends a text."""


class JoinedSettings(PromptSettings):
    """A task whose prompt and answer we put together."""

    separator: str = "auto"
    """Without a chat template: the text between prompt and answer, "" for nothing. auto: a newline,
    as a fusion trains; nothing behind a prompt that ends in white space."""


class FileSettings(JoinedSettings):
    """A task whose examples lie in JSONL files."""

    unkeyed: ClassVar[frozenset[str]] = TaskSettings.unkeyed | {
        *("data", "prompt", "messages", "target", "system")  # what they say is in the examples
    }

    data: dict[Split, str]
    """The file of each split, relative to the tasks file; a plain string is the test split."""
    prompt: str = "prompt"
    """Column of the question."""
    messages: str | None = None
    """Column of a whole conversation up to the answer, `[{role, content}, ...]`, instead."""
    target: str = "target"
    """Column of the right answer."""

    @field_validator("data", mode="before")
    @classmethod
    def _one_file_is_the_test(cls, value: Any) -> Any:
        return {"test": value} if isinstance(value, str) else value

    @field_validator("data")
    @classmethod
    def _has_a_split(cls, value: dict[Split, str]) -> dict[Split, str]:
        if not value:
            raise ValueError("name the file of at least one split")
        return value


class GenerationSettings(BaseModel):
    """A task that lets the model speak; mixed into one of the classes above."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer; one that has not ended by then counts as a failure, scored all the same."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer is cut."""

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty text would stop every answer before it begins")
        return value


def load_tasks(path: str | Path, *, allow_code: bool = False) -> tuple[ConfiguredTask, ...]:
    """The tasks of a tasks file, in its order; RecipeError names file, line and key.

    allow_code: whether model-written Python may run, whatever the file says.
    """
    document = Document.read(path, what="tasks file")
    if not isinstance(document.data, dict):
        document.fail((), "a tasks file has the key `tasks`, which maps names to tasks")
    for key in document.data:
        if key != "tasks":
            document.fail((key,), f"no such key. {suggest(key, ['tasks'])}")
    return read_tasks(document, Path(path).parent, allow_code=allow_code)


def read_tasks(
    document: Document, folder: Path, *, allow_code: bool = False
) -> tuple[ConfiguredTask, ...]:
    """The tasks under the key `tasks` of any YAML file (a search's too).

    folder: what the tasks' paths are relative to. allow_code: as in `load_tasks`.
    """
    tasks = document.data.get("tasks") if isinstance(document.data, dict) else None
    if not isinstance(tasks, dict) or not tasks:
        document.fail(
            ("tasks",) if ("tasks",) in document.lines else (),
            "`tasks` maps names to tasks, as in `tasks: {sums: {kind: exact, data: sums.jsonl}}`",
        )
    return tuple(_task(document, str(n), ("tasks", n), folder, allow_code) for n in tasks)


def _task(
    document: Document, name: str, place: Place, folder: Path, allow_code: bool
) -> ConfiguredTask:
    given = document.data["tasks"][place[-1]]
    if not isinstance(given, dict):
        document.fail(place, "a task maps settings to values; `kind` is one of them")
    kind = given.get("kind")
    if kind is None:
        document.fail(place, f"has no `kind`. {suggest('', KINDS)}")
    if not isinstance(kind, str) or kind not in KINDS:
        document.fail(
            (*place, "kind"), f"no kind of task is called {kind!r}. {suggest(kind, KINDS)}"
        )
    task_class = kind_class(kind)
    settings_class = task_class.settings_class
    known = settings_class.model_fields
    for key in given:
        if key not in known:
            document.fail(
                (*place, key), f"no such setting of `kind: {kind}`. {suggest(key, known)}"
            )
    if allow_code and "allow_code" in known:
        given = {**given, "allow_code": True}
    return task_class(name, _validated(document, place, settings_class, given), folder)


def _validated(
    document: Document, place: Place, settings_class: type[TaskSettings], given: dict[str, Any]
) -> TaskSettings:
    try:
        return settings_class.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            document.fail(place, f"`{'.'.join(_words(first['loc']))}` is missing")
        told = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            document.fail(place, told)
        # pydantic puts names of its own behind ours (the branch of a union): name what the file has
        inner = tuple(part for part in first["loc"] if isinstance(part, str | int))
        while inner and (*place, *inner) not in document.lines:
            inner = inner[:-1]
        document.fail((*place, *inner), f"{first['input']!r} will not do: {told}")


def _words(place: Iterable[int | str]) -> list[str]:
    return [str(part) for part in place]
