"""The rows of a data set as they lie in files: JSONL, JSON, CSV, Parquet, `datasets`, the Hub.

Large files are streamed or memory-mapped; only a .json file that is one list is read as a whole.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import DataError

Row = dict[str, Any]

NOT_UTF8 = "not UTF-8"
_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


def read_rows(dataset: str, split: str) -> Iterator[Row | None]:
    """Every row of a data set; None for one whose bytes are not UTF-8.

    dataset: a .jsonl, .json, .csv or .parquet file, a folder saved by `datasets`, or a name on the
    Hub (`owner/name`, `owner/name:config`). split: of a data set that has several; a single file
    has none. DataError for what is not there or is no data file, with its line.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        return iter(_saved(path, split))
    if path.is_file():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"{dataset}: files of kind {path.suffix or 'without a suffix'!r} cannot be read as "
                f"data; {', '.join(_READERS)} can"
            )
        return reader(path)
    name = _HUB_ID.fullmatch(dataset)
    if name is None or path.suffix.lower() in _READERS:
        raise DataError(
            f"data set {dataset!r} does not exist (paths are relative to the current directory)"
        )
    return iter(_from_hub(dataset, name["name"], name["config"], split))


def _jsonl(path: Path) -> Iterator[Row | None]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.strip(b"\xef\xbb\xbf \t\r\n") if number == 1 else line.strip()
            if line:
                yield _object(line, f"{path}:{number}")


def _object(line: bytes, where: str) -> Row | None:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        told = getattr(error, "msg", "nested too deeply")
        raise DataError(f"{where}: this line is not JSON ({told}): mend or remove it") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object, this line is a {type(row).__name__}")
    return row


def _json(path: Path) -> Iterator[Row | None]:
    """One list of objects, or one object a line under another name."""
    with path.open("rb") as stream:
        start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start.startswith(b"["):
        yield from _jsonl(path)
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: this is not JSON: {error}") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: row {number} is a {type(row).__name__}, where a JSON object is expected"
            )
        yield row


def _csv(path: Path) -> Iterator[Row | None]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        begun = 1
        try:
            _check_header(path, reader.fieldnames or ())
            begun = reader.line_num + 1
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{path}:{reader.line_num}: more cells than the header has columns: "
                        "quote the cells that hold commas"
                    )
                yield row
                begun = reader.line_num + 1
        except csv.Error as error:
            told = str(error)
            if "end of data" in told:
                told = "a quote in it is never closed"
            raise DataError(f"{path}:{begun}: the row that begins here is no CSV: {told}") from None


def _check_header(path: Path, names: Sequence[str]) -> None:
    """DataError for a header that cannot be meant so: one name twice, another separator."""
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise DataError(f"{path}:1: two columns are called {twice!r}: rename or remove one")
    other = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise DataError(
            f"{path}:1: the header is one column, {names[0]!r}: cells are separated by commas in a "
            f"CSV file, not by {other!r}"
        )


def _parquet(path: Path) -> Iterator[Row | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                try:
                    yield from batch.to_pylist()
                except UnicodeDecodeError:
                    yield from _one_by_one(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: this is not a complete Parquet file: {error}") from None


def _one_by_one(batch: Any) -> Iterator[Row | None]:
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None


_READERS: dict[str, Callable[[Path], Iterator[Row | None]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _saved(folder: Path, split: str) -> Iterable[Row]:
    """A folder that `save_to_disk` wrote: a Dataset, or a DatasetDict with splits."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except FileNotFoundError:
        raise DataError(
            f"{folder} is not a folder that `datasets` saved: name a file in it, or save it with "
            "Dataset.save_to_disk"
        ) from None
    except Exception as error:
        raise DataError(f"{folder} cannot be read as a saved data set: {error}") from None
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise DataError(f"{folder} has no split {split!r}. {suggest(split, saved)}")
    return saved[split]


def _from_hub(dataset: str, name: str, config: str | None, split: str) -> Iterable[Row]:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # requests', fsspec's and datasets' own have no common root
        told = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data set {dataset!r} is no file or folder here, and could not be had from the Hub: "
            f"{told[:300]}"
        ) from None
