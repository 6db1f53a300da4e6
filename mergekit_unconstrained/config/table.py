"""Coefficient tables: layer x kind of tensor, for every expert of a `layerwise` merge.

    layers: 30                      # of the output model
    experts:
      arithmetic:                   # the model as in the recipe, or the last part of its path
        default: 0.5                # a weight, or {weight: 0.5, density: 0.8}
        embedding: 0.0              # outside the layers: embedding, final_norm, head, other
        layers:
          0-9:   {attention: 0.9, mlp: 0.2}
          10-29: {q: 0.4, attention: 0.6, all: {weight: 0.1, density: 0.5}}

For a tensor of layer l and kind k the most exact word counts: k, then its group (attention, mlp),
then `all`, then `default`; weight and density are looked up each for itself. The format is ours;
the paper does not give one.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_unconstrained.config.document import Document, Place
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.numerics.roles import GROUPS, LAYER_KINDS, OUTER_KINDS, Role

LAYER_WORDS = (*LAYER_KINDS, *GROUPS)
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


@dataclass(frozen=True)
class Coefficients:
    """A cell of a table; None where it says nothing."""

    weight: float | None = None
    density: float | None = None

    def over(self, other: Coefficients) -> Coefficients:
        """This cell, filled up from a less exact one."""
        return Coefficients(
            other.weight if self.weight is None else self.weight,
            other.density if self.density is None else self.density,
        )


@dataclass(frozen=True)
class ExpertTable:
    """One expert's cells: `outer` by kind, `inner` by (layer, word)."""

    default: Coefficients = Coefficients()
    outer: dict[str, Coefficients] = field(default_factory=dict)
    inner: dict[tuple[int, str], Coefficients] = field(default_factory=dict)

    def lookup(self, role: Role) -> Coefficients:
        """What the table says for a tensor of this role."""
        result = Coefficients()
        for word in role.keys:
            if role.layer is None:
                found = self.outer.get(word)
            else:
                found = self.inner.get((role.layer, word))
            if found is not None:
                result = result.over(found)
        return result.over(self.default)


@dataclass(frozen=True)
class Table:
    """A whole coefficient file."""

    layers: int
    experts: dict[str, ExpertTable]
    document: Document

    def key_for(self, model: str) -> str | None:
        """The table's name for a model of the recipe: the same words, or its last path part."""
        if model in self.experts:
            return model
        short = short_name(model)
        return short if short in self.experts else None

    def lookup(self, model: str, role: Role) -> Coefficients:
        """The cell for one expert and tensor; empty for an expert the table does not name."""
        key = self.key_for(model)
        return self.experts[key].lookup(role) if key is not None else Coefficients()


def short_name(model: str) -> str:
    """The last part of a model's path, or of its adapter's: `a/base+b/math` -> `math`."""
    last = model.rpartition("+")[2] if "+" in model else model
    return last.partition("@")[0].rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def load_table(path: str) -> Table:
    """Read and check a coefficient file (YAML or JSON); cached until the file changes.

    path: of the file, or the text of a table itself, which has more than one line.
    """
    if "\n" in path:
        return _parsed(path)
    try:
        stat = Path(path).stat()
    except OSError:
        return _read(path)
    return _cached(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> Table:
    return parse_table(Document.parse(text, "the table in the recipe"))


@functools.lru_cache(maxsize=8)
def _cached(path: str, _mtime: int, _size: int) -> Table:
    return _read(path)


def _read(path: str) -> Table:
    return parse_table(Document.read(path, "coefficient table"))


def parse_table(document: Document) -> Table:
    """A table from its document; RecipeError names the place and the nearest right word."""
    data = document.data
    if not isinstance(data, dict):
        document.fail((), "a coefficient table is a mapping with `layers` and `experts`")
    for key in data:
        if key not in ("layers", "experts"):
            document.fail((key,), f"no such key. {suggest(key, ('layers', 'experts'))}")
    layers, experts = data.get("layers"), data.get("experts")
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        document.fail(("layers",), "must be the model's number of layers, a whole number")
    if not isinstance(experts, dict) or not experts:
        document.fail(("experts",), "must map every expert to its coefficients")
    return Table(
        layers=layers,
        experts={
            str(name): _expert(document, ("experts", name), value, layers)
            for name, value in experts.items()
        },
        document=document,
    )


def _expert(document: Document, place: Place, value: Any, layers: int) -> ExpertTable:
    if not isinstance(value, dict):
        return ExpertTable(default=_cell(document, place, value))
    default, outer, inner = Coefficients(), {}, {}
    for key, cell in value.items():
        here = (*place, key)
        if key == "layers":
            inner = _layers(document, here, cell, layers)
        elif key == "default":
            default = _cell(document, here, cell)
        elif key in OUTER_KINDS:
            outer[key] = _cell(document, here, cell)
        elif key in LAYER_WORDS:
            document.fail(here, f"{key!r} is a kind inside the layers; put it below `layers:`")
        else:
            known = ("default", "layers", *OUTER_KINDS)
            hint = suggest(key, known)
            if key in ("weight", "density"):
                hint = "Write `default: {weight: ..., density: ...}`."
            document.fail(here, f"no such key. {hint}")
    return ExpertTable(default, outer, inner)


def _layers(
    document: Document, place: Place, value: Any, layers: int
) -> dict[tuple[int, str], Coefficients]:
    if not isinstance(value, dict):
        document.fail(place, 'must map layers (3 or "4-7") to kinds of tensor')
    cells: dict[tuple[int, str], Coefficients] = {}
    origin: dict[tuple[int, str], Any] = {}
    for key, row in value.items():
        here = (*place, key)
        match = _RANGE.fullmatch(str(key).strip())
        if match is None:
            document.fail(here, 'is not a layer or a range of layers such as 3 or "4-7"')
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            document.fail(here, f"is an empty range; {last}-{first} is meant?")
        if last >= layers:
            document.fail(here, f"reaches beyond the last layer ({layers - 1})")
        for word, cell in row.items() if isinstance(row, dict) else (("all", row),):
            if word not in LAYER_WORDS:
                if word in OUTER_KINDS:
                    document.fail((*here, word), f"{word!r} belongs beside `layers:`, not below it")
                document.fail((*here, word), f"no such kind. {suggest(word, LAYER_WORDS)}")
            parsed = _cell(document, (*here, word) if isinstance(row, dict) else here, cell)
            for layer in range(first, last + 1):
                if (layer, word) in cells:
                    document.fail(
                        (*here, word),
                        f"layer {layer} has a value for {word!r} already, from "
                        f"{origin[layer, word]}",
                    )
                cells[layer, word], origin[layer, word] = parsed, key
    return cells


def _cell(document: Document, place: Place, value: Any) -> Coefficients:
    if not isinstance(value, dict):
        return Coefficients(weight=_number(document, place, value))
    for key in value:
        if key not in ("weight", "density"):
            document.fail((*place, key), f"no such key. {suggest(key, ('weight', 'density'))}")
    weight, density = value.get("weight"), value.get("density")
    if weight is None and density is None:
        document.fail(place, "says nothing: give a number, or a `weight`, a `density` or both")
    return Coefficients(
        weight=None if weight is None else _number(document, (*place, "weight"), weight),
        density=None
        if density is None
        else _number(document, (*place, "density"), density, 0.0, 1.0),
    )


def _number(
    document: Document,
    place: Place,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
) -> float:
    # PyYAML reads 5e-6 as a string; it is a number.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        document.fail(place, f"must be a number, not {value!r}")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        document.fail(place, f"must be a number, not {str(value)[:40]!r}")
    if not math.isfinite(number) or not low <= number <= high:
        bounds = f" between {low:g} and {high:g}" if math.isfinite(low) else ""
        document.fail(place, f"must be a finite number{bounds}, not {value!r}")
    return number
