"""Messages as the tokens a model reads, and where its answer begins and ends.

With a chat template: the template's text with the beginning of the assistant's turn; the template
writes every special token itself, and the answer follows directly. Without one: the messages'
contents, a newline behind each (behind an earlier answer the end of text instead, where the model
has one), after the tokenizer's own beginning (a <s>, where it sets one), which is how a fusion
trains such models. A prompt that ends in white space has its separation from the answer already and
gets no newline; `separator` puts any text there instead.

An answer's tokens are those of "prompt + answer" tokenised together, behind the tokens of the
prompt. Only where the two together begin with other tokens than the prompt alone (a token would
straddle the boundary) is the answer tokenised by itself: what a model generates never straddles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.evaluation.records import Message

AUTO = "auto"
"""As `separator`: a newline, unless the prompt ends in white space or is empty."""
_MARK = "zqanswerqz"
_KEPT, _SHORT = 8192, 2000
"""Texts whose tokens are kept, and characters of the longest such text: 150 MB at the very most."""


class Pair(NamedTuple):
    """Token ids of a prompt (never empty) and of an answer to it."""

    prompt: list[int]
    answer: list[int]


def is_templated(tokenizer: Any, chat: bool | None) -> bool:
    """Whether a chat template writes the prompt. chat: None where the tokenizer has one."""
    return bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat


def between(prompt: str, separator: str) -> str:
    """What stands between a prompt without template and its answer."""
    if separator != AUTO:
        return separator
    return "" if not prompt or prompt[-1].isspace() else "\n"


class Prompts:
    """How one model reads messages.

    name: of the model, for messages. ends: where the model's own settings stop a generation: one
    id, several or None.
    """

    def __init__(self, tokenizer: Any, name: str, ends: int | Sequence[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._name = name
        listed = ends if isinstance(ends, Sequence) else [ends]
        self._listed = [tokenizer.eos_token_id, *listed]
        self._turn_end: int | None = None
        self._turn_end_sought = False
        self._encoded: dict[tuple[str, bool], list[int]] = {}

    def text(self, messages: Sequence[Message], chat: bool | None, separator: str = AUTO) -> str:
        """The prompt up to where the answer begins; ModelError when there is no template for it."""
        if not self._templated(chat):
            earlier = (m.content + self._behind(m) for m in messages[:-1])
            plain = "".join([*earlier, *(m.content for m in messages[-1:])])
            return plain + between(plain, separator)
        return self._template([{"role": m.role, "content": m.content} for m in messages])

    def ids(
        self, messages: Sequence[Message], chat: bool | None, separator: str = AUTO
    ) -> list[int]:
        """The prompt's tokens."""
        return self._prompt(self.text(messages, chat, separator), chat)

    def with_answer(
        self,
        messages: Sequence[Message],
        answer: str,
        chat: bool | None,
        end: bool,
        separator: str = AUTO,
    ) -> Pair:
        """Prompt and answer. end: with the end of turn behind it, where the model has one."""
        text = self.text(messages, chat, separator)
        prompt = self._prompt(text, chat)
        whole = self._prompt(text + answer, chat)
        if whole[: len(prompt)] == prompt:
            said = whole[len(prompt) :]
        else:
            said = self._encode(answer, special=False)
        last = self._end(chat) if end else None
        return Pair(prompt, said if last is None else [*said, last])

    def ends(self, chat: bool | None) -> frozenset[int]:
        """Tokens at which an answer is over."""
        found = {*self._listed, self._end(chat)}
        return frozenset(i for i in found if isinstance(i, int))

    def _behind(self, message: Message) -> str:
        """What stands behind an earlier message where no template writes it."""
        end = (self._tokenizer.eos_token or "") if message.role == "assistant" else ""
        known = end and self._encode(end, special=False) == [self._tokenizer.eos_token_id]
        return end if known else "\n"

    def _prompt(self, text: str, chat: bool | None) -> list[int]:
        found = self._encode(text, special=not self._templated(chat))
        if found:
            return found
        # the first token of an answer must follow something
        first = self._tokenizer.bos_token_id
        first = self._tokenizer.eos_token_id if first is None else first
        if first is None:
            raise ModelError(
                f"{self._name}: a prompt has no tokens, and the tokenizer no beginning"
            )
        return [first]

    def _encode(self, text: str, special: bool) -> list[int]:
        """Tokens of a text. Short ones are kept: a search asks the same ones of every candidate."""
        key = (text, special)
        found = self._encoded.get(key)
        if found is None:
            found = self._tokens(text, special)
            if len(text) <= _SHORT and len(self._encoded) < _KEPT:
                self._encoded[key] = found
        return list(found)

    def _tokens(self, text: str, special: bool) -> list[int]:
        ids: list[int] = list(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        eos = self._tokenizer.eos_token
        if special and ids and eos and ids[-1] == self._tokenizer.eos_token_id:
            # some tokenizers end every text; an answer cannot follow an end
            return ids if text.endswith(eos) else ids[:-1]
        return ids

    def _templated(self, chat: bool | None) -> bool:
        if chat and not is_templated(self._tokenizer, None):
            raise ModelError(
                f"the tokenizer of {self._name} has no chat template: use `chat: auto` or "
                "`chat: false`"
            )
        return is_templated(self._tokenizer, chat)

    def _template(self, messages: list[dict[str, str]], begin: bool = True) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=begin, tokenize=False
            )
        except Exception as error:
            roles = ", ".join(m["role"] for m in messages)
            raise ModelError(
                f"the chat template of {self._name} refuses messages of {roles} "
                f"({' '.join(str(error).split())[:200]}): leave out `system`, or use `chat: false`"
            ) from error
        return text

    def _end(self, chat: bool | None) -> int | None:
        """The token that ends an answer: what the template writes behind it, else the tokenizer's
        end of text."""
        eos: int | None = self._tokenizer.eos_token_id
        if not self._templated(chat):
            return eos
        if not self._turn_end_sought:
            self._turn_end_sought = True
            self._turn_end = self._written_end()
        return eos if self._turn_end is None else self._turn_end

    def _written_end(self) -> int | None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        try:
            _, found, after = self._template(turns, begin=False).partition(_MARK)
        except ModelError:
            return None
        ids = self._encode(after.lstrip(), special=False) if found else []
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        return ids[0] if ids and ids[0] in special else None
