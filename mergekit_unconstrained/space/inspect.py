"""Whether and how models can be merged, seen from config.json and tensor headers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_unconstrained import _activate, compat, present
from mergekit_unconstrained.compat import MergeConfiguration, MergeOptions
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.grid import Grid, build_grid
from mergekit_unconstrained.config.parents import Parent, read_parent
from mergekit_unconstrained.engine.plan import Plan, make_plan
from mergekit_unconstrained.errors import ModelError, UnconstrainedError
from mergekit_unconstrained.hub import licences, sources
from mergekit_unconstrained.numerics.roles import LAYER_KINDS, OUTER_KINDS, role_from_name
from mergekit_unconstrained.space.confine import MAX_MODELS
from mergekit_unconstrained.space.state import Group, State, Way, kinds_of, recipe_text

ASSUMED_ROWS, ASSUMED_TOKENS = 1000, 400
"""Of the data of a fusion, as long as nobody has said which: conversations, tokens in each."""


@dataclass(frozen=True)
class Model:
    """One model: what its config and headers say.

    folder: where these lie; a shadow for a model of the Hub.
    """

    name: str
    parent: Parent
    folder: Path
    licence: str | None

    @property
    def architecture(self) -> str:
        """`LlamaForCausalLM`."""
        names = getattr(self.parent.config, "architectures", None) or []
        return str(names[0]) if names else str(getattr(self.parent.config, "model_type", "?"))

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return sum(math.prod(h.shape) for h in (self.parent.tensors or {}).values())

    @property
    def bytes(self) -> int:
        """Of its weight files."""
        return sum(f.stat().st_size for f in self.parent.weight_files)

    @property
    def dtype(self) -> str:
        """What most of its weights are stored in, as safetensors names it."""
        found = [h.dtype for h in (self.parent.tensors or {}).values()]
        return max(set(found), key=found.count) if found else "?"

    @property
    def layers(self) -> int:
        """How many layers its tensors' names tell of."""
        places = (role_from_name(n).layer for n in self.parent.tensors or {})
        return max((p + 1 for p in places if p is not None), default=0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Attention and MLP, as far as its layers have them."""
        roles = (role_from_name(n) for n in self.parent.tensors or {})
        return kinds_of([r.kind for r in roles if r.layer is not None])


@dataclass(frozen=True)
class Cost:
    """What it takes, in words.

    limit_bytes: of the models and the result, which a limit is held against.
    """

    limit_bytes: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """How these models can be brought together.

    reasons: why they are grouped as they are. problems: what has to be mended first; then there is
    nothing to run. need_base: a group of another architecture lacks the model it came from.
    """

    way: Way
    models: tuple[Model, ...]
    groups: tuple[Group, ...]
    reasons: tuple[str, ...]
    problems: tuple[str, ...]
    licence: licences.Verdict
    need_base: bool = False

    @property
    def folders(self) -> dict[str, str]:
        """Name -> absolute folder: where a plan finds the models."""
        return {m.name: str(m.folder.absolute()) for m in self.models}

    def public(self, text: str) -> str:
        """A message with the models' names in place of their folders."""
        for name, folder in sorted(self.folders.items(), key=lambda item: -len(item[1])):
            text = text.replace(folder, name)
        return text


def look(name: str, folder: Path) -> Model:
    """A model whose folder is known; ModelError when it cannot be read without its own code."""
    _activate.install()
    path = str(folder.absolute())
    reference = compat.ModelReference(model=compat.ModelPath(path=path))
    try:
        parent = read_parent(reference, trust_remote_code=False)
    except UnconstrainedError as error:
        raise ModelError(str(error).replace(path, name)) from None
    return Model(name, parent, folder, sources.licence(folder))


def verdict(base: Model, experts: Sequence[Model], bases: Sequence[Model] = ()) -> Verdict:
    """Group models by the rule that recipes of `unconstrained` follow.

    bases: of groups other than the base model's own; each serves the groups it can be merged with.
    """
    from mergekit_unconstrained.jobs import mixture  # brings datasets and more

    if not experts:
        raise ModelError("choose at least one expert beside the base model")
    if len({m.name for m in (base, *experts)}) < 1 + len(experts):
        raise ModelError("a model is chosen twice")
    if len(experts) + len(bases) + 1 > MAX_MODELS:
        raise ModelError(f"more than {MAX_MODELS} models at once: use the command line for that")
    of = {id(m.parent): m for m in (base, *experts, *bases)}
    heads, found = mixture.grouped(base.parent, [m.parent for m in experts])
    groups, problems, reasons, used = [], [], [], [base, *experts]
    need_base = False
    for index, (head, parents) in enumerate(zip(heads, found, strict=True)):
        members = [of[id(p)] for p in parents]
        own = base if index == 0 and members else None
        if index > 0:
            why = mixture.obstacle(base.parent, head)
            reasons.append(_named(why or "", of.values()))
        if index > 0 and len(members) > 1:
            own = next((b for b in bases if mixture.mergeable(head, b.parent)), None)
            if own is None:
                need_base = True
                problems.append(
                    f"{_listed(members)} share an architecture and are merged first, which needs "
                    "the model they were trained from: choose it under “Bases of other groups”"
                )
            elif own not in used:
                used.append(own)
        groups.append(_group(own, members, of[id(head)]))
    way = _way(groups)
    merged = [m for m in used if way == "layerwise" or m.name in _pivot_names(base, groups[0])]
    teachers = [m for m in used if m not in merged]
    folded = licences.verdict(
        [(m.name, m.licence) for m in merged], [(m.name, m.licence) for m in teachers]
    )
    return Verdict(
        way, tuple(used), tuple(groups), tuple(reasons), tuple(problems), folded, need_base
    )


def _group(own: Model | None, members: Sequence[Model], head: Model) -> Group:
    return Group(
        own.name if own is not None else None,
        tuple(m.name for m in members),
        layers=head.layers,
        kinds=head.kinds,
    )


def _way(groups: Sequence[Group]) -> Way:
    if len(groups) == 1:
        return "layerwise"
    several = bool(groups[0].experts) or any(len(g.experts) > 1 for g in groups)
    return "mixture" if several else "fusion"


def _pivot_names(base: Model, group: Group) -> set[str]:
    return {base.name, *group.experts}


def _named(text: str, models: Any) -> str:
    for model in sorted(models, key=lambda m: -len(str(m.folder.absolute()))):
        text = text.replace(str(model.folder.absolute()), model.name)
    return text.replace(" (or pass --allow-crimes)", "").replace(
        " (to merge them all the same, pass --allow-crimes)", ""
    )


def _listed(models: Sequence[Model]) -> str:
    return " and ".join(m.name for m in models)


# -- planning --------------------------------------------------------------------------------------


def planned(state: State, found: Verdict, name: str = "recipe.yml") -> Document:
    """The recipe of a state with folders for names, as the planners read it."""
    if state.own is None:
        return Document.parse(recipe_text(state.renamed(found.folders)), name)
    document = Document.parse(state.own, name)
    return replace(document, data=_with_folders(document.data, found.folders))


def plan(state: State, found: Verdict) -> Plan:
    """The plan of a merge, every check included that needs no weight."""
    _activate.install()
    document = planned(state, found)
    try:
        config = MergeConfiguration.model_validate(document.data)
        return make_plan(document, config, compat.get("layerwise"), MergeOptions())
    except UnconstrainedError as error:
        raise type(error)(found.public(str(error))) from None


def grid(made: Plan, found: Verdict) -> Grid:
    """The coefficients of a plan, under the names that people chose."""
    return build_grid(made.roles, {found.public(n): c for n, c in made.coefficients.items()})


def cost_of_merge(made: Plan, seconds: Callable[[Plan], float] | None = None) -> Cost:
    """Disk, memory and time of a layer-wise merge. seconds: how its time is estimated."""
    from mergekit_unconstrained.engine import budget
    from mergekit_unconstrained.jobs import weights

    time = (seconds or weights.estimate_seconds)(made)
    return Cost(
        made.in_bytes + made.out_bytes,
        (
            f"disk {present.size(made.out_bytes)} for the result, "
            f"{present.size(made.in_bytes)} for the models",
            f"memory up to {present.size(budget.most_memory(made))} for weights",
            f"time about {present.duration(max(time, 0.1))} for the arithmetic, on this machine",
        ),
    )


def cost_of_fusion(state: State, found: Verdict) -> Cost:
    """Disk, memory and time of a fusion, for data of an assumed size."""
    from mergekit_unconstrained.fusion import estimates
    from mergekit_unconstrained.jobs import fusing, mixture

    _activate.install()
    document = planned(state, found)
    # The data need not be here to say what so much of it would take.
    data = document.data
    data["parameters"] = {**data["parameters"], "dataset": "assumed/data"}
    document = Document("recipe.yml", data)
    config = MergeConfiguration.model_validate(data)
    method = compat.get(str(data["merge_method"]))
    options = MergeOptions()
    try:
        if state.way == "fusion":
            made = fusing.plan(document, config, method, options)
        else:
            mixed = mixture.plan(document, config, method, options)
            assert mixed.fusion is not None
            made = mixed.fusion
    except UnconstrainedError as error:
        raise type(error)(found.public(str(error))) from None
    cost = estimates.costs(made, ASSUMED_ROWS, ASSUMED_ROWS * ASSUMED_TOKENS)
    total = sum(m.bytes for m in found.models)
    return Cost(
        total + cost.disk,
        (
            f"for {ASSUMED_ROWS:,} conversations of {ASSUMED_TOKENS} tokens (assumed; “plan” in a "
            "terminal reads your data):",
            f"disk {present.size(cost.disk)}, {present.size(total)} for the models",
            f"memory about {present.size(cost.memory)} in training",
            f"time about {present.duration(sum(cost.seconds.values()))} on this machine",
        ),
    )


def _with_folders(data: Any, folders: Mapping[str, str]) -> Any:
    """A recipe with folders in place of names, wherever it names a model."""
    if isinstance(data, dict):
        return {
            key: folders.get(value, value)
            if key in ("model", "base_model", "base", "tokenizer_source") and isinstance(value, str)
            else _with_folders(value, folders)
            for key, value in data.items()
        }
    return [_with_folders(v, folders) for v in data] if isinstance(data, list) else data


def group_grids(state: State, found: Verdict) -> Grid | None:
    """The coefficients of all groups that are merged before a fusion, None where none is.

    Groups of different depth share one picture; where one has no layer, its cells are empty.
    """
    from mergekit_unconstrained.jobs import mixture

    if not state.weighed:
        return None
    _activate.install()
    document = planned(state, found)
    data = dict(document.data)
    data["parameters"] = {**data["parameters"], "dataset": "assumed/data"}
    document = Document("recipe.yml", data)
    config = MergeConfiguration.model_validate(data)
    mixed = mixture.plan(document, config, compat.get("unconstrained"), MergeOptions())
    grids = [grid(mixture.weight_plan(g, MergeOptions()), found) for g in mixed.groups if g.recipe]
    if not grids:
        return None
    return Grid(
        layers=max(g.layers for g in grids),
        kinds=tuple(k for k in LAYER_KINDS if any(k in g.kinds for g in grids)),
        outer_kinds=tuple(k for k in OUTER_KINDS if any(k in g.outer_kinds for g in grids)),
        experts={name: cells for g in grids for name, cells in g.experts.items()},
    )
