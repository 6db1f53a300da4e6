"""In which order conversations are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[int]):
    """A random order in which each optimiser step is sorted by length.

    A step's gradient is a sum over its tokens, so how its conversations are split into forward
    passes changes nothing but the padding: what length grouping saves, without its grouped steps
    (ours). The order of an epoch depends on seed and epoch alone, so a resumed run finds its place;
    without lengths it is the order of accelerate's SeedableRandomSampler.

    lengths: of every conversation, in any unit. step: conversations in an optimiser step. epoch:
    gives the number of the epoch that begins.
    """

    def __init__(
        self, lengths: Sequence[int], *, step: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self._lengths = lengths
        self._step = step
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        order = torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, len(order), self._step):
            # longest first: what does not fit in memory fails at once
            yield from sorted(order[start : start + self._step], key=lambda i: -self._lengths[i])


def lengths_of(dataset: Sized) -> Sequence[int]:
    """What the data set says of its items in `lengths`; all alike when it says nothing."""
    lengths = getattr(dataset, "lengths", None)
    return [0] * len(dataset) if lengths is None else lengths
