"""Distributions on disk: Parquet parts in a folder, written one after another, read by row.

    STORE/part-000-00000.parquet    the first part of writer 0: a line a conversation
    STORE/.part-000.partial         what a killed writer 0 leaves

A part carries its name only when it is complete, so a killed run continues with the rows that no
part holds. Several processes write at once, each as a writer of its own number.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mergekit_unconstrained.engine.staging import disk_full
from mergekit_unconstrained.errors import DataError, OutputError
from mergekit_unconstrained.fusion.distributions.store_format import (
    PARQUET,
    Group,
    Header,
    table_of,
)
from mergekit_unconstrained.fusion.records import Record

GROUP_TOKENS = 1 << 14
"""Response tokens in a row group: what is decoded to read one conversation."""
_OPEN_PARTS = 64
_OPEN_GROUPS = 32


class _Place(NamedTuple):
    """Where a row lies: the part's file, the row group in it, the line in that."""

    part: Path
    group: int
    line: int


class Store:
    """The distributions of one model over the conversations of a data set.

    folder: may be empty or missing. header: what is written; parts already there must agree. None
    to read only, the parts must then agree with each other. writer: number of this process among
    those that write. DataError for a part that is damaged or has another header.
    """

    def __init__(self, folder: Path, header: Header | None = None, *, writer: int = 0) -> None:
        self.folder = Path(folder)
        self._header = header
        self._writer = writer
        self._places: dict[int, _Place] = {}
        self._parts: OrderedDict[Path, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[Path, int], Group] = OrderedDict()
        self._known: set[Path] = set()
        self.refresh()

    @property
    def header(self) -> Header:
        """What the numbers are of; DataError for an empty store."""
        if self._header is None:
            raise DataError(f"{self.folder} holds no distributions: run the stage that makes them")
        return self._header

    @property
    def rows(self) -> list[int]:
        """Every row that is there, ascending."""
        return sorted(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, row: object) -> bool:
        return row in self._places

    def __iter__(self) -> Iterator[Record]:
        """Every record in the order in which it was written: each part is read once."""
        for part in sorted(self._known):
            for group in range(self._open(part).num_row_groups):
                decoded = self._group(part, group)
                for line in range(len(decoded)):
                    record = decoded.record(line)
                    if self._places[record.row] == (part, group, line):
                        yield record

    def read(self, rows: Sequence[int]) -> list[Record]:
        """The records of these rows, in this order. DataError for a row that is not there."""
        missing = [row for row in rows if row not in self._places]
        if missing:
            raise DataError(
                f"{self.folder} holds no distributions of row {missing[0]}"
                f"{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}: run the stage "
                "that makes them again, it adds what is missing"
            )
        found: dict[int, Record] = {}
        for row in sorted(rows, key=self._places.__getitem__):
            part, group, line = self._places[row]
            found[row] = self._group(part, group).record(line)
        return [found[row] for row in rows]

    def write(self, records: Sequence[Record]) -> None:
        """Add a part. OutputError when the disk is full; the other parts are safe."""
        if not records:
            return
        partial = self._partial(self._writer)
        serial = sum(1 for _ in self.folder.glob(f"part-{self._writer:03d}-*.parquet"))
        part = self.folder / f"part-{self._writer:03d}-{serial:05d}.parquet"
        while part.exists():  # a damaged one was removed by hand
            serial += 1
            part = part.with_name(f"part-{self._writer:03d}-{serial:05d}.parquet")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_part(partial, records, self.header)
            partial.replace(part)
        except OSError as error:
            partial.unlink(missing_ok=True)
            why = "the disk is full" if disk_full(error) else f"cannot write {part} ({error})"
            raise OutputError(
                f"{why}, while storing the distributions in {self.folder}: make room for it and "
                "run the same command again; what is finished is kept"
            ) from error
        self._add(part)

    def refresh(self) -> None:
        """Notice the parts that other processes have finished since."""
        for part in sorted(self.folder.glob("part-*.parquet")):
            if part not in self._known:
                self._add(part)

    def sweep(self) -> None:
        """Remove what killed writers left; while nobody else writes."""
        for partial in self.folder.glob(".part-*.partial"):
            partial.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes: open files are not handed over."""
        return {**vars(self), "_parts": OrderedDict(), "_groups": OrderedDict()}

    def _partial(self, writer: int) -> Path:
        return self.folder / f".part-{writer:03d}.partial"

    def _add(self, part: Path) -> None:
        file = self._open(part)
        try:
            header = Header.of(file.schema_arrow)
        except (ValueError, TypeError) as error:
            raise _damaged(part, error) from None
        if self._header is None:
            self._header = header
        self._header.check(header, str(part))
        try:  # without threads: workers of a data loader are forks
            rows = iter(file.read(columns=["row"], use_threads=False)["row"].to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise _damaged(part, error) from None
        for group in range(file.num_row_groups):
            for line in range(file.metadata.row_group(group).num_rows):
                self._places.setdefault(next(rows), _Place(part, group, line))
        self._known.add(part)

    def _open(self, part: Path) -> pq.ParquetFile:
        if part not in self._parts:
            try:
                file = pq.ParquetFile(part, memory_map=True, page_checksum_verification=True)
            except FileNotFoundError:
                raise DataError(f"{part} is gone: run the stage that makes it again") from None
            except (pa.ArrowException, OSError) as error:
                raise _damaged(part, error) from None
            self._parts[part] = file
            while len(self._parts) > _OPEN_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(part)
        return self._parts[part]

    def _group(self, part: Path, group: int) -> Group:
        key = (part, group)
        if key not in self._groups:
            try:
                self._groups[key] = Group(self._open(part).read_row_group(group, use_threads=False))
            except (pa.ArrowException, OSError, ValueError) as error:
                raise _damaged(part, error) from None
            while len(self._groups) > _OPEN_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def _write_part(path: Path, records: Sequence[Record], header: Header) -> None:
    schema = header.schema()
    with path.open("wb") as stream:
        with pq.ParquetWriter(stream, schema, **PARQUET) as writer:
            for group in _row_groups(records):
                writer.write_table(table_of(group, schema), row_group_size=len(group))
        stream.flush()
        os.fsync(stream.fileno())


def _row_groups(records: Sequence[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    tokens = 0
    for record in records:
        group.append(record)
        tokens += len(record.tokens)
        if tokens >= GROUP_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _damaged(part: Path, error: Exception) -> DataError:
    told = " ".join(str(error).split())
    return DataError(
        f"{part} is damaged ({told[:160]}): remove it and run again, its rows are made anew"
    )
