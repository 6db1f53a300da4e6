"""The data stage: conversations that every model can read, cut alike for all, split once.

DATA/conversations.jsonl    one conversation a line, with the response bytes that are kept
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.fusion.data.conversations import DataReport, read_conversations
from mergekit_unconstrained.fusion.data.encoding import fit_many
from mergekit_unconstrained.fusion.models import LocalModel
from mergekit_unconstrained.fusion.records import Conversation, Turn
from mergekit_unconstrained.fusion.settings import FusionSettings

CONVERSATIONS = "conversations.jsonl"


def dataset_identity(dataset: str) -> str:
    """What tells one state of the data from another: contents of files, the id on the Hub."""
    path = Path(dataset).expanduser()
    if not path.exists():
        return dataset
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def prepare(
    dataset: str,
    settings: FusionSettings,
    models: Sequence[LocalModel],
    folder: Path,
    advance: Callable[[int], Any],
) -> dict[str, Any]:
    """Write the conversations; gives the counts for the manifest.

    Every row is read by every model, so a row that one of them cannot read is left out for all, and
    truncation keeps the same response bytes for all. DataError when nothing is left.
    """
    report = DataReport()
    rows = read_conversations(dataset, settings.columns, settings.split, settings.max_rows, report)
    kept: list[Conversation] = []
    for conversation, reason in fit_many(rows, [model.encoder for model in models]):
        if reason is None:
            kept.append(conversation)
        else:
            report.skip(conversation.row, reason)
        advance(1)
    report.check()
    cut = sum(c.keep_bytes is not None for c in kept)
    check_cut(cut, len(kept), settings)
    alike = Counter(c.turns for c in kept)
    held_out = _held_out(kept, settings)
    with replacing(folder / CONVERSATIONS) as stream:
        for conversation in kept:
            line = dataclasses.asdict(conversation) | {"held_out": conversation.row in held_out}
            stream.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    return {
        "conversations": len(kept),
        "held_out": len(held_out),
        "cut": cut,
        "repeated": len(kept) - len(alike),
        "report": report.as_dict(),
        "summary": report.describe(),
    }


def load_prepared(folder: Path) -> tuple[list[Conversation], list[Conversation]]:
    """The conversations to train on and those held out."""
    train: list[Conversation] = []
    held_out: list[Conversation] = []
    with (folder / CONVERSATIONS).open(encoding="utf-8") as stream:
        for line in stream:
            found = json.loads(line)
            turns = tuple(Turn(**turn) for turn in found["turns"])
            conversation = Conversation(found["row"], turns, found["keep_bytes"])
            (held_out if found["held_out"] else train).append(conversation)
    return train, held_out


def check_cut(cut: int, kept: int, settings: FusionSettings) -> None:
    """DataError when not a single response fits: nothing would be learned of how responses end."""
    if kept and cut == kept:
        raise DataError(
            f"every response is longer than `max_length: {settings.max_length}` leaves room for "
            f"({cut} of {kept} would be cut): set a larger one"
        )


def _held_out(kept: Sequence[Conversation], settings: FusionSettings) -> set[int]:
    """Rows held out: the share of the settings, at least one where it is not 0.

    Equal conversations stay on one side; where that leaves none for training, none is held out.
    """
    count = round(settings.eval_share * len(kept))
    if settings.eval_share > 0 and len(kept) > 1:
        count = min(max(count, 1), len(kept) - 1)
    alike: dict[tuple[Turn, ...], list[int]] = {}
    for conversation in kept:
        alike.setdefault(conversation.turns, []).append(conversation.row)
    held_out: set[int] = set()
    smallest = min(alike.values(), key=len, default=[])
    for i in np.random.default_rng(settings.seed).permutation(len(kept)):
        rows = alike.pop(kept[i].turns, [])
        if len(held_out) + len(rows) <= count:
            held_out.update(rows)
    if count and not held_out and len(smallest) < len(kept):
        held_out.update(smallest)
    return held_out
