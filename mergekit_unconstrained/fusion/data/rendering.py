"""The text of a conversation as a model's chat template writes it, and where its responses lie.

A template may add, trim and reorder what it likes. It is first shown a conversation of the same
roles whose messages are marks, which gives the text around them; a real rendering must then be
that text with the messages, whole or trimmed, in the marks' places.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.records import Turn

PLAIN = "none"
"""The name of the format without a template: prompt, newline, response, end of text."""
_MARK = "zq{}unconstrainedqz"
_MARKS = re.compile(r"zq(\d+)unconstrainedqz")


class Unencodable(Exception):  # noqa: N818 - not an error of the user: counted and listed
    """A conversation that a model cannot read; its text is the reason."""

    @property
    def reason(self) -> str:
        """Why, in a few words that are the same for every such row."""
        return str(self)


class Span(NamedTuple):
    """Where a response lies in a text.

    start, end: characters. trimmed: bytes that the template cut off the response's beginning.
    size: bytes of the whole response as the data has it.
    """

    start: int
    end: int
    trimmed: int
    size: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; one span for each response, in order."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class _Skeleton:
    """before[i]: the text before the i-th message to appear; order[i]: which one it is."""

    before: tuple[str, ...]
    order: tuple[int, ...]
    after: str


class Renderer:
    """Writes conversations as one model reads them.

    chat_template: None for the tokenizer's own (plain text when it has none), "none" for plain
    text, else a Jinja template, which transformers runs in its sandbox. end: the text that ends a
    response in plain text, "" when the model has none. ModelError for a template that cannot be
    used at all.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None, end: str) -> None:
        self._tokenizer = tokenizer
        self._template = None if chat_template == PLAIN else chat_template
        has_own = bool(getattr(tokenizer, "chat_template", None))
        self.plain = chat_template == PLAIN or (chat_template is None and not has_own)
        self._end = end
        self._skeletons: dict[tuple[str, ...], _Skeleton | Unencodable] = {}
        self._check()

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The text of a conversation; Unencodable when a response cannot be found in it."""
        if self.plain:
            return self._plainly(turns)
        turns, text = self._with_system(turns)
        spans = self._by_skeleton(turns, text) or _by_search(turns, text)
        if spans is None:
            raise Unencodable("response not found in the rendered text")
        return Rendered(text, spans)

    def _check(self) -> None:
        if self.plain:
            return
        probe = (Turn("user", "question"), Turn("assistant", "answer"))
        try:
            self.render(probe)
        except Unencodable as reason:
            name = getattr(self._tokenizer, "name_or_path", "") or "this tokenizer"
            raise ModelError(
                f"the chat template of {name} cannot be used ({reason}): mend it, or choose "
                "`chat_template: none`"
            ) from reason

    def _plainly(self, turns: Sequence[Turn]) -> Rendered:
        parts, spans, length = [], [], 0
        for turn in turns:
            if turn.role == "assistant":
                size = len(turn.text.encode())
                spans.append(Span(length, length + len(turn.text), 0, size))
                written = turn.text + (self._end or "\n")
            else:
                written = turn.text + "\n"
            parts.append(written)
            length += len(written)
        return Rendered("".join(parts), tuple(spans))

    def _with_system(self, turns: Sequence[Turn]) -> tuple[Sequence[Turn], str]:
        """A template without a system role has its text put before the first prompt."""
        try:
            return turns, self._apply(turns)
        except Unencodable:
            merged = _merge_system(turns)
            if merged is None:
                raise
            return merged, self._apply(merged)

    def _apply(self, turns: Sequence[Turn]) -> str:
        from jinja2 import TemplateError

        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=self._template
            )
        # a template is a program: these are what it can run into
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            told = " ".join(str(error).split())[:120]
            raise Unencodable(f"chat template: {told}") from None
        return str(text)

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        if roles not in self._skeletons:
            marked = [Turn(role, _MARK.format(i)) for i, role in enumerate(roles)]
            try:
                pieces = _MARKS.split(self._apply(marked))
            except Unencodable as reason:
                self._skeletons[roles] = reason
            else:
                order = tuple(int(i) for i in pieces[1::2])
                self._skeletons[roles] = _Skeleton(tuple(pieces[0:-1:2]), order, pieces[-1])
        found = self._skeletons[roles]
        return found if isinstance(found, _Skeleton) else None

    def _by_skeleton(self, turns: Sequence[Turn], text: str) -> tuple[Span, ...] | None:
        skeleton = self._skeleton(tuple(turn.role for turn in turns))
        responses = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if skeleton is None or [i for i in skeleton.order if i in responses] != responses:
            return None
        spans, place = [], 0
        following = (*skeleton.before[1:], skeleton.after)
        for before, i, after in zip(skeleton.before, skeleton.order, following, strict=True):
            place += len(before)
            shown = _shown(turns[i].text, text, place, after)
            if not text.startswith(before, place - len(before)) or shown is None:
                return None
            if turns[i].role == "assistant":
                spans.append(_span(turns[i].text, shown, place))
            place += len(shown)
        return tuple(spans) if text[place:] == skeleton.after else None


def _variants(text: str) -> dict[str, None]:
    """What templates make of a message: itself first, then trimmed."""
    return dict.fromkeys((text, text.rstrip(), text.lstrip(), text.strip()))


def _shown(message: str, text: str, place: int, after: str) -> str | None:
    """The variant of a message that stands at `place`, followed by `after`."""
    for variant in _variants(message):
        if text.startswith(variant, place) and text.startswith(after, place + len(variant)):
            return variant
    return None


def _span(message: str, shown: str, place: int) -> Span:
    trimmed = 0
    if not message.startswith(shown):  # then it was cut at the front
        trimmed = len(message[: len(message) - len(message.lstrip())].encode())
    return Span(place, place + len(shown), trimmed, len(message.encode()))


def _by_search(turns: Sequence[Turn], text: str) -> tuple[Span, ...] | None:
    """For templates that treat some contents differently: each response must occur just once."""
    spans: list[Span] = []
    for turn in turns:
        if turn.role == "assistant":
            shown = next((v for v in _variants(turn.text) if v and text.count(v) == 1), None)
            if shown is None:
                return None
            span = _span(turn.text, shown, text.index(shown))
            if spans and span.start < spans[-1].end:
                return None
            spans.append(span)
    return tuple(spans)


def _merge_system(turns: Sequence[Turn]) -> tuple[Turn, ...] | None:
    if len(turns) > 1 and turns[0].role == "system" and turns[1].role == "user":
        return (Turn("user", f"{turns[0].text}\n\n{turns[1].text}"), *turns[2:])
    return None
