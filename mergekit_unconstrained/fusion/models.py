"""A model of a fusion whose files lie here, with its tokenizer's byte table and its encoder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.data.encoding import Encoder
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable


@dataclass(eq=False)
class LocalModel:
    """The pivot or a source.

    weights, tokenizer_folder: two folders where an adapter was applied, else the same. identity: a
    hash of the weights' files, so that a retrained model is not taken for the old one.
    """

    name: str
    weights: Path
    tokenizer_folder: Path
    identity: str
    max_length: int
    chat_template: str | None = None
    weight: float = 1.0

    @cached_property
    def tokenizer(self) -> Any:
        """The fast tokenizer; ModelError when there is none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.tokenizer_folder))
        except Exception as error:
            raise ModelError(
                f"the tokenizer of {self.name} cannot be loaded from {self.tokenizer_folder}: "
                f"{' '.join(str(error).split())}"
            ) from error

    @cached_property
    def table(self) -> ByteTable:
        """The bytes of every token."""
        return ByteTable.from_tokenizer(self.tokenizer)

    @cached_property
    def encoder(self) -> Encoder:
        """How this model reads a conversation."""
        return Encoder(
            self.tokenizer,
            self.table,
            chat_template=self.chat_template,
            max_length=self.max_length,
            generation_ends=generation_ends(self.tokenizer_folder),
            context=self.context,
            name=self.name,
        )

    @cached_property
    def context(self) -> int | None:
        """The longest input that the model was made for, None where its config does not say."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(self.weights)).get_text_config()
        except Exception:  # loading the model will say more
            return None
        return getattr(config, "max_position_embeddings", None)

    @property
    def reading(self) -> dict[str, str | None]:
        """What decides how this model reads text: for manifests."""
        template = self.chat_template or getattr(self.tokenizer, "chat_template", None) or "none"
        return {"tokenizer": self.table.fingerprint, "template": _short_hash(str(template))}

    def describe(self) -> dict[str, Any]:
        """JSON from which another process makes the same object."""
        return {
            "name": self.name,
            "weights": str(self.weights.absolute()),
            "tokenizer_folder": str(self.tokenizer_folder.absolute()),
            "identity": self.identity,
            "max_length": self.max_length,
            "chat_template": self.chat_template,
            "weight": self.weight,
        }

    @classmethod
    def from_description(cls, found: dict[str, Any]) -> LocalModel:
        """The reverse of `describe`."""
        folders = {key: Path(found[key]) for key in ("weights", "tokenizer_folder")}
        return cls(**{**found, **folders})


def generation_ends(folder: Path) -> tuple[int, ...]:
    """Ids at which the model's own settings stop a generation, () where it has none."""
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        ends = found.get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return ()
    listed = ends if isinstance(ends, list) else [ends]
    return tuple(i for i in listed if isinstance(i, int) and not isinstance(i, bool))


def identity_of(files: list[Path]) -> str:
    """A hash of files' names, sizes and times."""
    found = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    return _short_hash(json.dumps(found))


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
