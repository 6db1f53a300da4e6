"""Rows of JSONL files and what stands in their columns, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.evaluation.records import Message

ROLES = ("system", "user", "assistant")


def read_rows(path: Path, limit: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers, the first `limit` of them; DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"data file {str(path)!r} does not exist (paths in a tasks file are relative to it; "
            "what a recipe of this project needs first, such as `make stories`, stands at its top)"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"data file {str(path)!r} is not UTF-8: {error.reason}") from None
    except OSError as error:
        raise DataError(f"data file {str(path)!r} cannot be read: {error.strerror}") from None
    rows: list[tuple[int, dict[str, Any]]] = []
    # not splitlines: JSON strings may hold U+2028 and its kin as they are
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if limit is not None and len(rows) == limit:
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: this line is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f'{path}:{number}: every line is one object, as in {{"prompt": ...}}')
        rows.append((number, row))
    if not rows:
        raise DataError(f"data file {str(path)!r} has no rows")
    return rows


def value_of(row: Mapping[str, Any], column: str, setting: str, where: str) -> Any:
    """What stands in a column; DataError names the setting that chooses it."""
    if column not in row:
        raise DataError(
            f"{where}: no column {column!r} (`{setting}:` names it). {suggest(column, row)}"
        )
    return row[column]


def text_of(row: Mapping[str, Any], column: str, setting: str, where: str) -> str:
    """The text or number in a column, as text; DataError for anything else and for no text."""
    value = value_of(row, column, setting, where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {column!r} must be text or a number, not {_told(value)}")
    if value == "":
        raise DataError(f"{where}: {column!r} is empty")
    return str(value)


def texts_of(row: Mapping[str, Any], column: str, setting: str, where: str) -> tuple[str, ...]:
    """The list of texts in a column; DataError for anything else."""
    value = value_of(row, column, setting, where)
    if not isinstance(value, list) or not all(
        isinstance(one, str | int | float) and not isinstance(one, bool) and one != ""
        for one in value
    ):
        raise DataError(f"{where}: {column!r} must be a list of texts, not {_told(value)}")
    return tuple(str(one) for one in value)


def messages_of(row: Mapping[str, Any], column: str, where: str) -> tuple[Message, ...]:
    """A conversation that awaits the assistant; DataError for anything else."""
    value = value_of(row, column, "messages", where)
    shape = "a list of {role, content}, role being system, user or assistant"
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {column!r} must be {shape}, not {_told(value)}")
    for one in value:
        if (
            not isinstance(one, dict)
            or one.get("role") not in ROLES
            or not isinstance(one.get("content"), str)
        ):
            raise DataError(f"{where}: {column!r} must be {shape}, and holds {_told(one)}")
    found = tuple(Message(one["role"], one["content"]) for one in value)
    if found[-1].role == "assistant":
        raise DataError(
            f"{where}: {column!r} ends with the assistant's words; leave the answer to the model"
        )
    return found


def _told(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
