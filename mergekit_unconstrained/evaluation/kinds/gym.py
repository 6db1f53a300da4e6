"""Questions out of reasoning-gym's generators, judged by its own verifiers.

Splits come from seeds far apart, and no question of an earlier split (test, development, search, in
that order) is asked in a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import DataError, MissingExtraError, RecipeError
from mergekit_unconstrained.evaluation.configured import SpokenTask
from mergekit_unconstrained.evaluation.kinds.answers import extracted
from mergekit_unconstrained.evaluation.records import SPLITS, Example, Split
from mergekit_unconstrained.evaluation.settings import (
    GenerationSettings,
    JoinedSettings,
    TaskSettings,
)
from mergekit_unconstrained.evaluation.splits import question_digest

_APART = 10_000_000
"""reasoning-gym draws example i of seed s from Random(s + i): seed 1 and seed 2 would share nearly
all of their questions, so ours are multiplied by more than any split is long."""
_DRAWS = 20
"""Tries for every question wanted, before a generator counts as exhausted."""
_SEEDS: dict[Split, int] = {"search": 1, "development": 2, "test": 3}
_MARKER = r"(?i:####|\banswer[*_]*\s*(?::|is\b))[*_:\s]*(.+)"


class GymSettings(GenerationSettings, JoinedSettings):
    """Of `kind: gym`."""

    unkeyed: ClassVar[frozenset[str]] = TaskSettings.unkeyed | {"seeds", "size", "system"}

    generator: str
    """A data set of reasoning-gym, such as leg_counting."""
    config: dict[str, Any] = Field(default_factory=dict)
    """What the generator is told."""
    seeds: dict[Split, int] = Field(default_factory=lambda: dict(_SEEDS), min_length=1)
    """Of every split that there is to be."""
    size: int = Field(default=100, ge=1, lt=_APART // _DRAWS)
    """Questions of every split."""
    pattern: str | None = None
    """A regular expression; the first group of its last match is judged. Without it: what follows
    the last "Answer:" or ####, else the whole answer; without a full stop at the end."""
    partial: bool = False
    """Whether a verifier's partial credit counts; else an answer is right or wrong."""


class GymTask(SpokenTask[GymSettings]):
    """Right when reasoning-gym's verifier gives full marks."""

    settings_class = GymSettings
    unit = "verified"

    def __init__(self, name: str, settings: GymSettings, folder: Path) -> None:
        super().__init__(name, settings, folder)
        self._drawn: dict[Split, list[Example]] = {}
        self._entries: dict[tuple[int, int], dict[str, Any]] = {}

    @property
    def key(self) -> str:
        """As in Task; another release of reasoning-gym may judge otherwise."""
        return self.settings.digest(version=self.version, gym=self._gym.__version__)

    def splits(self) -> tuple[Split, ...]:
        """As in Task."""
        return tuple(split for split in SPLITS if split in self.settings.seeds)

    def examples(self, split: Split) -> Sequence[Example]:
        """As in Task."""
        if split not in self._drawn:
            earlier = SPLITS[SPLITS.index(split) + 1 :]  # SPLITS ends with test
            seen: set[str] = set()
            for other in earlier:
                if other in self.settings.seeds:
                    self.examples(other)
                    seen.update(map(question_digest, self._drawn[other]))  # beyond the limit too
            self._drawn[split] = self._draw(self.settings.seeds[split], seen)
        wanted = self.settings.limit
        return self._drawn[split][:wanted]

    def judge(self, example: Example, said: str) -> float:
        """As in SpokenTask."""
        part = extracted(self.settings.pattern or _MARKER, said)
        if part is None:
            if self.settings.pattern is not None:
                return 0.0
            part = said
        entry = self._entries[example.extra["seed"], example.extra["index"]]
        value = float(self._dataset.score_answer(part.strip().removesuffix("."), entry))
        return min(1.0, max(0.0, value)) if self.settings.partial else float(value == 1.0)

    def _draw(self, seed: int, seen: set[str]) -> list[Example]:
        """The first questions of a seed that have not been seen."""
        size, found = self.settings.size, list[Example]()
        for index, entry in enumerate(self._created(seed * _APART, size * _DRAWS)):
            messages = self.asked(str(entry["question"]).strip())
            extra = {"seed": seed, "index": index}
            example = Example(str(len(found)), messages, str(entry["answer"]), extra=extra)
            digest = question_digest(example)
            if digest in seen:
                continue
            seen.add(digest)
            found.append(example)
            self._entries[seed, index] = entry
            if len(found) == size:
                return found
        raise DataError(
            f"task {self.name!r}: {self.settings.generator} has only {len(found)} questions left "
            f"where {size} are wanted: set a smaller `size`, or a wider `config`"
        )

    @cached_property
    def _dataset(self) -> Any:
        """For its verifier."""
        return self._created(0, 1)

    def _created(self, seed: int, size: int) -> Any:
        name = self.settings.generator
        from_gym = self._gym
        known = from_gym.factory.DATASETS
        if name not in known:
            raise RecipeError(
                f"task {self.name!r}: reasoning-gym has no generator {name!r}. "
                f"{suggest(name, known) if _near(name, known) else 'Its gallery lists all.'}"
            )
        try:
            return from_gym.create_dataset(name, seed=seed, size=size, **self.settings.config)
        except Exception as error:
            told = " ".join(str(error).split()) or "a value is out of its range"
            raise RecipeError(f"task {self.name!r}: `config` of {name}: {told}") from error

    @cached_property
    def _gym(self) -> Any:
        try:
            import reasoning_gym
            import reasoning_gym.factory
        except ImportError as error:
            raise MissingExtraError("a task of `kind: gym`", "demo") from error
        return reasoning_gym


def _near(name: str, known: Any) -> bool:
    """Whether a suggestion would be short; all names together are a hundred."""
    return "Did you mean" in suggest(name, known)
