"""Resolved coefficients, arranged for the eye: layer x kind of tensor, for every expert.

A table or recipe says how coefficients are looked up; a grid holds what every tensor really got.
The heat map, the terminal and the model card all read this one thing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mergekit_unconstrained.config.table import Coefficients
from mergekit_unconstrained.numerics.roles import LAYER_KINDS, OUTER_KINDS, Role, role_from_name


@dataclass(frozen=True)
class Cell:
    """What the tensors of one place have in common.

    weight, density: the mean over the place's tensors; None where nothing was said. mixed: which of
    the two differ from tensor to tensor, so that the mean is nobody's value.
    """

    weight: float | None = None
    density: float | None = None
    mixed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ExpertGrid:
    """One expert's cells: `inner` by (layer, kind), `outer` by kind; absent where no tensor is."""

    inner: Mapping[tuple[int, str], Cell] = field(default_factory=dict)
    outer: Mapping[str, Cell] = field(default_factory=dict)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, those of the layers first."""
        return (*self.inner.values(), *self.outer.values())


@dataclass(frozen=True)
class Grid:
    """Coefficients of a whole merge.

    layers: number of blocks. kinds, outer_kinds: those that occur, in the order of LAYER_KINDS and
    OUTER_KINDS. experts: by name, in the order of the recipe.
    """

    layers: int
    kinds: tuple[str, ...]
    outer_kinds: tuple[str, ...]
    experts: Mapping[str, ExpertGrid]

    @property
    def has_densities(self) -> bool:
        """Whether any expert keeps less than everything anywhere."""
        cells = (cell for expert in self.experts.values() for cell in expert.cells)
        return any(cell.density is not None and cell.density != 1 for cell in cells)


def build_grid(roles: Mapping[str, Role], values: Mapping[str, Mapping[str, Coefficients]]) -> Grid:
    """Arrange what every tensor got.

    roles: tensor name -> role; a name it lacks is read by convention. values: expert -> tensor name
    -> coefficients. Tensors that share a place are averaged, and the cell is marked `mixed` where
    they differ.
    """
    layers = max((role.depth for role in roles.values()), default=0)
    experts: dict[str, ExpertGrid] = {}
    for expert, tensors in values.items():
        inner: dict[tuple[int, str], list[Coefficients]] = {}
        outer: dict[str, list[Coefficients]] = {}
        for name, coefficients in tensors.items():
            role = roles.get(name) or role_from_name(name)
            if role.layer is None:
                outer.setdefault(role.kind, []).append(coefficients)
            else:
                inner.setdefault((role.layer, role.kind), []).append(coefficients)
                layers = max(layers, role.layer + 1)
        experts[expert] = ExpertGrid(
            inner={
                place: _cell(inner[place])
                for place in sorted(inner, key=lambda p: (p[0], LAYER_KINDS.index(p[1])))
            },
            outer={kind: _cell(outer[kind]) for kind in OUTER_KINDS if kind in outer},
        )
    inside = {kind for expert in experts.values() for _, kind in expert.inner}
    outside = {kind for expert in experts.values() for kind in expert.outer}
    return Grid(
        layers=layers,
        kinds=tuple(kind for kind in LAYER_KINDS if kind in inside),
        outer_kinds=tuple(kind for kind in OUTER_KINDS if kind in outside),
        experts=experts,
    )


def summary(expert: ExpertGrid, what: Literal["weight", "density"] = "weight") -> str:
    """An expert's weights in a few words: `0.5`, or `0.10 to 0.90, by layer and kind`.

    what: the densities instead.
    """
    weights = [one for one in (getattr(cell, what) for cell in expert.cells) if one is not None]
    if not weights:
        return ""
    low, high = min(weights), max(weights)
    if low == high and not any(what in cell.mixed for cell in expert.cells):
        return f"{low:g}"
    of_layer: dict[int, set[float | None]] = {}
    of_kind: dict[str, set[float | None]] = {}
    for (layer, kind), cell in expert.inner.items():
        of_layer.setdefault(layer, set()).add(getattr(cell, what))
        of_kind.setdefault(kind, set()).add(getattr(cell, what))
    words = [
        word
        for word, differs in (
            ("layer", any(len(seen) > 1 for seen in of_kind.values())),
            ("kind", any(len(seen) > 1 for seen in of_layer.values())),
        )
        if differs
    ]
    return f"{low:.2f} to {high:.2f}, by {' and '.join(words) or 'kind'}"


def _cell(found: list[Coefficients]) -> Cell:
    weights, densities = [c.weight for c in found], [c.density for c in found]
    mixed = {"weight": len(set(weights)) > 1, "density": len(set(densities)) > 1}
    return Cell(
        weight=_mean(weights),
        density=_mean(densities),
        mixed=frozenset(name for name, differs in mixed.items() if differs),
    )


def _mean(numbers: list[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    if not known:
        return None
    # Equal numbers keep their exact value: (0.1 + 0.1 + 0.1) / 3 is not 0.1.
    return known[0] if len(set(known)) == 1 else math.fsum(known) / len(known)
