"""The journal by itself: what a kill may leave of it, and what it is held against."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_unconstrained.engine import journal
from mergekit_unconstrained.engine.journal import Journal, JournalError

IDENTITY = {"the recipe": "r", "inputs": {"a.safetensors": [10, 1]}}


def note(path: Path, *tensors: str, new: bool) -> None:
    notes = Journal(path, IDENTITY, new=new)
    for tensor in tensors:
        notes.add(tensor, "hash of " + tensor)
    notes.close()


def test_what_was_noted_is_read_again(tmp_path: Path) -> None:
    note(tmp_path / "j", "a", "b", new=True)
    note(tmp_path / "j", "c", new=False)
    assert journal.read(tmp_path / "j", IDENTITY) == {t: "hash of " + t for t in "abc"}


@pytest.mark.parametrize("rest", [b"x", b"0123456789abcdef {", b"x" * 500])
def test_half_a_line_is_cut_off_before_more_is_noted(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "j"
    note(path, "a", new=True)
    path.write_bytes(path.read_bytes() + rest)
    assert list(journal.read(path, IDENTITY)) == ["a"]
    note(path, "b", new=False)
    assert list(journal.read(path, IDENTITY)) == ["a", "b"]


def test_a_line_that_is_not_what_was_written_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j"
    note(path, "a", "b", new=True)
    path.write_bytes(path.read_bytes().replace(b"hash of a", b"hash of b"))
    with pytest.raises(JournalError, match="line 2 of its journal is damaged"):
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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"the recipe": "s"}, "the recipe is not what it was"),
        ({"the seed": 3}, "the seed is not what it was"),
        ({"inputs": {}}, "a.safetensors is no longer an input"),
        ({"inputs": {**IDENTITY["inputs"], "b": [1, 1]}}, "b is new"),
        ({"inputs": {"a.safetensors": [11, 1]}}, "has changed from 10 to 11 bytes"),
        ({"inputs": {"a.safetensors": [10, 2]}}, "has changed (its time)"),
    ],
)
def test_every_difference_is_named(tmp_path: Path, change: dict, reason: str) -> None:
    note(tmp_path / "j", "a", new=True)
    with pytest.raises(JournalError) as error:
        journal.read(tmp_path / "j", {**IDENTITY, **change})
    assert reason in str(error.value)


def test_the_identity_holds_recipe_version_and_the_state_of_every_file(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"1234")
    before = journal.identity_of("hash", [file])
    assert before["inputs"] == {str(file): [4, file.stat().st_mtime_ns]}
    assert "hash" in before.values()
    assert journal.__version__ in before.values()
