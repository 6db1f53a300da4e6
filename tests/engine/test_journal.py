"""The journal by itself: what a kill may leave of it, and what it is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_unconstrained.engine import journal
from mergekit_unconstrained.engine.journal import Journal, JournalError

IDENTITY: dict[str, Any] = {"the recipe": "r", "inputs": {"a": [10, 1], "b": [20, 2]}}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({**IDENTITY, "the recipe": "s"}, "the recipe is not what it was"),
        ({**IDENTITY, "more": 1}, "more is not what it was"),
        ({"the recipe": "r", "inputs": {"a": [10, 1]}}, "b is no longer an input"),
        ({"the recipe": "r", "inputs": {**IDENTITY["inputs"], "c": [1, 1]}}, "c is new"),
        (
            {"the recipe": "r", "inputs": {"a": [10, 1], "b": [2000, 2]}},
            "b has changed from 20 to 2,000 bytes",
        ),
        ({"the recipe": "r", "inputs": {"a": [10, 3], "b": [20, 2]}}, "a has changed (its time)"),
    ],
)
def test_a_journal_says_what_changed(tmp_path: Path, now: dict[str, Any], said: str) -> None:
    notes = Journal(tmp_path / "j", IDENTITY, new=True)
    notes.add("x", "1")
    notes.close()
    assert journal.read(tmp_path / "j", IDENTITY) == {"x": "1"}
    with pytest.raises(JournalError) as error:
        journal.read(tmp_path / "j", now)
    assert str(error.value) == said


def test_a_journal_cut_at_any_byte_is_a_shorter_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    notes = Journal(path, IDENTITY, new=True)
    for i in range(5):
        notes.add(f"tensor {i}", str(i))
    notes.close()
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = journal.read(path, IDENTITY)
        assert list(found) == [f"tensor {i}" for i in range(whole[first:cut].count(b"\n"))]
        notes = Journal(path, IDENTITY, new=False)
        notes.add("next", "n")
        notes.close()
        assert list(journal.read(path, IDENTITY)) == [*found, "next"]


@pytest.mark.parametrize("place", [0, 5, 20, 60, -3])
def test_a_byte_that_flipped_is_seen(tmp_path: Path, place: int) -> None:
    path = tmp_path / "j"
    notes = Journal(path, IDENTITY, new=True)
    notes.add("x", "1")
    notes.close()
    text = bytearray(path.read_bytes())
    text[place] ^= 1
    path.write_bytes(bytes(text))
    with pytest.raises(JournalError, match=r"line [12] of its journal is damaged"):
        journal.read(path, IDENTITY)


def test_a_line_that_only_a_part_of_reached_the_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Journal(tmp_path / "j", IDENTITY, new=True)

    class Full:
        def write(self, line: bytes) -> int:
            return len(line) - 1

        def close(self) -> None:
            pass

    notes._file.close()
    monkeypatch.setattr(notes, "_file", Full())
    with pytest.raises(OSError, match="No space left"):
        notes.add("a", "hash")


def test_the_identity_holds_recipe_version_and_the_state_of_every_file(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"1234")
    found = journal.identity_of("hash", [file])
    assert found["inputs"] == {str(file): [4, file.stat().st_mtime_ns]}
    assert {"hash", journal.__version__} <= {v for v in found.values() if isinstance(v, str)}
