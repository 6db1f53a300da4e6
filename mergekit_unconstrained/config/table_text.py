"""A coefficient table as text that people like to read and edit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from mergekit_unconstrained.numerics.roles import GROUPS, LAYER_KINDS

_ORDER = ("q", "k", "v", "o", "qkv", "attention", "norm", *LAYER_KINDS, "mlp", "all")


def dump_table(data: Mapping[str, Any], comment: str = "", *, join: bool = True) -> str:
    """A coefficient file's text: a line a layer, equal neighbours as ranges.

    All numbers have as many decimals as the longest needs, four at most, so that columns line up.

    data: as starting_table returns it (layers as numbers, a cell a number or a mapping). comment:
    any text, put in front line by line. join: write kinds of a group that agree as the group; right
    where the data names every kind that the model has.
    """
    lines = [f"# {_printable(line)}".rstrip() for line in comment.splitlines()]
    lines += [f"layers: {data['layers']}", "experts:"]
    digits = max(map(_decimals, _numbers(data["experts"])), default=1)
    for name, expert in data["experts"].items():
        lines.append(f"  {_scalar(name)}:")
        outer = {k: v for k, v in expert.items() if k != "layers"}
        lines += [f"    {key}: {_cell(value, digits)}" for key, value in outer.items()]
        rows = _ranges({n: _row(row, digits, join) for n, row in expert.get("layers", {}).items()})
        if rows:
            width = max(len(key) for key in rows) + 1
            lines.append("    layers:")
            lines += [f"      {key + ':':<{width}} {{{row}}}" for key, row in rows.items()]
    return "\n".join(lines) + "\n"


def _row(row: Mapping[str, Any], digits: int, join: bool) -> str:
    """`attention: 0.5, mlp: 0.2`: one word for the kinds of a group that agree, with `join`."""
    cells = {kind: _cell(value, digits) for kind, value in row.items()}
    for group in ("all", "attention", "mlp") if join else ():
        members = [kind for kind in cells if kind in GROUPS[group]]
        taken = set(GROUPS) if group == "all" else {group}
        if len(members) > 1 and not taken & set(cells) and len({cells[k] for k in members}) == 1:
            cells = {group: cells[members[0]]} | {
                kind: cell for kind, cell in cells.items() if kind not in members
            }
    return ", ".join(f"{word}: {cells[word]}" for word in sorted(cells, key=_ORDER.index))


def _ranges(rows: Mapping[int, str]) -> dict[str, str]:
    """Layers with equal rows that follow each other, as `4-7`."""
    runs: list[tuple[int, int, str]] = []
    for layer, row in sorted(rows.items()):
        if runs and runs[-1][1] == layer - 1 and runs[-1][2] == row:
            runs[-1] = (runs[-1][0], layer, row)
        else:
            runs.append((layer, layer, row))
    return {str(a) if a == b else f"{a}-{b}": row for a, b, row in runs}


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_cell(v, digits)}" for k, v in value.items()) + "}"
    return f"{round(float(value), digits) + 0.0:.{digits}f}"  # + 0.0: no -0.0


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
    else:
        yield float(value)


def _decimals(number: float) -> int:
    return max(len(f"{number:.4f}".rstrip("0").partition(".")[2]), 1)


def _scalar(name: str) -> str:
    """A YAML key, quoted where it must be."""
    if re.fullmatch(r"[A-Za-z_][\w./+@-]*", name, re.ASCII) and yaml.safe_load(name) == name:
        return name
    return yaml.safe_dump(name, default_style='"', allow_unicode=True, width=math.inf).rstrip()


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in line)
