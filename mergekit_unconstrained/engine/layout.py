"""Where every byte of the output goes, known before the first one is computed.

The files are those mergekit writes: tensors are dealt out to shards in the order in which its
executor saves them, a shard is closed when the next tensor would exceed its size, and inside a
shard the order is that of safetensors. The same tensors give the same files, to the byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import safetensors.torch
import torch

from mergekit_unconstrained import compat

STEM = "model"
INDEX = f"{STEM}.safetensors.index.json"


@dataclass(frozen=True)
class Output:
    """One tensor to come. label: what mergekit's executor sorts by, a stored name of an input."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    label: str = ""

    @cached_property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: shard, and first byte from the beginning of the file."""

    output: Output
    shard: int
    start: int

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.start + self.output.bytes


@dataclass(frozen=True)
class Shard:
    """One output file: its final name, what stands before the tensors, and its size."""

    name: str
    header: bytes
    slots: tuple[Slot, ...]
    size: int


@dataclass(frozen=True)
class Layout:
    """All files of an output. index: the content of model.safetensors.index.json, if any."""

    shards: tuple[Shard, ...]
    slots: Mapping[str, Slot]
    index: str | None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(shard.size for shard in self.shards)


def lay_out(outputs: Iterable[Output], shard_size: int) -> Layout:
    """The layout of these tensors; shard_size: most bytes of tensors a file, 0 for one file."""
    groups: list[list[Output]] = [[]]
    filled = 0
    # Tensors of one label are saved in an order that mergekit leaves to its graph; ours: by name.
    for output in sorted(outputs, key=lambda o: (o.label, o.name)):
        if groups[-1] and 0 < shard_size < filled + output.bytes:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.bytes
    count = len(groups)
    names = [
        f"{STEM}.safetensors" if count == 1 else f"{STEM}-{i + 1:05d}-of-{count:05d}.safetensors"
        for i in range(count)
    ]
    shards = tuple(
        _shard(i, name, g) for i, (name, g) in enumerate(zip(names, groups, strict=True))
    )
    slots = {slot.output.name: slot for shard in shards for slot in shard.slots}
    index = None
    if count > 1:
        named = {o.name: names[i] for i, group in enumerate(groups) for o in group}
        total = sum(o.bytes for group in groups for o in group)
        index = _index(named, total)
    return Layout(shards, slots, index)


def _shard(number: int, name: str, outputs: Sequence[Output]) -> Shard:
    by_name = {o.name: o for o in outputs}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, dtype in _order(outputs):
        output = by_name[key]
        header[key] = {
            "dtype": dtype,
            "shape": list(output.shape),
            "data_offsets": [start, start + output.bytes],
        }
        start += output.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    before = len(text).to_bytes(8, "little") + text
    slots = []
    at = len(before)
    for key in list(header)[1:]:
        slots.append(Slot(by_name[key], number, at))
        at += by_name[key].bytes
    return Shard(name, before, tuple(slots), at)


def _order(outputs: Sequence[Output]) -> list[tuple[str, str]]:
    """Names in the order in which safetensors itself writes them, with its names of the dtypes.

    That is by dtype and then by name; the order and names of the dtypes are read off a file.
    """
    one_each = {str(i): torch.empty(0, dtype=d) for i, d in enumerate({o.dtype for o in outputs})}
    written = safetensors.torch.save(one_each)
    length = int.from_bytes(written[:8], "little")
    found = json.loads(written[8 : 8 + length])
    found.pop("__metadata__", None)
    ranks = {one_each[key].dtype: rank for rank, key in enumerate(found)}
    names = {one_each[key].dtype: entry["dtype"] for key, entry in found.items()}
    ordered = sorted(outputs, key=lambda o: (ranks[o.dtype], o.name))
    return [(o.name, names[o.dtype]) for o in ordered]


def _index(files: Mapping[str, str], total: int) -> str:
    metadata = {"total_size": total, "mergekit_version": compat.mergekit_version()}
    return json.dumps({"metadata": metadata, "weight_map": files}, indent=2)
