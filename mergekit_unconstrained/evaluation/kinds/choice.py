"""Multiple choice: the choice that the model finds likeliest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.evaluation.configured import FileTask
from mergekit_unconstrained.evaluation.prompts import AUTO
from mergekit_unconstrained.evaluation.reading import texts_of, value_of
from mergekit_unconstrained.evaluation.records import Example, Scored
from mergekit_unconstrained.evaluation.settings import FileSettings
from mergekit_unconstrained.evaluation.subject import Likelihood, Subject
from mergekit_unconstrained.evaluation.task import Advance


class ChoiceSettings(FileSettings):
    """Of `kind: choice`. The column `target` holds the right choice's index, from 0, or text."""

    unkeyed = FileSettings.unkeyed | {"choices"}

    choices: str = "choices"
    """Column of the possible answers."""
    before: str = ""
    """Text put before every choice, such as a space; white space takes the place of
    `separator: auto`."""
    normalise: Literal["bytes", "tokens", "none"] = "bytes"
    """What a choice's log-likelihood is divided by, so that long choices stand a chance."""
    end: bool = False
    """Whether the end of turn behind a choice counts."""


class ChoiceTask(FileTask[ChoiceSettings]):
    """Right when the likeliest choice is the target; the first one where several are."""

    settings_class = ChoiceSettings
    unit = "accuracy"

    def example(self, id: str, row: Mapping[str, Any], where: str) -> Example:
        """As in FileTask; the target becomes the right choice's index."""
        choices = texts_of(row, self.settings.choices, "choices", where)
        if len(choices) < 2:
            raise DataError(f"{where}: {self.settings.choices!r} must hold two choices at least")
        right = _index(value_of(row, self.settings.target, "target", where), choices)
        if right is None:
            raise DataError(
                f"{where}: {self.settings.target!r} is {row[self.settings.target]!r}: neither one "
                f"of the choices nor an index from 0 to {len(choices) - 1}"
            )
        return Example(id, self.messages(row, where), target=str(right), choices=choices)

    @property
    def separator(self) -> str:
        """As in ConfiguredTask."""
        given = self.settings.separator
        return "" if given == AUTO and self.settings.before[:1].isspace() else given

    def score(
        self, subject: Subject, examples: Sequence[Example], advance: Advance = lambda _: None
    ) -> list[Scored]:
        """As in Task."""
        asked = [(example, choice) for example in examples for choice in example.choices]
        likely = subject.log_likelihoods(
            [example.messages for example, _ in asked],
            [self.settings.before + choice for _, choice in asked],
            end=self.settings.end,
            chat=self.chat,
            separator=self.separator,
        )
        found, first = [], 0
        for example in examples:
            own = likely[first : first + len(example.choices)]
            first += len(own)
            found.append(self._choose(example, own))
        advance(len(examples))
        return found

    def _choose(self, example: Example, likely: Sequence[Likelihood]) -> Scored:
        failure = next((one.failure for one in likely if one.failure), "")
        if failure:
            return Scored(example.id, self.worst, failure=failure)
        values = [one.nats / self._size(one) for one in likely]
        best = values.index(max(values))
        return Scored(example.id, float(str(best) == example.target), example.choices[best])

    def _size(self, one: Likelihood) -> int:
        sizes = {"bytes": one.bytes, "tokens": one.tokens, "none": 1}
        return max(1, sizes[self.settings.normalise])


def _index(target: Any, choices: Sequence[str]) -> int | None:
    """Which choice a target means: a whole number is an index; a text that is no choice, too."""
    if isinstance(target, bool) or not isinstance(target, str | int):
        return None
    if isinstance(target, str):
        if target in choices:
            return choices.index(target)
        if not target.strip().isdecimal():
            return None
    number = int(target)
    return number if 0 <= number < len(choices) else None
