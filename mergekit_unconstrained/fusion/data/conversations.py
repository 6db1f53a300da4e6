"""The conversations of a data set, and a report of the rows that could not be used.

    rows of a file -> columns -> Conversation

No row disappears silently: what is left out is counted by reason, with the first row numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.fusion.data.columns import Layout, UnusableRowError, recognise
from mergekit_unconstrained.fusion.data.rows import NOT_UTF8, read_rows
from mergekit_unconstrained.fusion.records import Conversation
from mergekit_unconstrained.fusion.settings import Columns

FIRST_FEW = 10
"""Row numbers told for each reason."""


@dataclass
class DataReport:
    """What became of the rows of a data set; later stages add to it what they leave out.

    read: rows seen. rows: reason -> the numbers, counted from 0, of the rows left out for it.
    """

    dataset: str = "the data"
    read: int = 0
    rows: dict[str, list[int]] = field(default_factory=dict)

    def skip(self, row: int, reason: str) -> None:
        """Note that a row is left out."""
        self.rows.setdefault(reason, []).append(row)

    def counts(self) -> dict[str, int]:
        """Reason -> rows left out for it, the commonest reason first."""
        return {r: len(n) for r, n in sorted(self.rows.items(), key=lambda item: -len(item[1]))}

    @property
    def kept(self) -> int:
        """Rows that are used."""
        return self.read - sum(self.counts().values())

    def describe(self) -> str:
        """One sentence: `5 of 9 rows of x are used; left out: 4 empty response (rows 1, ...)`."""
        told = []
        for reason, count in self.counts().items():
            listed = ", ".join(map(str, self.rows[reason][:FIRST_FEW]))
            more = ", ..." if count > FIRST_FEW else ""
            told.append(f"{count} {reason} (row{'s' * (count > 1)} {listed}{more})")
        left_out = f"; left out, counting from row 0: {', '.join(told)}" if told else ""
        return f"{self.kept} of {self.read} rows of {self.dataset} are used{left_out}"

    def check(self) -> None:
        """DataError when nothing is left to train on."""
        if not self.read:
            raise DataError(f"{self.dataset} holds no rows")
        if self.kept <= 0:
            raise DataError(f"no row can be used: {self.describe()}")

    def as_dict(self) -> dict[str, Any]:
        """JSON-like, for manifests and cards."""
        examples = {reason: rows[:FIRST_FEW] for reason, rows in self.rows.items()}
        return {"read": self.read, "kept": self.kept, "left_out": self.counts(), "rows": examples}


def read_conversations(
    dataset: str,
    columns: Columns,
    split: str = "train",
    max_rows: int | None = None,
    report: DataReport | None = None,
) -> Iterator[Conversation]:
    """The usable rows of a data set, one after another; see rows.read_rows for what it may be.

    max_rows: read the first so many rows only. report: is filled while the iterator is used, so it
    is complete at its end. DataError when the file cannot be read, has no response column, or no
    row of it can be used.
    """
    report = report or DataReport()
    report.dataset = dataset
    layout: Layout | None = None
    for number, row in enumerate(itertools.islice(read_rows(dataset, split), max_rows)):
        report.read += 1
        if row is None:
            report.skip(number, NOT_UTF8)
            continue
        if layout is None:
            layout = recognise([str(name) for name in row], columns, dataset)
        try:
            yield Conversation(number, layout.turns(row))
        except UnusableRowError as reason:
            report.skip(number, str(reason))
    report.check()


def fingerprint(conversations: Iterable[Conversation]) -> str:
    """sha256 over everything that a fusion reads of its data: rows, roles, texts, truncation."""
    digest = hashlib.sha256()
    for one in conversations:
        turns = [(turn.role, turn.text) for turn in one.turns]
        line = json.dumps((one.row, one.keep_bytes, turns), ensure_ascii=False)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
