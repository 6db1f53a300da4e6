"""Which columns of a data set hold the conversation, and what a row of them says."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.fusion.records import Turn
from mergekit_unconstrained.fusion.settings import Columns

MESSAGES = ("messages", "conversations", "conversation")
PAIRS = (
    ("instruction", "response"),
    ("instruction", "output"),  # Alpaca
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("problem", "solution"),
)
INSTRUCTIONS = tuple(dict.fromkeys(asked for asked, _ in PAIRS))
RESPONSES = tuple(dict.fromkeys(answer for _, answer in PAIRS))
SYSTEMS = ("system", "system_prompt")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
}


class UnusableRowError(Exception):
    """A row that cannot be used; its text is the reason, without the row's own content."""


@dataclass(frozen=True)
class Layout:
    """The columns of a data set that are read; either messages or response is set."""

    messages: str | None = None
    instruction: str | None = None
    input: str | None = None
    response: str | None = None
    system: str | None = None

    def turns(self, row: Mapping[str, Any]) -> tuple[Turn, ...]:
        """What a row says, up to its last response. UnusableRowError with the reason."""
        found: list[Turn] = []
        if self.system and _filled(row.get(self.system)):
            found.append(_turn("system", row[self.system]))
        if self.messages:
            found += _messages(row.get(self.messages))
        else:
            found += self._pair(row)
        while found and found[-1].role != "assistant":
            found.pop()
        if not found:
            raise UnusableRowError("no response")
        if any(not turn.text.strip() for turn in found if turn.role == "assistant"):
            raise UnusableRowError("empty response")
        if not any(turn.text.strip() for turn in found if turn.role == "user"):
            raise UnusableRowError("empty prompt")
        return tuple(found)

    def _pair(self, row: Mapping[str, Any]) -> list[Turn]:
        asked = row.get(self.instruction) if self.instruction else None
        answer = row.get(self.response) if self.response else None
        if not _filled(answer):
            raise UnusableRowError("no response" if answer is None else "empty response")
        extra = row.get(self.input) if self.input else None
        if isinstance(asked, str) and _filled(extra):
            asked = f"{asked}\n{_text(extra)}"
        before = _messages(asked) if isinstance(asked, list) else [_turn("user", asked or "")]
        after = _messages(answer) if isinstance(answer, list) else [_turn("assistant", answer)]
        return before + after


def recognise(present: Sequence[str], columns: Columns, dataset: str) -> Layout:
    """The layout of a data set with these columns; what `columns` names goes before usual names.

    DataError when a named column is not there, or when nothing looks like a response.
    """
    for kind, name in columns:
        if name is not None and name not in present:
            raise DataError(
                f"{dataset} has no column {name!r} (settings, columns: {kind}). "
                f"{suggest(name, present)}"
            )
    system = columns.system or _first(SYSTEMS, present)
    chosen = columns.instruction or columns.response
    messages = columns.messages or (None if chosen else _first(MESSAGES, present))
    if messages:
        return Layout(messages=messages, system=system)
    pair = next((p for p in PAIRS if p[0] in present and p[1] in present), (None, None))
    instruction = columns.instruction or pair[0] or _first(INSTRUCTIONS, present)
    response = columns.response or pair[1] or _first(RESPONSES, present)
    if response is None or response == instruction:
        raise DataError(_no_column("response", present, RESPONSES, dataset, instruction))
    if instruction is None or instruction == response:
        raise DataError(_no_column("instruction", present, INSTRUCTIONS, dataset, response))
    alpaca = "input" if "input" in present and instruction == "instruction" else None
    return Layout(None, instruction, columns.input or alpaca, response, system)


def _no_column(
    kind: str, present: Sequence[str], usual: Sequence[str], dataset: str, taken: str | None
) -> str:
    """taken: the column that is known to hold the other side of the conversation."""
    likeness = {
        p: max(SequenceMatcher(None, p.lower(), u).ratio() for u in usual)
        for p in present
        if p != taken
    }
    near = max(likeness, key=likeness.__getitem__, default="")
    example = repr(near) if likeness.get(near, 0.0) > 0.6 else "NAME"
    return (
        f"{dataset} has no {kind} column: it has {', '.join(map(repr, present)) or 'none at all'}; "
        f"recognised are {', '.join((*usual, *MESSAGES))}. Name yours in the settings, "
        f"`columns: {{{kind}: {example}}}`"
    )


def _first(names: Iterable[str], present: Sequence[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _filled(value: Any) -> bool:
    return value is not None and value != [] and not (isinstance(value, str) and not value.strip())


def _messages(value: Any) -> list[Turn]:
    """Messages as role/content (OpenAI) or from/value (ShareGPT)."""
    if isinstance(value, Mapping):  # a struct of columns, as some Parquet files hold them
        columns = [c for c in value.values() if isinstance(c, list)]
        if len(columns) != len(value) or len({len(c) for c in columns}) > 1:
            raise UnusableRowError("messages are no list")
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise UnusableRowError("no response" if value is None else "messages are no list")
    return [_message(message) for message in value]


def _message(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise UnusableRowError("a message is no mapping")
    said = message.get("role", message.get("from"))
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise UnusableRowError(f"role {str(said)[:40]!r} is not supported")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts; pictures and the like cannot be used
        content = [p.get("text") if isinstance(p, Mapping) else p for p in content]
        if not all(isinstance(part, str) for part in content):
            raise UnusableRowError(f"{role} content is not text")
        content = "".join(content)
    return _turn(role, content)


def _turn(role: str, text: Any) -> Turn:
    return Turn(role, _text(text, role))


def _text(value: Any, what: str = "input") -> str:
    """A text as every model shall read it.

    In Unicode's normal form C (ours): several tokenizers bring text into it, and a source and a
    pivot must read the same bytes.
    """
    if not isinstance(value, str):
        raise UnusableRowError(f"{what} is not text but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableRowError(f"{what} is not valid Unicode") from None
    return unicodedata.normalize("NFC", value)
