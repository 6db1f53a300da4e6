"""A live model as tasks see it: it continues prompts and says how likely answers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergekit_unconstrained.evaluation.records import Message

if TYPE_CHECKING:
    from mergekit_unconstrained.evaluation.likelihoods import Found
    from mergekit_unconstrained.evaluation.prompts import Prompts

Advance = Callable[[int], Any]
"""Told how many more prompts are done."""


@dataclass(frozen=True)
class Likelihood:
    """Of one answer given its prompt: natural logarithm, tokens and UTF-8 bytes of the answer.

    tokens: with the end of turn where it was asked for. bytes: of the answer's text alone. failure:
    why there is none ("" when there is); nats is then minus infinity.
    """

    nats: float
    tokens: int
    bytes: int
    failure: str = ""


@dataclass(frozen=True)
class Continuation:
    """What a model said, and why it did not come to an end of its own ("" when it did)."""

    text: str
    failure: str = ""


@dataclass
class Subject:
    """A model in memory, its tokenizer, and how it is run.

    weights: names the weights in the score cache; "" is never cached. A search writes other
    weights into `model` and keeps the subject.
    """

    name: str
    model: Any
    tokenizer: Any
    weights: str = ""
    batch_size: int = 16
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], Found] | None = field(
        default=None, repr=False
    )
    """Likelihoods by the tokens of prompt and answer; None outside of `remembering`."""

    @classmethod
    def load(
        cls, name: str, *, dtype: str = "auto", device: str = "auto", batch_size: int = 16
    ) -> Subject:
        """Load a folder, a Hub id (`owner/name`, `owner/name@revision`), either with `+adapter`.

        dtype: float32, bfloat16, float16 or auto: bfloat16 on an accelerator, else float32.
        device: as torch names it, or auto: an accelerator where there is one. ModelError when
        anything is missing or does not fit.
        """
        from mergekit_unconstrained.evaluation.loading import load

        return load(name, dtype=dtype, device=device, batch_size=batch_size)

    @cached_property
    def prompts(self) -> Prompts:
        """How the model reads messages."""
        from mergekit_unconstrained.evaluation.prompts import Prompts

        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return Prompts(self.tokenizer, self.name, ends)

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Ask for no likelihood twice: tasks that measure the same answers in two ways share them.

        The weights must stay as they are inside.
        """
        self.known = {}
        try:
            yield
        finally:
            self.known = None

    def generate(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        chat: bool | None = None,
        separator: str = "auto",
    ) -> list[str]:
        """Greedy continuations, cut before the first stop string and at the end of turn.

        chat: whether the tokenizer's chat template is used; None where it has one. separator:
        without a template, the text between prompt and answer; auto: a newline, see prompts.py.
        """
        found = self.continuations(
            prompts, max_new_tokens=max_new_tokens, stop=stop, chat=chat, separator=separator
        )
        return [one.text for one in found]

    def continuations(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        chat: bool | None = None,
        separator: str = "auto",
        advance: Advance = lambda _: None,
    ) -> list[Continuation]:
        """As `generate`, and for each whether it came to an end: token limit, logits of NaN."""
        from mergekit_unconstrained.evaluation.generation import Stop, greedy

        return greedy(
            self.model,
            [self.prompts.ids(messages, chat, separator) for messages in prompts],
            Stop(self.tokenizer, self.prompts.ends(chat), tuple(stop), max_new_tokens),
            batch_size=self.batch_size,
            advance=advance,
        )

    def log_likelihoods(
        self,
        prompts: Sequence[Sequence[Message]],
        answers: Sequence[str],
        *,
        end: bool = True,
        chat: bool | None = None,
        separator: str = "auto",
        advance: Advance = lambda _: None,
    ) -> list[Likelihood]:
        """log p(answer | prompt). end: with the end of turn behind the answer; else `generate`."""
        from mergekit_unconstrained.evaluation.likelihoods import log_likelihoods

        pairs = [
            self.prompts.with_answer(messages, answer, chat, end, separator)
            for messages, answer in zip(prompts, answers, strict=True)
        ]
        keys = [(tuple(pair.prompt), tuple(pair.answer)) for pair in pairs]
        known = {} if self.known is None else self.known
        missing = [i for i, key in enumerate(keys) if key not in known]
        advance(len(pairs) - len(missing))
        read = log_likelihoods(
            self.model,
            [pairs[i] for i in missing],
            batch_size=self.batch_size,
            advance=advance,
        )
        known.update(zip((keys[i] for i in missing), read, strict=True))
        found = [known[key] for key in keys]
        return [
            Likelihood(one.nats, one.tokens, len(answer.encode()), one.failure)
            for one, answer in zip(found, answers, strict=True)
        ]
