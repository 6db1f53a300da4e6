"""The three faces of a token that the published alignments compare.

A token is not its decoded string: sentencepiece drops the space in front of a token that is decoded
alone, byte-level vocabularies keep it, and half a character decodes to U+FFFD in both. FuseLLM and
FuseChat compare strings all the same, so their compatibility mode needs those very strings; the
sane variant compares bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable

SENTENCEPIECE_SPACE = "▁"
BYTE_LEVEL_SPACE = "Ġ"


@dataclass(frozen=True, eq=False)
class TokenTexts:
    """The texts of a tokenizer's V tokens, by id.

    raw [V]: as the vocabulary spells them, "" for an unused id. decoded [V]: each decoded alone, as
    the published code does. pieces [V]: the bytes they stand for. marker: how raw spells a space.
    beginning, end, unknown: ids of the special tokens, None where the tokenizer has none.
    """

    raw: tuple[str, ...]
    decoded: tuple[str, ...]
    pieces: tuple[bytes, ...]
    marker: str
    beginning: int | None = None
    end: int | None = None
    unknown: int | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, table: ByteTable) -> TokenTexts:
        """The texts of a transformers tokenizer, whose bytes are known already."""
        size = len(table.pieces)
        raw = [token or "" for token in tokenizer.convert_ids_to_tokens(range(size))]
        marker = _marker(raw)
        decoded = tokenizer.batch_decode(
            [[i] for i in range(size)],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        if marker == SENTENCEPIECE_SPACE:
            decoded = sentencepiece_decoded(raw, decoded)
        return cls(
            raw=tuple(raw),
            decoded=tuple(decoded),
            pieces=tuple(piece or b"" for piece in table.pieces),
            marker=marker,
            beginning=tokenizer.bos_token_id,
            end=tokenizer.eos_token_id,
            unknown=tokenizer.unk_token_id,
        )

    def stripped(self) -> list[str]:
        """[V] raw without space markers."""
        return [token.replace(self.marker, "") for token in self.raw]

    def respelled(self, marker: str) -> list[str]:
        """[V] raw with the spaces spelled as another vocabulary does."""
        return [token.replace(self.marker, marker) for token in self.raw]

    def readable(self) -> list[str]:
        """[V] the bytes as text, U+FFFD where they are no whole character."""
        return [piece.decode(errors="replace") for piece in self.pieces]


def sentencepiece_decoded(raw: list[str], decoded: list[str]) -> list[str]:
    """[V] tokens decoded alone as transformers' slow Llama tokenizer does, which both papers used.

    It drops one space marker in front, and sentencepiece drops another, unless what is left is no
    piece of the vocabulary: that stays as it is spelled. Tokens without a marker in front decode as
    anywhere (decoded [V]).
    """
    known = {*raw, ""}
    result = list(decoded)
    for i, token in enumerate(raw):
        if token.startswith(SENTENCEPIECE_SPACE):
            rest = token[1:]
            if rest in known:
                rest = rest.removeprefix(SENTENCEPIECE_SPACE).replace(SENTENCEPIECE_SPACE, " ")
            result[i] = rest
    return result


def _marker(raw: list[str]) -> str:
    """The marker that more tokens begin with."""
    begin = {
        marker: sum(token.startswith(marker) for token in raw)
        for marker in (SENTENCEPIECE_SPACE, BYTE_LEVEL_SPACE)
    }
    return max(begin, key=lambda marker: begin[marker])
