"""How likely the model finds the right answer: cheap (nothing is generated), dense, smooth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from mergekit_unconstrained.evaluation.configured import FileTask
from mergekit_unconstrained.evaluation.records import Example, Scored
from mergekit_unconstrained.evaluation.settings import FileSettings
from mergekit_unconstrained.evaluation.subject import Likelihood, Subject
from mergekit_unconstrained.evaluation.task import Advance

WORST = -20.0
"""Nats per byte. A uniform guess at every byte gives -5.5; so bad an answer counts as this, and so
does one without a likelihood, so that a mean over examples stays a number."""


class LikelihoodSettings(FileSettings):
    """Of `kind: likelihood`."""

    end: bool = True
    """Whether the end of turn behind the answer counts."""
    measure: Literal["nats_per_byte", "probability"] = "nats_per_byte"
    """probability: that the model, sampling, gives exactly this answer. Its mean is the exact match
    to be expected, without a step; nats weigh the answers that are far off the most (ours)."""


class LikelihoodTask(FileTask[LikelihoodSettings]):
    """log p(target and end of turn | prompt) / UTF-8 bytes of the target, in nats; or p itself."""

    settings_class = LikelihoodSettings
    solved_at = None

    @property
    def unit(self) -> str:  # type: ignore[override]
        """As `measure` has it."""
        return "probability" if self._probable else "nats per byte"

    @property
    def worst(self) -> float:  # type: ignore[override]
        """As in ConfiguredTask."""
        return 0.0 if self._probable else WORST

    @property
    def _probable(self) -> bool:
        return self.settings.measure == "probability"

    def score(
        self, subject: Subject, examples: Sequence[Example], advance: Advance = lambda _: None
    ) -> list[Scored]:
        """As in Task."""
        likely = subject.log_likelihoods(
            [example.messages for example in examples],
            [example.target for example in examples],
            end=self.settings.end,
            chat=self.chat,
            separator=self.separator,
            advance=advance,
        )
        return [
            Scored(example.id, self._value(one), failure=one.failure)
            for example, one in zip(examples, likely, strict=True)
        ]

    def _value(self, one: Likelihood) -> float:
        return math.exp(one.nats) if self._probable else max(WORST, one.nats / one.bytes)
