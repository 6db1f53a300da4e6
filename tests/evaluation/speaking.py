"""A subject that says what it is told to, and notes what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from mergekit_unconstrained.evaluation.records import Message
from mergekit_unconstrained.evaluation.subject import Continuation, Subject

Answer = str | Continuation


class Speaking(Subject):
    """say: what follows a prompt; it gets the last message's content. templated: as a tokenizer
    with a chat template is."""

    def __init__(self, say: Callable[[str], Answer], *, templated: bool = False) -> None:
        template = "{{ messages }}" if templated else None
        super().__init__("speaking", None, SimpleNamespace(chat_template=template))
        self.say = say
        self.asked: list[list[tuple[Message, ...]]] = []
        self.stops: tuple[str, ...] = ()
        self.separators: list[str] = []

    def continuations(
        self, prompts: Sequence[Sequence[Message]], *, stop: Sequence[str] = (), **more: Any
    ) -> list[Continuation]:
        """What `say` says, cut before the first stop text; one batch a call."""
        self.asked.append([tuple(prompt) for prompt in prompts])
        self.stops = tuple(stop)
        self.separators.append(more.get("separator", "auto"))
        found = []
        for prompt in prompts:
            said = self.say(prompt[-1].content)
            one = said if isinstance(said, Continuation) else Continuation(said)
            first = min((at for at in map(one.text.find, stop) if at >= 0), default=None)
            found.append(Continuation(one.text[:first], one.failure))
        more.get("advance", lambda _: None)(len(prompts))
        return found
