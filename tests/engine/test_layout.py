"""The layout against safetensors' own writer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mergekit_unconstrained.config.recipe import read_bytes
from mergekit_unconstrained.engine import writer
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
        writer.done(name)
        writer.follow()
    (digest,) = writer.finish().items()
    safetensors.torch.save_file(held, tmp_path / "theirs", metadata={"format": "pt"})
    written = (tmp_path / "model.safetensors").read_bytes()
    assert written == (tmp_path / "theirs").read_bytes()
    import hashlib

    assert digest == ("model.safetensors", hashlib.sha256(written).hexdigest())


def test_parts_one_after_the_other_are_the_tensor_and_have_its_hash(tmp_path: Path) -> None:
    tensor = torch.arange(35, dtype=torch.float32).reshape(7, 5)
    writer = Writer(tmp_path, lay_out([Output("a", (7, 5), torch.float32)], 0))
    digest = writer.write("a", (tensor[i : i + 3] for i in range(0, 7, 3)))
    assert digest == writer.write("a", [tensor])
    assert writer.recheck({"a": digest}) == {"a"}
    assert writer.recheck({"a": "0" * 32}) == set()
    writer.finish()
    assert torch.equal(safetensors.torch.load_file(tmp_path / "model.safetensors")["a"], tensor)


@pytest.mark.parametrize("rows", [6, 8])
def test_parts_that_are_not_the_planned_tensor_are_refused(tmp_path: Path, rows: int) -> None:
    writer = Writer(tmp_path, lay_out([Output("a", (7, 5), torch.float32)], 0))
    with pytest.raises(AssertionError, match="bytes than were planned"):
        writer.write("a", torch.zeros(rows, 1, 5))
    writer.close()


def test_nothing_has_a_final_name_before_the_end(tmp_path: Path) -> None:
    layout = lay_out([Output(n, (4,), torch.float32) for n in "abc"], 16)
    assert [s.name for s in layout.shards][:1] == ["model-00001-of-00003.safetensors"]
    writer = Writer(tmp_path, layout)
    writer.write("a", [torch.ones(4)])
    writer.done("a")
    assert all(p.name.endswith(".unfinished") for p in tmp_path.iterdir())
    with pytest.raises(AssertionError, match="b was never written"):
        writer.finish()
    writer.close()


def test_a_shard_may_be_exactly_as_large_as_is_allowed() -> None:
    outputs = [Output(n, (4,), torch.float32) for n in "abcd"]
    assert [len(s.slots) for s in lay_out(outputs, 32).shards] == [2, 2]
    assert [len(s.slots) for s in lay_out(outputs, 31).shards] == [1, 1, 1, 1]
    assert [len(s.slots) for s in lay_out(outputs, 48).shards] == [3, 1]
    assert [len(s.slots) for s in lay_out(outputs, 1).shards] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30), ("1.5 GB", 1_500_000_000), (1000, 1000), ("20", 20), ("2kib", 2048),
        (None, None),
    ],
)  # fmt: skip
def test_sizes(text: Any, size: int | None) -> None:
    assert read_bytes(text) == size


def test_a_file_gets_its_name_only_when_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(file: int) -> None:
        happened.append("on the disk")
        fsync(file)

    def renamed(self: Path, target: Path) -> Path:
        happened.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    writer = Writer(tmp_path, lay_out([Output("a", (3,), torch.float32)], 0))
    writer.write("a", [torch.ones(3)])
    writer.done("a")
    assert happened == []
    writer.finish()
    assert happened == ["on the disk", "model.safetensors"]


def test_large_parts_are_sent_to_the_disk_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(writer, "_send", lambda _, start, count: sent.append((start, count)))
    layout = lay_out([Output("a", (5, 1 << 18), torch.float32)], 0)
    start = layout.slots["a"].start
    tensor = torch.ones(5, 1 << 18)
    held = Writer(tmp_path, layout)
    held.write("a", [tensor[:2], tensor[2:4], tensor[4:, : 1 << 10], tensor[4:, 1 << 10 :]])
    row = 1 << 20
    assert sent == [(start, 2 * row), (start + 2 * row, 2 * row)]
    held.done("a")
    held.finish()


def test_sending_gives_the_files_pages_to_the_system_and_waits_for_nothing(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        done = writer._sender()(file.fileno(), 0, 1 << 20)
    assert done == (0 if sys.platform == "linux" else None)
