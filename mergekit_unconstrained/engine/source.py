"""Parents' tensors out of memory-mapped files, through the interface of mergekit's lazy loader.

mergekit's own loader builds the list of all keys of a shard at every read (quadratic), keeps one
shard open (so that threads would throw each other's out), reads behind one lock, and keeps every
page that was touched in memory until the shard is closed. Here a shard's header is read once, all
shards stay mapped, reads need no lock and cost nothing, and the pages of a tensor are given back
when it is done. Everything that reads through LoaderCache, mergekit's own tasks included, gets it.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import LazyTensorLoader, ModelReference, ShardedTensorIndex
from mergekit_unconstrained.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' names of the dtypes that can be read; further ones are refused by name."""

_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE (Python names it from 3.13 on): a private mapping larger than the memory is fine,
since nothing is ever written to it."""


class CannotStreamError(Exception):
    """A merge that the streaming engine leaves to mergekit's executor; the message says why."""


class MappedFile:
    """One safetensors file in the address space."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            self.header: dict[str, dict] = json.loads(stream.read(length))
            # Private rather than read-only: torch has no tensors that must not be written to.
            self._map = mmap.mmap(
                stream.fileno(),
                size,
                flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        self.header.pop("__metadata__", None)
        self.path = path
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._data = 8 + length

    def span(self, key: str) -> tuple[int, int]:
        """First byte of a tensor in the file, and one past the last."""
        start, end = self.header[key]["data_offsets"]
        return self._data + start, self._data + end

    def empty_like(self, key: str) -> torch.Tensor:
        """A tensor of the same shape and dtype on the meta device."""
        entry = self.header[key]
        if entry["dtype"] not in DTYPES:
            raise ModelError(
                f"{key} in {self.path.name} has dtype {entry['dtype']}, which cannot be merged: "
                "convert the model to bfloat16 or float32"
            )
        return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor that shares the file's pages."""
        like = self.empty_like(key)
        start, end = self.span(key)
        if start == end:
            return torch.empty(like.shape, dtype=like.dtype)
        raw = torch.from_numpy(self._bytes[start:end])
        if start % like.dtype.itemsize:  # no file that safetensors itself wrote
            raw = raw.clone()
        return raw.view(like.dtype).view(like.shape)

    def advise(self, key: str, advice: int, first: float = 0, last: float = 1) -> None:
        """Tell the system what becomes of the whole pages of a tensor, or of a share of it."""
        start, end = self.span(key)
        start, end = start + int(first * (end - start)), start + int(last * (end - start))
        start += -start % mmap.PAGESIZE
        end -= end % mmap.PAGESIZE
        if end > start:
            self._map.madvise(advice, start, end - start)


class MappedLoader(LazyTensorLoader):
    """mergekit's lazy loader, on mapped files."""

    def __init__(self, index: ShardedTensorIndex) -> None:
        super().__init__(index)
        folder = Path(index.base_path)
        files = {
            name: MappedFile(folder / name) for name in sorted(set(index.tensor_paths.values()))
        }
        self.files = {key: files[name] for key, name in index.tensor_paths.items()}
        self._by_layer: dict[str | None, list[str]] | None = None

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> torch.Tensor | None:
        """A tensor by its stored name or the first alias there is."""
        found = next((k for k in (key, *(aliases or ())) if k in self.files), None)
        if found is None:
            if raise_on_missing:
                raise KeyError(key)
            return None
        return self.files[found].tensor(found).to(device)

    def of_layer(self, target: str) -> list[str]:
        """The stored names that carry the layer number of a name: what it can be assembled from.

        Without this, mergekit looks through all names for each of a model's fused experts.
        """
        if self._by_layer is None:
            self._by_layer = {}
            for key in self.files:
                self._by_layer.setdefault(_layer(key), []).append(key)
        return self._by_layer.get(_layer(target), [])


def _layer(name: str) -> str | None:
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return found[1] if found else None


class Input:
    """One input of one output tensor, as mergekit's own task for it would read or assemble it."""

    def __init__(self, task: compat.LoadTensor, loader: MappedLoader, model_type: str) -> None:
        self._task = task
        self._loader = loader
        names = (task.tensor, *(task.aliases or ()), *(task.tied_names or ()))
        stored = next((n for n in names if n in loader.files), None)
        self._targets = () if stored else (task.tensor, *(task.aliases or ()))
        self._model_type = model_type
        self.label = stored or ""
        like = loader.files[stored].empty_like(stored) if stored else self._assembled(meta=True)
        self.stored: tuple[str, ...] = ()
        if stored:
            self.stored = (stored,)
        elif like is not None:
            self.stored = tuple(loader.of_layer(task.tensor))
        dtype = compat.dtype_from_name(task.dtype)
        casts = like is not None and dtype not in (None, like.dtype)
        self.has_rows = bool(stored)
        self.is_copied = casts or not stored
        self.like = like if like is None or dtype is None else like.to(dtype)

    @property
    def is_missing(self) -> bool:
        """Whether the model has no such tensor."""
        return self.like is None

    def read(self) -> torch.Tensor | None:
        """The tensor, in the recipe's dtype."""
        if self.like is None:
            return None
        found = self.stored_tensor() if self.has_rows else self._assembled(meta=False)
        if self.is_copied:
            found = None if found is None else found.to(self.like.dtype)
            self.advise(mmap.MADV_DONTNEED)
        return found

    def stored_tensor(self) -> torch.Tensor:
        """The tensor as it is stored, on the file's pages; for one that `has_rows`."""
        found = self._loader.get_tensor(self.stored[0])
        assert found is not None
        return found

    def _assembled(self, *, meta: bool) -> torch.Tensor | None:
        files = self._loader.files

        def source(key: str) -> Callable[[], torch.Tensor]:
            return lambda: files[key].empty_like(key) if meta else files[key].tensor(key)

        sources = {key: source(key) for key in self._loader.of_layer(self._task.tensor)}
        for target in self._targets:
            found = compat.convert(self._model_type, sources, target)
            if found is not None:
                return found
        return None

    def place(self) -> tuple[str, int]:
        """File and offset, to read in the order of the disk."""
        if not self.stored:
            return ("", 0)
        file = self._loader.files[self.stored[0]]
        return (file.path.name, file.span(self.stored[0])[0])

    def advise(self, advice: int) -> None:
        """See MappedFile.advise."""
        for key in self.stored:
            self._loader.files[key].advise(key, advice)

    def give_back(self, first: float, last: float) -> None:
        """Let the system have the pages between two shares of the stored tensor, 0 to 1."""
        for key in self.stored:
            self._loader.files[key].advise(key, mmap.MADV_DONTNEED, first, last)


def map_parents(
    references: Iterable[ModelReference], cache: compat.LoaderCache
) -> Mapping[ModelReference, MappedLoader]:
    """Fetch what is not here yet, map every parent's files, and let mergekit read through them.

    CannotStreamError for pickles.
    """
    loaders = {}
    for reference in references:
        index = cache.get(reference).index
        if not index.is_safetensors:
            raise CannotStreamError(f"{reference} is a .bin file, which is only read as a whole")
        loaders[reference] = MappedLoader(index)
        compat.replace_loader(reference, loaders[reference])
    return loaders
