"""What a finished merge says of itself: pinned recipe, table, heat map, provenance, card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_unconstrained.catalog import entry_for
from mergekit_unconstrained.compat import MergeOptions
from mergekit_unconstrained.config.grid import ExpertGrid, Grid, build_grid, summary
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.config.recipe import HUB_KEYS
from mergekit_unconstrained.config.table import short_name
from mergekit_unconstrained.engine.digest import BackgroundDigests
from mergekit_unconstrained.engine.plan import VARIES, Plan
from mergekit_unconstrained.hub import card, facts, machine, provenance, sources
from mergekit_unconstrained.hub.folder_facts import card_facts
from mergekit_unconstrained.hub.names import display_name
from mergekit_unconstrained.hub.pinning import TABLE, clean, pinned_recipe, places
from mergekit_unconstrained.hub.provenance import Provenance

RECIPE = "mergekit_config.yml"  # the name that other tools look for
HEATMAP = "coefficients.png"
NO_TOKENIZER = "Which tokenizer to use: the base had none to copy, so this folder has none."
CHANGING_FLAGS = (
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "trust_remote_code",
    "lora_merge_dtype",
    "random_seed",
)
"""mergekit's options that change what comes out, or whether it does."""
HOW = {"engine", "memory_budget", "verify"}
"""Job options that say how, and change nothing of what comes out."""


def resolved(plan: Plan, options: MergeOptions) -> Plan:
    """A plan whose parents are known as they lie here after the merge."""
    found = sources.resolved((plan.base, *plan.experts), options.transformers_cache)
    return dataclasses.replace(plan, base=found[0], experts=tuple(found[1:]))


def lay_out(plan: Plan, folder: Path, title: str, options: MergeOptions) -> None:
    """Write what belongs to the weights: the pinned recipe, the table, the heat map.

    plan: as `resolved` gives it.
    """
    parents = {p.name: p for p in (plan.base, *plan.experts)}
    recipe = pinned_recipe(plan.document, parents, plan.table is not None)
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    if plan.table is not None:
        table = clean(plan.table.document.text or "", parents)
        (folder / TABLE).write_text(table, encoding="utf-8")
    cells = (c for expert in plan.coefficients.values() for c in expert.values())
    entry = entry_for(plan.method.spec.name)
    weighs = entry is None or entry.weighs
    if options.write_model_card and weighs and any(c.weight is not None for c in cells):
        from mergekit_unconstrained.hub import heatmap  # matplotlib takes most of a second

        heatmap.draw(grid_of(plan), folder / HEATMAP, title)


def describe(
    plan: Plan,
    folder: Path,
    title: str,
    digests: BackgroundDigests,
    seconds: float,
    options: MergeOptions,
    data: Sequence[facts.DataSet] = (),
    written: Mapping[str, str] | None = None,
) -> None:
    """Write provenance and card into a folder that holds everything else.

    digests: of plan.files. seconds: what the merge took. data: what the coefficients were chosen
    on. written: sha256 of the output's weight files where it is known already.
    """
    parents = (plan.base, *plan.experts)
    names = places(parents)
    known = Provenance(
        title=title,
        method=_method(plan),
        parents=tuple(_parent(p, plan, names, digests) for p in parents),
        data=tuple(data),
        recipe=RECIPE,
        coefficients=TABLE if plan.table is not None else None,
        heatmap=HEATMAP if (folder / HEATMAP).is_file() else None,
        weights={name: _weights(expert) for name, expert in grid_of(plan).experts.items()},
        flags=tuple(flags(options)),
        seeds=_seeds(plan, options),
        tokenizer=_tokenizer(plan, folder),
        chat_template=sources.has_chat_template(folder),
        dtype=", ".join(sorted({t.dtype for t in plan.tensors})),
        versions=machine.versions(),
        machine=machine.hardware(),
        seconds=round(seconds, 1),
        unknown=() if any(folder.glob("token*")) else (NO_TOKENIZER,),
    )
    known = provenance.write(folder, known, written or {})
    if options.write_model_card:
        card.write(folder, card_facts(folder, known))


def grid_of(plan: Plan) -> Grid:
    """The resolved coefficients of a plan, under short names where these tell the experts apart."""
    short = {name: short_name(name) for name in plan.coefficients}
    if len(set(short.values())) < len(short):
        short = {name: display_name(name) for name in short}
    if len(set(short.values())) < len(short):
        short = {name: name for name in short}
    return build_grid(plan.roles, {short[n]: cells for n, cells in plan.coefficients.items()})


def _method(plan: Plan) -> facts.Method:
    spec = plan.method.spec
    entry = entry_for(spec.name)
    operator = plan.shared.get("operator")
    named = [p for p in spec.shared_parameters if p.name not in ("operator", "coefficients")]
    given = [p for p in named if plan.shared.get(p.name) != p.default]
    shown = {p.name: _plain(plan.shared[p.name]) for p in given}
    if operator == VARIES:
        shown["operator"] = VARIES
    return facts.Method(
        name=spec.name,
        pretty_name=spec.pretty_name or spec.name,
        summary=entry.summary if entry else "",
        paper=entry.paper if entry else "",
        url=spec.reference_url or "",
        operator=str(operator) if operator and operator != VARIES else None,
        parameters=shown | plan.job.model_dump(exclude_defaults=True, exclude={*HUB_KEYS, *HOW}),
        defaults={p.name: _plain(p.default) for p in named if p not in given},
    )


def flags(options: MergeOptions) -> list[str]:
    """The command-line options without which the same recipe would give something else."""
    flags = []
    for name in CHANGING_FLAGS:
        value = getattr(options, name)
        if value != type(options).model_fields[name].default:
            flag = "--" + name.replace("_", "-")
            flags += [flag] if value is True else [flag, str(value)]
    return flags


def _plain(value: Any) -> str | int | float | bool | None:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _parent(
    parent: Parent, plan: Plan, names: dict[str, str], digests: BackgroundDigests
) -> facts.Parent:
    is_base = parent is plan.base
    thinned = grid_of(plan).has_densities
    grid = build_grid(plan.roles, {"": plan.coefficients.get(parent.name, {})})
    return facts.Parent(
        role="base" if is_base else "expert",
        model=sources.source_of(parent, names, digests),
        adapter=sources.adapter_of(parent, names, digests),
        weight="" if is_base else summary(grid.experts[""]),
        density="" if is_base or not thinned else summary(grid.experts[""], "density"),
        architecture=sources.architecture_of(parent),
        parameters=sources.parameters_of(parent),
    )


def _weights(expert: ExpertGrid) -> dict[str, list[float | None]]:
    """By kind of tensor, one mean weight a layer."""
    layers = max((layer for layer, _ in expert.inner), default=-1) + 1
    found: dict[str, list[float | None]] = {}
    for (layer, kind), cell in expert.inner.items():
        found.setdefault(kind, [None] * layers)[layer] = cell.weight
    return found | {kind: [cell.weight] for kind, cell in expert.outer.items()}


def _seeds(plan: Plan, options: MergeOptions) -> dict[str, int]:
    found = {"recipe": plan.shared.get("seed"), "mergekit": options.random_seed}
    return {name: seed for name, seed in found.items() if isinstance(seed, int)}


def _tokenizer(plan: Plan, folder: Path) -> str:
    if not any(folder.glob("token*")):
        return ""
    config = plan.config
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source in (None, "base"):
        return display_name(str(plan.base.reference.model), plan.base.commit is None)
    return "union of the parents' tokenizers" if source == "union" else display_name(str(source))
