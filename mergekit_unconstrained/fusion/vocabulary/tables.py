"""A tokenizer's vocabulary as bytes, and maps from one vocabulary to another."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_unconstrained.engine.staging import disk_full
from mergekit_unconstrained.errors import ModelError, OutputError
from mergekit_unconstrained.fusion.records import Ints
from mergekit_unconstrained.fusion.vocabulary import token_bytes
from mergekit_unconstrained.fusion.vocabulary.first_piece import Segmenter, longest_prefix


@dataclass(frozen=True, eq=False)
class ByteTable:
    """What each token of a vocabulary stands for, in bytes.

    pieces: one per id; None for an id that stands for no text. lengths [V]: their sizes, 0 for
    None. special: ids of special tokens (end of turn, padding, unknown ...), whose piece is their
    literal text; an added token that is not special is ordinary text. adds_space: the tokenizer
    puts a space before a text. fingerprint: of everything that decides how text is split.
    fallback: ids that stand for one byte where the vocabulary lacks a character (`<0xNN>`).
    segmenter: how the tokenizer itself splits, for `first_piece`.

    An id of the model may lie beyond the table: output layers are often padded (Qwen: 151,936 rows
    for 151,646 tokens).
    """

    pieces: tuple[bytes | None, ...]
    lengths: Ints
    special: frozenset[int]
    adds_space: bool
    fingerprint: str
    fallback: frozenset[int] = frozenset()
    segmenter: Segmenter | None = field(default=None, repr=False)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> ByteTable:
        """Read a fast tokenizer of transformers.

        Raises ModelError for a slow tokenizer, and for one whose bytes cannot be known (WordPiece,
        lower-casing and the like).
        """
        parts = token_bytes.Parts.of(tokenizer)
        spelling = parts.spelling()
        size = 1 + max([*parts.vocabulary.values(), *parts.added], default=-1)
        spelled: list[bytes | None] = [None] * size
        for token, i in parts.vocabulary.items():
            spelled[i] = spelling.bytes_of(token) or None
        special = frozenset(i for i, token in parts.added.items() if token.special)
        special |= parts.unknown() | set(tokenizer.all_special_ids)
        for i, token in parts.added.items():
            # Gemma adds entries such as two spaces that its vocabulary has in its own writing.
            known = token.content in parts.vocabulary and not spelling.byte_level
            if i in special or not known:
                spelled[i] = token.content.encode("utf-8", "surrogatepass") or None
        fallback: frozenset[int] = frozenset()
        if spelling.byte_fallback:
            written = (parts.vocabulary.get(f"<0x{byte:02X}>", -1) for byte in range(256))
            fallback = frozenset(written) - special - {-1}
        pieces = tuple(spelled)
        # A model of whole words, or without an unknown token, raises at what it does not know.
        splits = type(parts.model).__name__ == "BPE" or bool(parts.unknown())
        return cls(
            pieces=pieces,
            lengths=np.array([len(piece or b"") for piece in pieces], dtype=np.int32),
            special=special,
            adds_space=token_bytes.adds_space(tokenizer, parts.name, pieces),
            fingerprint=parts.fingerprint(),
            fallback=fallback,
            segmenter=Segmenter(tokenizer.backend_tokenizer, spelling) if splits else None,
        )

    @cached_property
    def is_special(self) -> npt.NDArray[np.bool_]:
        """[V] whether an id is special."""
        found = np.zeros(len(self.pieces), dtype=np.bool_)
        found[[i for i in self.special if i < len(found)]] = True
        return found

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Bytes -> the id that stands for them: no special one, and a byte-fallback one (which the
        tokenizer uses only for want of a literal one) only where there is no other."""
        found: dict[bytes, int] = {}
        for i, piece in enumerate(self.pieces):
            if piece is not None and i not in self.special and i not in self.fallback:
                found.setdefault(piece, i)
        for i in sorted(self.fallback):
            found.setdefault(self.pieces[i] or b"", i)
        return found

    def first_piece(self, data: bytes) -> int:
        """The token with which this tokenizer begins these bytes, -1 where it has none (ours).

        The token of exactly these bytes if there is one; else the first of those into which the
        tokenizer itself splits them, no space put before them; else the longest that begins them.
        """
        exact = self.by_bytes.get(data)
        if exact is not None or not data:
            return -1 if exact is None else exact
        if self.segmenter is not None:
            first = self.segmenter.first(data)
            if 0 <= first < len(self.pieces) and first not in self.special:
                piece = self.pieces[first]
                if piece and data.startswith(piece):
                    return self.by_bytes[piece]
        return longest_prefix(self.by_bytes, data)


def fingerprint(tokenizer: Any) -> str:
    """A hash of what decides how a fast tokenizer splits text, the same in every process.

    In it: vocabulary, merges, normalizer, pre-tokenizer, added tokens. Other versions of the
    libraries can split the same text differently: keep `versions()` beside it.
    """
    return token_bytes.Parts.of(tokenizer).fingerprint()


def versions() -> dict[str, str]:
    """Of the libraries that tokenise."""
    import tokenizers
    import transformers

    return {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__}


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Which pivot token a source token becomes.

    to_pivot [V_source], -1 for none; kind: "bytes", "em", "mined" or "ms"; exact [V_source]: the
    same text, not only its beginning or something near.
    """

    to_pivot: Ints
    kind: str
    exact: npt.NDArray[np.bool_]

    def save(self, path: Path) -> None:
        """Write an .npz file; it carries its name only when it is complete."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as sink:
                np.savez(sink, to_pivot=self.to_pivot, kind=self.kind, exact=self.exact)
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            if disk_full(error):  # the stage that is under way says what to do
                raise
            raise OutputError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> VocabularyMap:
        """Read what `save` wrote. ModelError for anything else."""
        try:
            with path.open("rb") as file, np.load(file) as held:
                return cls(held["to_pivot"], str(held["kind"]), held["exact"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ModelError(
                f"{path} is not a vocabulary map: remove it, it will be made again"
            ) from error
