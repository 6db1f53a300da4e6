"""How distributions lie in a Parquet file: header, columns, and the way there and back.

    row i64   tokens, ends, gaps u32 [r]   ids u32 [r·k]   log_probs f16 [r·k]
    tail, gold f16 [r]   nats f64

gaps: response bytes between a token and the one before, nearly always 0. Half precision rounds a
number by 1 part in 2048 at most; when a record is read, the larger of kept mass and tail is mended
so that they sum to 1 again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.fusion.records import Floats, Ints, Record, TopK

FORMAT = "1"
_KEY = b"unconstrained"
_INTEGERS = ("tokens", "ends", "gaps")


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


_COLUMNS: dict[str, pa.DataType] = {
    "row": pa.int64(),
    "tokens": _list(pa.uint32()),
    "ends": _list(pa.uint32()),
    "gaps": _list(pa.uint32()),
    "ids": _list(pa.uint32()),
    "log_probs": _list(pa.float16()),
    "tail": _list(pa.float16()),
    "gold": _list(pa.float16()),
    "nats": pa.float64(),
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()])

PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": ["gaps.list.element"],
    "column_encoding": {
        "row": "DELTA_BINARY_PACKED",
        "ends.list.element": "DELTA_BINARY_PACKED",
        **{
            f"{name}.list.element": "BYTE_STREAM_SPLIT"
            for name in ("tokens", "ids", "log_probs", "tail", "gold")
        },
    },
    "write_statistics": False,
    "write_page_checksum": True,
}
"""Options of pyarrow.parquet.ParquetWriter."""


@dataclass(frozen=True)
class Header:
    """What the numbers of a store are of; parts with another header do not belong to it.

    model: its name or hash. tokenizer: fingerprint. top_k: entries of a distribution (fewer than
    asked for when the vocabulary is smaller). temperature: of the distributions. data: fingerprint
    of the conversations. notes: what is worth knowing but need not agree, such as versions.
    """

    model: str
    tokenizer: str
    top_k: int
    temperature: float = 1.0
    data: str = ""
    notes: Mapping[str, str] = field(default_factory=dict, compare=False)

    def schema(self) -> pa.Schema:
        """The columns, with this header in their metadata."""
        content = {"format": FORMAT, **vars(self), "notes": dict(self.notes)}
        return SCHEMA.with_metadata({_KEY: json.dumps(content).encode()})

    @classmethod
    def of(cls, schema: pa.Schema) -> Header:
        """The header of a part; ValueError when it is none of ours."""
        content = json.loads((schema.metadata or {}).get(_KEY, b"{}"))
        if content.pop("format", None) != FORMAT or not schema.equals(SCHEMA):
            raise ValueError("not a part of a store of this version")
        return cls(**content)

    def check(self, other: Header, where: str) -> None:
        """DataError that names the first difference between this and what lies at `where`."""
        for key in ("model", "tokenizer", "top_k", "temperature", "data"):
            mine, its = getattr(self, key), getattr(other, key)
            if mine != its:
                raise DataError(
                    f"{where} was made with {key} {its!r}, this run has {mine!r}: remove the "
                    "folder to make it anew, or go back to the old settings"
                )


def table_of(records: Sequence[Record], schema: pa.Schema) -> pa.Table:
    """Records as columns."""
    sizes = [len(record.tokens) for record in records]
    entries = [record.topk.ids.size for record in records]
    log_probs = [_half(record.topk.log_probs) for record in records]
    columns = [
        pa.array([record.row for record in records], pa.int64()),
        _lists([record.tokens for record in records], sizes, np.uint32),
        _lists([record.ends for record in records], sizes, np.uint32),
        _lists([_gaps(record.starts, record.ends) for record in records], sizes, np.uint32),
        _lists([record.topk.ids for record in records], entries, np.uint32),
        _lists(log_probs, entries, np.float16),
        _lists([record.topk.tail for record in records], sizes, np.float16),
        _lists([_half(record.topk.gold) for record in records], sizes, np.float16),
        pa.array([record.nats for record in records], pa.float64()),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _half(values: Floats) -> npt.NDArray[np.float16]:
    """One impossible token must not become -inf."""
    return np.clip(values, np.finfo(np.float16).min, 0.0).astype(np.float16)


def _gaps(starts: Ints, ends: Ints) -> Ints:
    return starts - np.concatenate([np.zeros(1, dtype=np.int32), ends[:-1]])[: len(starts)]


def _lists(parts: Sequence[npt.NDArray[Any]], sizes: Sequence[int], kind: type) -> pa.ListArray:
    flat: npt.NDArray[Any] = np.concatenate([part.reshape(-1) for part in parts]).astype(kind)
    offsets = np.zeros(len(sizes) + 1, dtype=np.int32)
    np.cumsum(sizes, out=offsets[1:])
    item = pa.array(flat)
    return pa.ListArray.from_arrays(pa.array(offsets), item, type=_list(item.type))


class Group:
    """A decoded row group, which makes records as they are asked for."""

    def __init__(self, table: pa.Table) -> None:
        table = table.combine_chunks()
        self._rows = table["row"].to_numpy()
        self._nats = table["nats"].to_numpy()
        self._flat: dict[str, npt.NDArray[Any]] = {}
        self._offsets: dict[str, npt.NDArray[Any]] = {}
        for name in _COLUMNS:
            if name not in ("row", "nats"):
                (chunk,) = table[name].chunks
                self._flat[name] = chunk.values.to_numpy(zero_copy_only=False)
                self._offsets[name] = chunk.offsets.to_numpy()

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, line: int) -> Record:
        """The conversation on that line."""
        tokens, ends, gaps = (self._cells(c, line).astype(np.int32) for c in _INTEGERS)
        size = len(tokens)
        ids = self._cells("ids", line).astype(np.int32)
        width = len(ids) // size if size else 0
        log_probs = self._cells("log_probs", line).reshape(size, width)
        log_probs, tail = _whole(
            log_probs.astype(np.float32), self._cells("tail", line).astype(np.float32)
        )
        topk = TopK(
            ids=ids.reshape(size, width),
            log_probs=log_probs,
            tail=tail,
            gold=self._cells("gold", line).astype(np.float32),
        )
        starts = gaps + np.concatenate([np.zeros(1, dtype=np.int32), ends[:-1]])[:size]
        row, nats = int(self._rows[line]), float(self._nats[line])
        return Record(row, tokens, starts, ends, topk, nats)

    def _cells(self, name: str, line: int) -> npt.NDArray[Any]:
        first, last = self._offsets[name][line : line + 2]
        return self._flat[name][first:last]


def _whole(log_probs: Floats, tail: Floats) -> tuple[Floats, Floats]:
    """Such that probabilities [r, k] and tail [r] sum to 1: what is larger takes the rounding."""
    kept = np.exp(log_probs).sum(axis=1, dtype=np.float32)
    mostly_tail = tail > 0.5
    shift = np.log(np.where(mostly_tail, 1.0, (1.0 - tail) / np.where(mostly_tail, 1.0, kept)))
    whole_tail = np.where(mostly_tail, 1.0 - kept, tail)
    return (log_probs + shift[:, None]).astype(np.float32), whole_tail.astype(np.float32)
