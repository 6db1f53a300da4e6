"""The bytes behind each token of a fast tokenizer, read from its own description.

A token is not its decoded string: `decode([id])` strips a sentencepiece space, and over a thousand
tokens of a byte-level vocabulary are no valid UTF-8 alone. So the vocabulary entry itself is read:
the printable stand-ins of byte-level BPE become bytes again, the space marker of sentencepiece a
space, `<0xNN>` one byte, and an added token is its literal text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from mergekit_unconstrained.errors import ModelError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LOSSY = {"Lowercase", "StripAccents", "BertNormalizer"}
_PROBES = ("A b", "a", "Cd E f", "Zero one")


def _byte_alphabet() -> dict[str, int]:
    """The printable character with which byte-level BPE (GPT-2) writes each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return letters


BYTE_OF_LETTER = _byte_alphabet()
LETTER_OF_BYTE = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer writes bytes in its vocabulary.

    byte_level: with the 256 printable stand-ins. marker: the character that means a space ("" for
    none). byte_fallback: `<0xNN>` is one byte.
    """

    byte_level: bool
    marker: str = ""
    byte_fallback: bool = False

    def bytes_of(self, token: str) -> bytes:
        """The bytes that an ordinary entry of the vocabulary stands for."""
        if self.byte_level:
            try:
                return bytes([BYTE_OF_LETTER[letter] for letter in token])
            except KeyError:  # out of the tokenizer's own reach; its decoder takes it literally
                return token.encode("utf-8", "surrogatepass")
        if self.byte_fallback and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if self.marker:
            token = token.replace(self.marker, " ")
        return token.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Parts:
    """What a fast tokenizer is made of.

    model: of `tokenizers`; vocabulary: token -> id of the model proper (added tokens may be among
    them); added: id -> AddedToken; the others as in tokenizer.json.
    """

    name: str
    model: Any
    vocabulary: dict[str, int]
    added: dict[int, Any]
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any] | None

    @classmethod
    def of(cls, tokenizer: Any) -> Parts:
        """Take a tokenizer of transformers apart. ModelError for a slow one."""
        name = str(getattr(tokenizer, "name_or_path", "") or "the model")
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{name} has a slow tokenizer ({type(tokenizer).__name__}), which need not split "
                "text as the model learned it: add the model's tokenizer.json to its folder"
            )
        backend = tokenizer.backend_tokenizer
        return cls(
            name=name,
            model=backend.model,
            vocabulary=backend.get_vocab(with_added_tokens=False),
            added=backend.get_added_tokens_decoder(),
            normalizer=_written(backend.normalizer),
            pre_tokenizer=_written(backend.pre_tokenizer),
            decoder=_written(backend.decoder),
        )

    def unknown(self) -> set[int]:
        """The id that stands for characters that the vocabulary lacks, if there is one."""
        if type(self.model).__name__ == "Unigram":
            ids = {json.loads(self.model.__getstate__())["unk_id"]}
        else:
            ids = {self.vocabulary.get(getattr(self.model, "unk_token", None) or "")}
        return {i for i in ids if i is not None}

    def fingerprint(self) -> str:
        """A hash of what decides how text is split: the same in every process.

        Not in it: padding and truncation (calls change them), the decoder, and the special tokens
        that are put around a text.
        """
        added = [[i, token.__getstate__()] for i, token in sorted(self.added.items())]
        rest = json.dumps([self.normalizer, self.pre_tokenizer, added], sort_keys=True)
        return hashlib.sha256(self.model.__getstate__() + rest.encode()).hexdigest()

    def spelling(self) -> Spelling:
        """How the vocabulary is written. ModelError where text cannot be rebuilt from it."""
        if type(self.model).__name__ == "WordPiece":
            refuse(self.name, "a WordPiece vocabulary does not keep spaces")
        affixes = ("continuing_subword_prefix", "end_of_word_suffix")
        if any(getattr(self.model, affix, None) for affix in affixes):
            refuse(self.name, "its vocabulary marks the inside or the end of words, not spaces")
        for part in _flat(self.normalizer):
            if part["type"] in _LOSSY:
                refuse(self.name, f"its normalizer {part['type']} changes letters")
        parts = [*_flat(self.normalizer), *_flat(self.pre_tokenizer), *_flat(self.decoder)]
        if any(part["type"] == "ByteLevel" for part in parts):
            return Spelling(byte_level=True)
        marker = ""
        for part in parts:
            if part["type"] == "Metaspace":
                marker = part["replacement"]
            elif part["type"] == "Replace" and part["pattern"].get("String") == " ":
                marker = part["content"]
        return Spelling(False, marker, bool(getattr(self.model, "byte_fallback", False)))


def adds_space(tokenizer: Any, name: str, pieces: tuple[bytes | None, ...]) -> bool:
    """Whether a space is put before a text; ModelError where the pieces do not spell the text.

    A few short texts are tokenised and spelled again, if the vocabulary has their letters. Longer
    texts are checked one by one, when they are encoded.
    """
    known = set(pieces)
    spaced = False
    for probe in _PROBES:
        letters = (letter.encode() for letter in probe if letter != " ")
        if not all(letter in known or b" " + letter in known for letter in letters):
            continue
        ids = tokenizer(probe, add_special_tokens=False)["input_ids"]
        spelled = b"".join(pieces[i] or b"" for i in ids)
        if spelled not in (probe.encode(), b" " + probe.encode()):
            refuse(name, f"{probe!r} becomes the tokens of {spelled.decode(errors='replace')!r}")
        spaced |= spelled.startswith(b" ")
    return spaced


def refuse(name: str, why: str) -> NoReturn:
    """Say that there is no byte table, without which no response can be found in the tokens."""
    raise ModelError(
        f"the bytes behind the tokens of {name} cannot be known ({why}): a model with this "
        "tokenizer can be neither pivot nor source of a fusion, whatever the alignment; take one "
        "whose tokenizer keeps every byte (byte-level BPE, sentencepiece, tiktoken)"
    )


def _written(component: Any) -> dict[str, Any] | None:
    """A normalizer, pre-tokenizer or decoder as tokenizer.json writes it."""
    if component is None:
        return None
    held: dict[str, Any] = json.loads(component.__getstate__())
    return held


def _flat(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The normalizers, pre-tokenizers or decoders of a component, sequences laid flat."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        for part in component.get(key, ()):
            yield from _flat(part)
