"""Tensors to a device and back, beside what other threads do there.

Each thread of the engine has a stream of its own and page-locked room for what goes there and what
comes back. So one thread's copies run while another's tensors are merged: two threads, as the
engine has at least where there are two cores, are two buffers. Devices other than CUDA are copied
to plainly. Not run on a device yet: `make test-gpu` holds it against the CPU's result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key")
ALIGNED = 512
"""Bytes: where a tensor may begin in the page-locked room."""


class Lane:
    """One thread's way to a device. What `merged` gives is overwritten by its next call."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        is_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if is_cuda else None
        self._there, self._back = Room(pinned=is_cuda), Room(pinned=is_cuda)

    def merged(
        self,
        tensors: Mapping[Key, torch.Tensor],
        compute: Callable[[Mapping[Key, torch.Tensor]], torch.Tensor | None],
    ) -> torch.Tensor | None:
        """What `compute` makes of the tensors on the device, on the CPU again.

        tensors: on the CPU, on the pages of mapped files.
        """
        if self._device.type == "cpu":
            return compute(tensors)
        if self._stream is None:
            result = compute({key: tensor.to(self._device) for key, tensor in tensors.items()})
            return None if result is None else result.cpu()
        places = self._there.places(list(tensors.values()))
        with torch.cuda.stream(self._stream):
            there = {}
            for (key, tensor), place in zip(tensors.items(), places, strict=True):
                there[key] = place.copy_(tensor).to(self._device, non_blocking=True)
            result = compute(there)
            if result is None:
                return None
            (back,) = self._back.places([result])
            back.copy_(result, non_blocking=True)
        self._stream.synchronize()
        return back


class Room:
    """Memory that is used again and again, page-locked for a device that copies by itself."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def places(self, likes: list[torch.Tensor]) -> list[torch.Tensor]:
        """Uninitialised tensors on the CPU of the shapes and dtypes of others, side by side."""
        starts = [0]
        for like in likes:
            starts.append(starts[-1] + -(-like.nbytes // ALIGNED) * ALIGNED)
        if starts[-1] > len(self._bytes):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # the old one first
            self._bytes = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=self._pinned)
        return [
            self._bytes[start : start + like.nbytes].view(like.dtype).view(like.shape)
            for start, like in zip(starts, likes, strict=False)
        ]
