"""How a model reads a conversation: token ids, and which of them are the response.

The whole text is tokenised once. What a token covers follows from the bytes it stands for, never
from decoding tokens one by one or from tokenising parts: the pieces, one after another, must be
the text itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.data.rendering import Rendered, Renderer, Unencodable
from mergekit_unconstrained.fusion.data.spelling import spell
from mergekit_unconstrained.fusion.records import Conversation, Encoded, Ints, Turn
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable

__all__ = ["Encoder", "Unencodable", "fit", "fit_many"]

NO_RESPONSE = "no token lies wholly in the response"
TOO_LONG = "longer than max_length before its response begins"
_BATCH = 256


class Encoder:
    """Reads conversations with one model's tokenizer and chat template.

    chat_template: None for the tokenizer's own (plain text when it has none), "none" for plain
    text, else a Jinja template. max_length: in tokens; see `fit`. generation_ends: further ids that
    end generation (generation_config's eos_token_id). context: the longest input that the model was
    made for, None where that is not known; name: of the model, for messages. ModelError without a
    tokenizer, or with a template that cannot be used.

    end_id: the token with which this model ends a response, None when it has none. end_ids: that
    one, the end of text and generation_ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        table: ByteTable,
        *,
        chat_template: str | None = None,
        max_length: int = 2048,
        generation_ends: Iterable[int] = (),
        context: int | None = None,
        name: str = "a model",
    ) -> None:
        if tokenizer is None:
            raise ModelError("a model of the fusion has no tokenizer: copy tokenizer.json to it")
        self.table = table
        self.max_length = max_length
        self.context = context
        self.name = name
        self._tokenizer = tokenizer
        self._backend = _library_tokenizer(tokenizer)
        eos = tokenizer.eos_token_id
        self.end_ids = frozenset(generation_ends) | ({eos} if eos is not None else set())
        self._prefix = self._added_before()
        self._renderer = Renderer(tokenizer, chat_template, self._end_text())
        self.end_id = self._find_end()
        if self.end_id is not None:
            self.end_ids |= {self.end_id}

    def encode(self, conversation: Conversation) -> Encoded:
        """One conversation; Unencodable with the reason."""
        return self.encode_many([conversation])[0]

    def encode_many(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Several at once, which is faster; the first that cannot be read raises Unencodable."""
        found = []
        for one in self.try_many(conversations):
            if isinstance(one, Unencodable):
                raise one
            found.append(one)
        return found

    def try_many(self, conversations: Sequence[Conversation]) -> list[Encoded | Unencodable]:
        """Several at once; what cannot be read stands in its place as the reason."""
        rendered = [self._render(c.turns) for c in conversations]
        texts = [r.text for r in rendered if isinstance(r, Rendered)]
        tokenised = iter(self._tokenise(texts))
        results: list[Encoded | Unencodable] = []
        for conversation, one in zip(conversations, rendered, strict=True):
            if isinstance(one, Unencodable):
                results.append(one)
                continue
            try:
                results.append(self._place(one, next(tokenised), conversation.keep_bytes))
            except Unencodable as reason:
                results.append(reason)
        return results

    def _render(self, turns: Sequence[Turn]) -> Rendered | Unencodable:
        try:
            return self._renderer.render(turns)
        except Unencodable as reason:
            return reason

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        """Token ids, without special tokens added: those that belong there are in the text, the
        template wrote them."""
        if not texts:
            return []
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = self._tokenizer.split_special_tokens
            # fast: without character offsets, a quarter of the time, which nobody asks for here
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [one.ids for one in found]
        made = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(made["input_ids"])

    def _place(self, rendered: Rendered, made: list[int], keep: int | None) -> Encoded:
        """From text and tokens to the response tokens and the bytes they cover."""
        text = rendered.text.encode()
        ids = np.asarray(made, dtype=np.int32)
        starts, ends = spell(ids, text, self.table)
        if rendered.text.isascii():
            spans = [(s.start, s.end) for s in rendered.spans]
        else:
            spans = [
                (len(rendered.text[: s.start].encode()), len(rendered.text[: s.end].encode()))
                for s in rendered.spans
            ]
        found: list[tuple[Ints, Ints, Ints]] = []
        base = 0
        for (first, last), span in zip(spans, rendered.spans, strict=True):
            inside = np.arange(
                np.searchsorted(starts, first, "left"),
                np.searchsorted(ends, last, "right"),
                dtype=np.int32,
            )
            inside = inside[ends[inside] > starts[inside]]  # a space that is not in the text
            shift = base + span.trimmed - first
            found.append((inside, starts[inside] + shift, ends[inside] + shift))
            base += span.size
            end = self._end_after(last, ids, starts, text)
            if end is not None:
                one = np.ones(1, dtype=np.int32)
                found.append((one * end, one * base, one * (base + 1)))
            base += 1
        positions, begun, done = (np.concatenate(part) for part in zip(*found, strict=True))
        return self._cut(ids, positions, begun, done, base, keep)

    def _end_after(self, last: int, ids: Ints, starts: Ints, text: bytes) -> int | None:
        """The index of the token that ends the response whose text ends at byte `last`.

        A special token directly after it; or after spaces (Llama 2's template writes one), one that
        is known to end a text.
        """
        i = int(np.searchsorted(starts, last, "left"))
        while i < len(ids) and not text[last : starts[i]].strip():
            if int(ids[i]) in self.table.special:
                return i if starts[i] == last or int(ids[i]) in self.end_ids else None
            i += 1
        return None

    def _cut(
        self, ids: Ints, positions: Ints, starts: Ints, ends: Ints, size: int, keep: int | None
    ) -> Encoded:
        """Nothing beyond `keep` response bytes, and no ids after the last response token.

        Nothing predicts the very first token, so it is no response token.
        """
        if not len(self._prefix) and len(positions) and positions[0] == 0:
            positions, starts, ends = positions[1:], starts[1:], ends[1:]
        count = len(ends) if keep is None else int(np.searchsorted(ends, keep, "right"))
        if count == 0:
            raise Unencodable(NO_RESPONSE)
        length = int(positions[count - 1]) + 1
        return Encoded(
            ids=np.concatenate([self._prefix, ids[:length]]),
            positions=positions[:count] + np.int32(len(self._prefix)),
            starts=starts[:count].astype(np.int32),
            ends=ends[:count].astype(np.int32),
            response_bytes=size if keep is None else min(size, keep),
        )

    def _added_before(self) -> Ints:
        """What the tokenizer puts before plain text (a begin token); templates write their own."""
        plain = list(self._tokenizer("a", add_special_tokens=False)["input_ids"])
        added = list(self._tokenizer("a", add_special_tokens=True)["input_ids"])
        for i in range(len(added) - len(plain) + 1):
            if added[i : i + len(plain)] == plain:
                return np.asarray(added[:i], dtype=np.int32)
        return np.zeros(0, dtype=np.int32)

    def _end_text(self) -> str:
        """The text that becomes the end-of-text token; "" when there is no such token."""
        text = self._tokenizer.eos_token or ""
        made = self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return text if list(made) == [self._tokenizer.eos_token_id] else ""

    def _find_end(self) -> int | None:
        """What stands at the end of a response; else the end of text."""
        if not self._renderer.plain:
            self._prefix = self._prefix[:0]
        probe = Conversation(0, (Turn("user", "question"), Turn("assistant", "answer")))
        try:
            last = int(self.encode(probe).ids[-1])
        except Unencodable:
            last = -1
        eos = self._tokenizer.eos_token_id
        return last if last in self.table.special else eos


def _library_tokenizer(tokenizer: Any) -> Any:
    """What a tokenizer of transformers hands its text to; None if it changes the text before."""
    from transformers import PreTrainedTokenizerFast

    own = getattr(type(tokenizer), "_encode_plus", None)
    if own is None or own is not getattr(PreTrainedTokenizerFast, "_encode_plus", None):
        return None
    return tokenizer.backend_tokenizer


def fit(conversation: Conversation, encoders: Sequence[Encoder]) -> int | None:
    """Response bytes that every model can read within its max_length; None for all of them.

    The same for all models, so that truncation never cuts one model's response and not another's.
    0 when some model has no response token left. Unencodable when a model cannot read it at all.
    """
    encoded = [encoder.encode(conversation) for encoder in encoders]
    return _common(encoded, encoders)


def fit_many(
    conversations: Iterable[Conversation], encoders: Sequence[Encoder]
) -> Iterator[tuple[Conversation, str | None]]:
    """Each conversation with its keep_bytes set, and the reason if it cannot be used.

    ModelError for one that is longer than a model can read.
    """
    stream = iter(conversations)
    while batch := list(islice(stream, _BATCH)):
        columns = [encoder.try_many(batch) for encoder in encoders]
        for one, row in zip(batch, zip(*columns, strict=True), strict=True):
            failed = next((str(e) for e in row if isinstance(e, Unencodable)), None)
            encoded = [e for e in row if isinstance(e, Encoded)]
            keep = None if failed else _common(encoded, encoders)
            fitted = Conversation(one.row, one.turns, keep)
            if not failed and keep != 0:
                _check_context(one.row, keep, encoded, encoders)
            yield fitted, TOO_LONG if keep == 0 else failed


def _common(encoded: Sequence[Encoded], encoders: Sequence[Encoder]) -> int | None:
    keep: int | None = None
    for one, encoder in zip(encoded, encoders, strict=True):
        if len(one.ids) > encoder.max_length:
            count = int(np.searchsorted(one.positions, encoder.max_length, "left"))
            limit = int(one.ends[count - 1]) if count else 0
            keep = limit if keep is None else min(keep, limit)
    if keep is not None and any(one.ends[0] > keep for one in encoded):
        return 0
    return keep


def _check_context(
    row: int, keep: int | None, encoded: Sequence[Encoded], encoders: Sequence[Encoder]
) -> None:
    for one, encoder in zip(encoded, encoders, strict=True):
        count = len(one.ends) if keep is None else int(np.searchsorted(one.ends, keep, "right"))
        length = int(one.positions[count - 1]) + 1
        if encoder.context is not None and length > encoder.context:
            raise ModelError(
                f"row {row} of the data is {length} tokens long for {encoder.name}, which reads "
                f"{encoder.context} at most: set `max_length: {encoder.context}` in the settings, "
                "by which every model's responses are cut alike"
            )
