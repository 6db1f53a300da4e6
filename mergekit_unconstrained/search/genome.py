"""What a search may change, as numbers between bounds; and the recipe that such numbers mean.

A gene is one number of a recipe: a parameter of one model (or of all), for one group of layers (or
all), for one kind of tensor (or all). Which parameters there are, and their bounds, is read from
the method's own specification. Population, start and sigma of the search: search/samplers.py.

The paper (arXiv 2410.13699) searches coefficients per layer by CMA-ES; groups of layers, kinds of
tensor and the bounds are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

DIGITS = 4
"""Decimals of a value, in a recipe and in memory alike: what is written is what was scored."""

Address = tuple[str, str, int | None, str]
"""model ("" for all), parameter, index of the group of layers (None: all), kind ("" for all)."""


@dataclass(frozen=True)
class Gene:
    """One number of a recipe. low <= value <= high; start: where a search begins.

    called: the short name of its model. place: its layers, as people read them.
    """

    address: Address
    low: float
    high: float
    start: float
    whole: bool = False
    called: str = ""
    place: str = ""

    @cached_property
    def name(self) -> str:
        """As storages and plots call it: `math weight layers 0-3 attention`."""
        _, parameter, _, kind = self.address
        return " ".join(part for part in (self.called, parameter, self.place, kind) if part)

    def rounded(self, value: float) -> float:
        """The nearest value that a recipe can say, within the bounds."""
        value = min(max(value, self.low), self.high)
        return float(round(value)) if self.whole else round(value, DIGITS)


Values = Mapping[str, float]
"""A candidate: gene name -> value."""


@dataclass(frozen=True)
class Genome:
    """All genes, and the groups of layers that their addresses speak of.

    groups: (first, last) layer of each, both included. fixed: genes that stay at their start.
    """

    genes: tuple[Gene, ...]
    groups: tuple[tuple[int, int], ...]
    fixed: tuple[Gene, ...] = ()

    def __len__(self) -> int:
        return len(self.genes)

    @property
    def start(self) -> dict[str, float]:
        """Where a search begins."""
        return {g.name: g.rounded(g.start) for g in self.genes}

    def from_unit(self, x: Sequence[float] | np.ndarray) -> dict[str, float]:
        """A candidate from a point of the unit cube."""
        return {
            g.name: g.rounded(g.low + float(u) * (g.high - g.low))
            for g, u in zip(self.genes, x, strict=True)
        }

    def to_unit(self, values: Values) -> np.ndarray:
        """[n] float64, the reverse of `from_unit`."""
        return np.array([(values[g.name] - g.low) / (g.high - g.low) for g in self.genes])

    def at(self, values: Values) -> dict[Address, float]:
        """A candidate by address instead of by name, fixed genes included."""
        fixed = {g.address: g.rounded(g.start) for g in self.fixed}
        return fixed | {g.address: values[g.name] for g in self.genes}

    def fixing(self, dead: Callable[[Gene], bool]) -> Genome:
        """The genome with some genes left at their start: those that nothing depends on."""
        alive = tuple(g for g in self.genes if not dead(g))
        return Genome(alive, self.groups, (*self.fixed, *(g for g in self.genes if dead(g))))

    def group_of(self, layer: int) -> int:
        """The group that a layer belongs to."""
        return next(i for i, (first, last) in enumerate(self.groups) if first <= layer <= last)


def place_of(group: tuple[int, int] | None, *, finer: bool) -> str:
    """`layer 3`, `layers 0-3`; finer: whether others speak of layers or kinds, and this one of the
    rest."""
    if group is None:
        return "elsewhere" if finer else ""
    first, last = group
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def layer_groups(layers: int, size: int) -> tuple[tuple[int, int], ...]:
    """Groups of `size` layers, the last one smaller when they do not divide."""
    return tuple((i, min(i + size, layers) - 1) for i in range(0, layers, size))
