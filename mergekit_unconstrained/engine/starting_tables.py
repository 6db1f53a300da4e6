"""Coefficient tables to start from, computed from the weights alone (numerics/initial.py).

One tensor is in memory at a time for the base and one for an expert, so the size of a model does
not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from mergekit_unconstrained.config.table import short_name
from mergekit_unconstrained.config.table_text import dump_table
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import ModelError, NonFiniteError, RecipeError
from mergekit_unconstrained.numerics import initial
from mergekit_unconstrained.numerics.roles import OUTER_KINDS, Role

__all__ = ["StartKind", "dump_table", "explain", "starting_table"]

StartKind = Literal["uniform", "energy", "depth"]
Load = Callable[[str, str], torch.Tensor | None]
"""(model, tensor name) -> the tensor, None where the model has no such tensor."""

Place = tuple[int | None, str]
"""(layer, kind), with layer None outside the blocks."""

_EXPLANATIONS: dict[StartKind, str] = {
    "uniform": "weight 1/N everywhere, N = {n} experts",
    "energy": (
        "weight proportional to mean(d^2), d = expert - base, over the tensors of a layer and\n"
        "kind; the weights of the experts add up to 1. VaRM of FuseChat (Wan et al. 2024, arXiv\n"
        "2402.16107) does this tensor by tensor; doing it by layer and kind is ours"
    ),
    "depth": (
        "weight alpha + beta * layer / (L - 1), L = {layers}, alpha = {alpha:g}, beta = {beta:g};\n"
        "alpha outside the layers. LiNeS (Wang et al. 2024, arXiv 2410.17146) on task arithmetic,\n"
        "for which its alpha is 1/N; the paper searches beta, the default 1 - alpha is ours.\n"
        "Operators that divide by the weights (ties, della, linear) cancel equal weights"
    ),
}
_NOT_COMPARABLE = ("embedding", "head")
"""Kinds whose shape may differ between parents: one row a token."""


def starting_table(
    kind: StartKind,
    base: str,
    experts: Sequence[str],
    roles: Mapping[str, Role],
    load: Load,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """The plain data of a coefficient file.

    base, experts: models as in the recipe (`path+adapter` too: `load` decides what that means).
    roles: tensor name -> role, for every tensor of the output. load: called for `energy` only, once
    a tensor and model. alpha, beta: of `depth`; None for 1/N and 1 - alpha. progress: told the
    number of bytes of every tensor read.

    Embeddings and heads whose shapes differ cannot be compared; `energy` gives them 1/N.
    """
    _check_kind(kind)
    if not experts:
        raise RecipeError("a starting table needs at least one expert besides the base model")
    layers = _depth(roles)
    if layers == 0:
        raise ModelError(f"{base} has no layers that could be told apart by their tensors' names")
    n = len(experts)
    a, b = _line(n, alpha, beta)
    places = dict.fromkeys((role.layer, role.kind) for role in roles.values())
    weights: Mapping[Place, Sequence[float]]
    if kind == "energy":
        squares = _squares(base, experts, roles, load, progress)
        weights = {place: initial.energy(squares.get(place, [0.0] * n)) for place in places}
    elif kind == "depth":
        weights = {place: [initial.depth(place[0], layers, a, b)] * n for place in places}
    else:
        weights = {place: [initial.uniform(n)] * n for place in places}
    default = a if kind == "depth" else initial.uniform(n)
    return {
        "layers": layers,
        "experts": {
            name: _expert(default, {place: w[i] for place, w in weights.items()})
            for i, name in enumerate(_names(experts))
        },
    }


def explain(
    kind: StartKind,
    experts: int,
    layers: int,
    alpha: float | None = None,
    beta: float | None = None,
) -> str:
    """How a starting table was computed, for its comment; the arguments as in starting_table."""
    _check_kind(kind)
    a, b = _line(experts, alpha, beta)
    text = _EXPLANATIONS[kind].format(n=experts, layers=layers, alpha=a, beta=b)
    return f"{kind}: {text}."


def _check_kind(kind: str) -> None:
    known = get_args(StartKind)
    if kind not in known:
        raise RecipeError(f"no starting table {kind!r}. {suggest(kind, known)}")


def _line(n: int, alpha: float | None, beta: float | None) -> tuple[float, float]:
    a = initial.uniform(n) if alpha is None else alpha
    return a, 1 - a if beta is None else beta


def _depth(roles: Mapping[str, Role]) -> int:
    counts = [role.layer + 1 for role in roles.values() if role.layer is not None]
    return max([*counts, *(role.depth for role in roles.values())], default=0)


def _names(experts: Sequence[str]) -> list[str]:
    """What the table calls the experts: the last part of their paths where that is enough."""
    short = [short_name(model) for model in experts]
    return short if len(set(short)) == len(short) and all(short) else list(experts)


def _squares(
    base: str,
    experts: Sequence[str],
    roles: Mapping[str, Role],
    load: Load,
    progress: Callable[[int], object],
) -> dict[Place, list[float]]:
    """sum(d_i^2) for every place and expert, over the entries that all models have."""
    sums: dict[Place, list[float]] = {}
    for name, role in roles.items():
        t0 = load(base, name)
        if t0 is None or not t0.is_floating_point():
            continue
        progress(t0.nbytes)
        found = []
        for model in experts:
            ti = load(model, name)
            if ti is None:
                break
            progress(ti.nbytes)
            if ti.shape != t0.shape and role.kind in _NOT_COMPARABLE:
                break
            found.append(_change(model, ti, base, t0, name))
        if len(found) == len(experts):
            before = sums.get((role.layer, role.kind), [0.0] * len(experts))
            sums[role.layer, role.kind] = [x + y for x, y in zip(before, found, strict=True)]
    return sums


def _change(model: str, ti: torch.Tensor, base: str, t0: torch.Tensor, name: str) -> float:
    if ti.shape != t0.shape:
        raise ModelError(
            f"{name} is {tuple(ti.shape)} in {model} and {tuple(t0.shape)} in {base}: only models "
            "of the same architecture and size can be compared tensor by tensor"
        )
    square = initial.squared_change(ti, t0)
    if not math.isfinite(square):
        bad = base if not bool(torch.isfinite(t0).all()) else model
        raise NonFiniteError(f"{name} of {bad} holds NaN or infinity; mend or replace that model")
    return square


def _expert(default: float, weights: Mapping[Place, float]) -> dict[str, Any]:
    layers: dict[int, dict[str, float]] = {}
    for (layer, kind), weight in weights.items():
        if layer is not None:
            layers.setdefault(layer, {})[kind] = weight
    outer = {kind: weights[None, kind] for kind in OUTER_KINDS if (None, kind) in weights}
    return {"default": default, **outer, "layers": dict(sorted(layers.items()))}
