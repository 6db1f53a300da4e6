"""How a tokenizer would begin a run of bytes in the middle of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergekit_unconstrained.fusion.vocabulary.token_bytes import LETTER_OF_BYTE, Spelling


class Segmenter:
    """The model of a fast tokenizer alone.

    No normalizer (it would put a space before the bytes), no added tokens (text that looks like a
    special token is text), and no pre-tokenizer: a run of bytes that is a token of another
    vocabulary, or the rest of one, lies within one word. Can be pickled.
    """

    def __init__(self, backend: Any, spelling: Spelling) -> None:
        self._backend = backend
        self._spelling = spelling

    def first(self, data: bytes) -> int:
        """The id of the first token of `data`, -1 where the model has none."""
        if self._spelling.byte_level:
            word = "".join([LETTER_OF_BYTE[byte] for byte in data])
        else:
            word = _whole_characters(data)
            if marker := self._spelling.marker:
                # a marker that is meant literally has no token
                word = word.split(marker, 1)[0].replace(" ", marker)
        tokens = self._backend.model.tokenize(word) if word else []
        return int(tokens[0].id) if tokens else -1


def longest_prefix(by_bytes: Mapping[bytes, int], data: bytes) -> int:
    """The id of the longest piece that `data` begins with, -1 for none."""
    for end in range(len(data), 0, -1):
        found = by_bytes.get(data[:end])
        if found is not None:
            return found
    return -1


def _whole_characters(data: bytes) -> str:
    """The text up to the first byte that is no valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()
