"""Tasks made from settings: what their kinds have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

from mergekit_unconstrained.evaluation.reading import messages_of, read_rows, text_of
from mergekit_unconstrained.evaluation.records import SPLITS, Example, Message, Scored, Split
from mergekit_unconstrained.evaluation.settings import (
    FileSettings,
    GenerationSettings,
    JoinedSettings,
    PromptSettings,
    TaskSettings,
)
from mergekit_unconstrained.evaluation.splits import benchmark_named
from mergekit_unconstrained.evaluation.subject import Continuation, Subject
from mergekit_unconstrained.evaluation.task import Advance, Task

S = TypeVar("S", bound=TaskSettings)
F = TypeVar("F", bound=FileSettings)


class ConfiguredTask(Task, Generic[S]):
    """A task of the tasks file.

    name: as the file calls it. folder: what paths are relative to.
    """

    settings_class: ClassVar[type[TaskSettings]]
    version: ClassVar[int] = 1
    """Raised when the kind's code scores differently than before, so that no old score is taken."""
    worst: ClassVar[float] = 0.0
    """The value of an example that could not be scored."""
    solved_at: float | None = 1.0

    def __init__(self, name: str, settings: S, folder: Path) -> None:
        self.name = name
        self.settings = settings
        self.folder = folder
        self.weight = settings.weight

    @property
    def key(self) -> str:
        """As in Task."""
        return self.settings.digest(version=self.version)

    @property
    def chat(self) -> bool | None:
        """As Subject takes it: None for auto."""
        chat = cast(PromptSettings, self.settings).chat
        return None if chat == "auto" else chat

    @property
    def separator(self) -> str:
        """As Subject takes it."""
        return cast(JoinedSettings, self.settings).separator

    def benchmark(self, split: Split) -> str | None:  # noqa: ARG002 - for kinds that know
        """The published benchmark whose test split these examples are; None where not known."""
        return None

    def asked(self, question: str) -> tuple[Message, ...]:
        """A question as messages, behind the task's system message."""
        system = cast(PromptSettings, self.settings).system
        before = (Message("system", system),) if system else ()
        return (*before, Message("user", question))


class FileTask(ConfiguredTask[F]):
    """Examples from JSONL files; a kind may say more in `example`."""

    def __init__(self, name: str, settings: F, folder: Path) -> None:
        super().__init__(name, settings, folder)
        self._read: dict[Split, list[Example]] = {}

    def splits(self) -> tuple[Split, ...]:
        """As in Task."""
        return tuple(split for split in SPLITS if split in self.settings.data)

    def examples(self, split: Split) -> Sequence[Example]:
        """As in Task. Ids are the rows' numbers, from 0."""
        if split not in self._read:
            path = self.path(split)
            rows = read_rows(path, self.settings.limit)
            self._read[split] = [
                self.example(str(i), row, f"{path}:{line}") for i, (line, row) in enumerate(rows)
            ]
        return self._read[split]

    def path(self, split: Split) -> Path:
        """The file of a split."""
        return self.folder / Path(self.settings.data[split]).expanduser()

    def benchmark(self, split: Split) -> str | None:
        """As in ConfiguredTask, judged by the file's name."""
        return benchmark_named(self.settings.data[split])

    def example(self, id: str, row: Mapping[str, Any], where: str) -> Example:
        """One row as an example. where: file and line, for messages. DataError."""
        messages = self.messages(row, where)
        return Example(id, messages, target=text_of(row, self.settings.target, "target", where))

    def messages(self, row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
        """What a row asks, behind the task's system message. DataError."""
        if self.settings.messages is None:
            return self.asked(text_of(row, self.settings.prompt, "prompt", where))
        found = messages_of(row, self.settings.messages, where)
        system = self.settings.system
        return (Message("system", system), *found) if system else found


class SpokenTask(ConfiguredTask[S]):
    """The model speaks, and what it says is judged for itself."""

    @abstractmethod
    def judge(self, example: Example, said: str) -> float:
        """The value of what was said, 0 to 1."""

    def score(
        self, subject: Subject, examples: Sequence[Example], advance: Advance = lambda _: None
    ) -> list[Scored]:
        """As in Task."""
        settings = cast(GenerationSettings, self.settings)
        spoken: list[Continuation] = subject.continuations(
            [example.messages for example in examples],
            max_new_tokens=settings.max_new_tokens,
            stop=settings.stop,
            chat=self.chat,
            separator=self.separator,
            advance=advance,
        )
        return [
            Scored(example.id, self.judge(example, one.text), one.text, one.failure)
            for example, one in zip(examples, spoken, strict=True)
        ]
