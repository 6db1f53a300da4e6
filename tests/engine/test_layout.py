"""The layout against safetensors' own writer, and the journal's arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mergekit_unconstrained.config.recipe import read_bytes
from mergekit_unconstrained.engine import journal
from mergekit_unconstrained.engine.journal import Journal, JournalError
from mergekit_unconstrained.engine.layout import Output, lay_out
from mergekit_unconstrained.engine.writer import Writer

DTYPES = [torch.bfloat16, torch.float32, torch.int64, torch.float16, torch.bool, torch.uint8]


def tensors() -> dict[str, torch.Tensor]:
    """Names out of order, with letters of all sorts; every dtype; empty, scalar and odd shapes."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(3, 5), (), (0, 4), (7,), (2, 3, 5), (1,)]
    return {
        f"{name}.{i}": (10 * torch.rand(shape, generator=generator)).to(dtype)
        for i, (dtype, shape) in enumerate(zip(DTYPES, shapes, strict=True))
        for name in ("z", "a.10", "a.2", 'quote"d', "ünïcode", "back\\slash")
    }


def test_a_file_is_what_safetensors_writes(tmp_path: Path) -> None:
    held = tensors()
    layout = lay_out([Output(n, tuple(t.shape), t.dtype) for n, t in held.items()], 0)
    writer = Writer(tmp_path, layout)
    for name, tensor in sorted(held.items(), reverse=True):
        writer.write(name, [tensor])
        writer.follow()
    (digest,) = writer.finish().items()
    safetensors.torch.save_file(held, tmp_path / "theirs", metadata={"format": "pt"})
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written == (tmp_path / "theirs").read_bytes()
    import hashlib

    assert digest == ("model.safetensors", hashlib.sha256(written).hexdigest())


def test_nothing_has_a_final_name_before_the_end(tmp_path: Path) -> None:
    layout = lay_out([Output(n, (4,), torch.float32) for n in "abc"], 16)
    assert [s.name for s in layout.shards][:1] == ["model-00001-of-00003.safetensors"]
    writer = Writer(tmp_path, layout)
    writer.write("a", [torch.ones(4)])
    assert all(p.name.endswith(".unfinished") for p in tmp_path.iterdir())
    with pytest.raises(AssertionError, match="b was never written"):
        writer.finish()
    writer.close()


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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30), ("1.5 GB", 1_500_000_000), (1000, 1000), ("20", 20), ("2kib", 2048),
        (None, None),
    ],
)  # fmt: skip
def test_sizes(text: Any, size: int | None) -> None:
    assert read_bytes(text) == size
