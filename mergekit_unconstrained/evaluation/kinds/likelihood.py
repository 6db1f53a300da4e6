"""How likely the model finds the right answer: cheap (nothing is generated), dense, smooth."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_unconstrained.evaluation.configured import FileTask
from mergekit_unconstrained.evaluation.records import Example, Scored
from mergekit_unconstrained.evaluation.settings import FileSettings
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.evaluation.task import Advance

WORST = -20.0
"""Nats per byte. A uniform guess at every byte gives -5.5; so bad an answer counts as this, and so
does one without a likelihood, so that a mean over examples stays a number."""


class LikelihoodSettings(FileSettings):
    """Of `kind: likelihood`."""

    end: bool = True
    """Whether the end of turn behind the answer counts."""


class LikelihoodTask(FileTask[LikelihoodSettings]):
    """log p(target and end of turn | prompt) / UTF-8 bytes of the target, in nats."""

    settings_class = LikelihoodSettings
    unit = "nats per byte"
    solved_at = None
    worst = WORST

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
            Scored(example.id, max(WORST, one.nats / one.bytes), failure=one.failure)
            for example, one in zip(examples, likely, strict=True)
        ]
