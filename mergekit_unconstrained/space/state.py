"""What a person has chosen, and the recipe that says it: a pure function from one to the other.

Whatever is shown, downloaded, planned or run is read back from that text, so nothing can differ.
A weight is chosen at the start, the middle and the end of the model, for attention and MLP; in
between it is interpolated linearly. That grid is ours, as is the format of the table it becomes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import yaml

from mergekit_unconstrained.config.table_text import dump_table
from mergekit_unconstrained.numerics.roles import GROUPS
from mergekit_unconstrained.numerics.settings import OPERATORS

Way = Literal["layerwise", "fusion", "mixture"]
METHODS: dict[Way, str] = {
    "layerwise": "layerwise",
    "fusion": "distribution_fusion",
    "mixture": "unconstrained",
}
KINDS = ("attention", "mlp")
DIGITS = 4


@dataclass(frozen=True)
class Curve:
    """A weight over depth: in the first layer, half way, in the last."""

    start: float
    middle: float
    end: float

    def at(self, layer: int, layers: int) -> float:
        """The weight of a layer, linear between the three."""
        place = layer / (layers - 1) if layers > 1 else 0.0
        if place <= 0.5:
            return self.start + (self.middle - self.start) * 2 * place
        return self.middle + (self.end - self.middle) * (2 * place - 1)

    @property
    def flat(self) -> float | None:
        """Its one value, None where it has several."""
        return self.start if self.start == self.middle == self.end else None


@dataclass(frozen=True)
class Expert:
    """The sliders of one expert. rest: embeddings, norms, head, and kinds with no slider."""

    name: str
    attention: Curve
    mlp: Curve
    rest: float
    density: float = 1.0

    @classmethod
    def uniform(cls, name: str, weight: float) -> Expert:
        """One weight for everything."""
        return cls(name, Curve(weight, weight, weight), Curve(weight, weight, weight), weight)

    def curves(self, kinds: Sequence[str]) -> dict[str, Curve]:
        """The curves for those of KINDS that a model has."""
        return {k: c for k, c in (("attention", self.attention), ("mlp", self.mlp)) if k in kinds}


@dataclass(frozen=True)
class Group:
    """Models that are merged tensor by tensor; one alone is taken as it is, without a base.

    layers: of each of them. kinds: those of KINDS that their layers have.
    """

    base: str | None
    experts: tuple[str, ...]
    layers: int = 0
    kinds: tuple[str, ...] = KINDS

    @property
    def merged(self) -> bool:
        """Whether there is anything to weigh."""
        return self.base is not None and bool(self.experts)


@dataclass(frozen=True)
class State:
    """Everything chosen. groups[0] is that of the base model (the pivot, where something is fused).

    dataset, max_steps: of a fusion. own: a recipe that somebody wrote; it then counts instead.
    """

    base: str
    way: Way
    groups: tuple[Group, ...]
    experts: Mapping[str, Expert] = field(default_factory=dict)
    operator: str = "task_arithmetic"
    strength: float = 1.0
    dtype: str = "bfloat16"
    dataset: str = "problems.jsonl"
    max_steps: int = 0
    own: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Everything but the base, in the order of the groups."""
        return tuple(name for group in self.groups for name in group.experts)

    @property
    def weighed(self) -> tuple[str, ...]:
        """The experts that have sliders."""
        return tuple(name for group in self.groups if group.merged for name in group.experts)

    def renamed(self, names: Mapping[str, str]) -> State:
        """The same with every model under another name: for planning, where names are paths."""
        of = {**{n: n for n in (self.base, *self.models)}, **names}
        groups = tuple(
            replace(
                group,
                base=of.get(group.base, group.base) if group.base else None,
                experts=tuple(of[name] for name in group.experts),
            )
            for group in self.groups
        )
        experts = {of[n]: replace(e, name=of[n]) for n, e in self.experts.items() if n in of}
        return replace(self, base=of[self.base], groups=groups, experts=experts)


def start(base: str, way: Way, groups: tuple[Group, ...]) -> State:
    """A state with the uniform merge of every group: weight 1/N."""
    experts = {
        name: Expert.uniform(name, round(1 / len(group.experts), DIGITS))
        for group in groups
        if group.merged
        for name in group.experts
    }
    return State(base=base, way=way, groups=groups, experts=experts)


def recipe_text(state: State) -> str:
    """The recipe as YAML, with the table of coefficients inside where one number is not enough."""
    if state.own is not None:
        return state.own
    models = [_model(state, group, name) for group in state.groups for name in group.experts]
    data: dict[str, Any] = {
        "merge_method": METHODS[state.way],
        "base_model": state.base,
        "models": models,
    }
    parameters: dict[str, Any] = {}
    if state.weighed:
        parameters["operator"] = state.operator
    if state.way == "layerwise":
        if state.strength != 1:
            parameters["lambda"] = _number(state.strength)
        table = _table(state, state.groups[0])
        if table is not None:
            parameters["coefficients"] = table
    else:
        parameters["dataset"] = state.dataset
        parameters["max_steps"] = state.max_steps
    data["parameters"] = parameters
    if state.way == "layerwise":
        data["dtype"] = state.dtype
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)


def takes_density(operator: str) -> bool:
    """Whether an operator sparsifies by density."""
    return "density" in OPERATORS[operator].parameters  # type: ignore[index]


def kinds_of(kinds: Sequence[str]) -> tuple[str, ...]:
    """Those of KINDS that stand for at least one of a model's kinds of tensor."""
    return tuple(k for k in KINDS if set(GROUPS[k]) & set(kinds))


def _model(state: State, group: Group, name: str) -> dict[str, Any]:
    """A model's entry: weight and density where no table says them; its base in other groups."""
    own: dict[str, Any] = {}
    if group.merged:
        if group is not state.groups[0]:
            own["base"] = group.base
        table = _table(state, group)
        if table is None:
            expert = state.experts[name]
            own["weight"] = _number(expert.rest)
            if takes_density(state.operator) and expert.density != 1:
                own["density"] = _number(expert.density)
        elif state.way != "layerwise":
            own["coefficients"] = table
    return {"model": name, "parameters": own} if own else {"model": name}


def _table(state: State, group: Group) -> str | None:
    """The group's table, None where every expert has one weight for everything."""
    if not group.merged:
        return None
    experts = [state.experts[name] for name in group.experts]
    if all(_uniform(expert, group.kinds) for expert in experts):
        return None
    data = {
        "layers": group.layers,
        "experts": {e.name: _rows(e, group, takes_density(state.operator)) for e in experts},
    }
    return dump_table(data)


def _rows(expert: Expert, group: Group, density: bool) -> dict[str, Any]:
    default: Any = expert.rest
    if density and expert.density != 1:
        default = {"weight": expert.rest, "density": expert.density}
    if _uniform(expert, group.kinds):
        return {"default": default}
    curves = expert.curves(group.kinds)
    layers = {
        layer: {kind: curve.at(layer, group.layers) for kind, curve in curves.items()}
        for layer in range(group.layers)
    }
    return {"default": default, "layers": layers}


def _uniform(expert: Expert, kinds: Sequence[str]) -> bool:
    return all(curve.flat == expert.rest for curve in expert.curves(kinds).values())


def _number(value: float) -> float:
    return round(float(value), DIGITS) + 0.0


class _Dumper(yaml.SafeDumper):
    """Tables as blocks of text, everything else as usual."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
