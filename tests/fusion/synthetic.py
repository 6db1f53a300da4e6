"""Responses tokenised alone, and made-up distributions over their tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from real_tokenizers import real_tokenizer

from mergekit_unconstrained.fusion.records import Encoded, Ints, Record, TopK
from mergekit_unconstrained.fusion.vocabulary.byte_map import byte_map
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable, VocabularyMap


@lru_cache
def real_table(name: str) -> ByteTable:
    return ByteTable.from_tokenizer(real_tokenizer(name))


@lru_cache
def real_map(source: str, pivot: str) -> VocabularyMap:
    ends = frozenset([real_tokenizer(source).eos_token_id])
    return byte_map(real_table(source), real_table(pivot), ends, real_tokenizer(pivot).eos_token_id)


def encode(tokenizer: Any, table: ByteTable, text: str, *, end: bool = True) -> Encoded | None:
    """A response alone, as its model would read it; None where the tokens are not the text.

    end: with the end-of-text token, which covers the byte that stands for the end of the turn.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    pieces = [table.pieces[i] or b"" for i in ids]
    added = b"".join(pieces) == b" " + text.encode()
    if b"".join(pieces) != text.encode() and not (table.adds_space and added):
        return None
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - added
    starts = np.maximum(ends - [len(piece) for piece in pieces], 0) if ids else ends
    size = len(text.encode())
    if end:
        ids.append(tokenizer.eos_token_id)
        starts, ends = np.append(starts, size), np.append(ends, size + 1)
    return Encoded(
        ids=np.array(ids, dtype=np.int32),
        positions=np.arange(len(ids), dtype=np.int32),
        starts=starts.astype(np.int32),
        ends=ends.astype(np.int32),
        response_bytes=size + 1,
    )


def encode_real(name: str, text: str, *, end: bool = True) -> Encoded | None:
    return encode(real_tokenizer(name), real_table(name), text, end=end)


@lru_cache
def _alphabetical(table: ByteTable) -> tuple[Ints, Ints]:
    """Ids by their bytes, and the place of each id among them."""
    order = sorted(range(len(table.pieces)), key=lambda i: table.pieces[i] or b"")
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order))
    return np.array(order, np.int32), places


def random_record(encoded: Encoded, table: ByteTable, k: int, seed: int) -> Record:
    """k random tokens with random probabilities at each position.

    The token that came is among them three times of four, else in the tail; about half of the
    others begin as it does, or are its beginning.
    """
    rng = np.random.default_rng(seed)
    tokens = encoded.response_ids
    order, places = _alphabetical(table)
    masses = np.sort(rng.dirichlet(np.full(k + 1, 0.5), len(tokens)), axis=1)[:, ::-1]
    tail = masses[:, -1] + 1e-9
    gold = np.log(tail * 0.5)
    ids = np.empty((len(tokens), k), np.int32)
    for t, token in enumerate(tokens.tolist()):
        piece = table.pieces[token] or b""
        around = places[token] + rng.integers(-30, 30, k)
        beginnings = [table.by_bytes.get(piece[:n], 0) for n in range(1, len(piece))]
        like = [*order[np.clip(around, 0, len(order) - 1)].tolist(), *beginnings]
        others = rng.integers(0, len(order), 3 * k).tolist()
        drawn = [*rng.permutation(like).tolist()[: k // 2], *others]
        ids[t] = [i for i in dict.fromkeys(drawn) if i != token][:k]
        if rng.random() < 0.75:
            place = int(rng.integers(k))
            ids[t, place], gold[t] = token, np.log(masses[t, place] + 1e-12)
    topk = TopK(
        ids,
        np.log(masses[:, :-1] + 1e-12).astype(np.float32),
        tail.astype(np.float32),
        gold.astype(np.float32),
    )
    return Record(0, tokens, encoded.starts, encoded.ends, topk, float(-gold.sum()))


def hand_table(
    pieces: list[str | bytes | None], special: tuple[int, ...] = (), *, adds_space: bool = False
) -> ByteTable:
    """A vocabulary written down by hand."""
    spelt = tuple(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
    lengths = np.array([len(piece or b"") for piece in spelt], dtype=np.int32)
    name = repr((spelt, special, adds_space))
    return ByteTable(spelt, lengths, frozenset(special), adds_space, name)


def lay(table: ByteTable, tokens: list[int], *, first: int = 0) -> Encoded:
    """Tokens one after another from response byte `first`; a special one covers one byte."""
    covered = [1 if i in table.special else int(table.lengths[i]) for i in tokens]
    ends = first + np.cumsum(covered, dtype=np.int32)
    ids = np.array(tokens, dtype=np.int32)
    return Encoded(
        ids, np.arange(len(ids), dtype=np.int32), ends - np.array(covered, np.int32), ends,
        int(ends[-1]),
    )  # fmt: skip


def think(
    encoded: Encoded, thoughts: list[dict[int, float]], gold: list[float], k: int = 1
) -> Record:
    """A record with these probabilities (k or more); what they lack of 1 is the tail."""
    k = max(k, *map(len, thoughts))
    ids = np.zeros((len(thoughts), k), dtype=np.int32)
    probs = np.full((len(thoughts), k), 1e-30)
    for t, thought in enumerate(thoughts):
        filler = (i for i in range(1000, 2000) if i not in thought)  # beyond every vocabulary
        row = list(thought.items()) + [(next(filler), 1e-30) for _ in range(k - len(thought))]
        ids[t], probs[t] = [i for i, _ in row], [p for _, p in row]
    topk = TopK(
        ids,
        np.log(probs).astype(np.float32),
        (1 - probs.sum(axis=1)).clip(0).astype(np.float32),
        np.log(gold).astype(np.float32),
    )
    return Record(0, encoded.response_ids, encoded.starts, encoded.ends, topk, 0.0)
