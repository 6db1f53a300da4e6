"""What a finished folder says of itself: pinned recipe, coefficient table, heat map, card."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_unconstrained import __version__
from mergekit_unconstrained.catalog import entry_for
from mergekit_unconstrained.compat import MergeOptions
from mergekit_unconstrained.config.grid import Grid, build_grid, summary
from mergekit_unconstrained.config.parents import Parent, weight_files
from mergekit_unconstrained.config.table import short_name
from mergekit_unconstrained.engine.digest import BackgroundDigests, sha256
from mergekit_unconstrained.engine.plan import VARIES, Plan
from mergekit_unconstrained.hub import card, facts
from mergekit_unconstrained.hub.names import display_name
from mergekit_unconstrained.hub.pinning import TABLE, clean, pinned_recipe

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
PACKAGES = ("mergekit", "torch", "transformers", "safetensors")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a card says of a search: a sentence, and the scores on its test split."""

    sentence: str
    scores: tuple[facts.Score, ...]


def describe(
    plan: Plan,
    folder: Path,
    title: str,
    digests: BackgroundDigests,
    seconds: float,
    options: MergeOptions,
    found_by: Found | None = None,
    written: Mapping[str, str] | None = None,
) -> None:
    """Write everything but the weights into a finished output folder.

    digests: of plan.files. seconds: what the merge took. found_by: the search that chose the
    coefficients. written: sha256 of the output's files where it is known already.
    """
    parents = {p.name: p for p in (plan.base, *plan.experts)}
    recipe = pinned_recipe(plan.document, parents, plan.table is not None)
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    table = None
    if plan.table is not None:
        table = clean(plan.table.document.text or "", parents)
        (folder / TABLE).write_text(table, encoding="utf-8")
    if options.write_model_card:
        found = card_facts(
            plan, folder, title, digests, seconds, options, recipe, table, written or {}
        )
        if found_by is not None:
            found = dataclasses.replace(
                found, evaluation=found_by.scores, searched=found_by.sentence
            )
        if found.heatmap is not None:
            from mergekit_unconstrained.hub import heatmap  # matplotlib takes most of a second

            heatmap.draw(grid_of(plan), folder / found.heatmap, title)
        card.write(folder, found)


def card_facts(
    plan: Plan,
    folder: Path,
    title: str,
    digests: BackgroundDigests,
    seconds: float,
    options: MergeOptions,
    recipe: str,
    table: str | None,
    written: Mapping[str, str],
) -> facts.CardFacts:
    """Everything the card of a finished folder says; the arguments as in `describe`."""
    has_weights = any(c.weight is not None for e in plan.coefficients.values() for c in e.values())
    return facts.CardFacts(
        title=title,
        method=_method(plan),
        parents=tuple(_parent(p, plan, digests) for p in (plan.base, *plan.experts)),
        recipe=recipe,
        command=shlex.join(["mergekit-yaml", RECIPE, "OUT", *_flags(options)]),
        versions=versions(),
        outputs=tuple(
            facts.WeightFile(f.name, written.get(f.name) or sha256(f), f.stat().st_size)
            for f in weight_files(folder)
        ),
        recipe_name=RECIPE,
        coefficients=table,
        coefficients_name=TABLE,
        heatmap=HEATMAP if has_weights else None,
        tokenizer=_tokenizer(plan, folder),
        chat_template=has_chat_template(folder),
        dtype=", ".join(sorted({t.dtype for t in plan.tensors})),
        seconds=round(seconds, 1),
        unknown=() if any(folder.glob("token*")) else (NO_TOKENIZER,),
    )


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
    shown = {
        p.name: _plain(plan.shared[p.name])
        for p in spec.shared_parameters
        if p.name not in ("operator", "coefficients") and plan.shared.get(p.name) != p.default
    }
    if operator == VARIES:
        shown["operator"] = VARIES
    return facts.Method(
        name=spec.name,
        pretty_name=spec.pretty_name or spec.name,
        summary=entry.summary if entry else "",
        paper=entry.paper if entry else "",
        url=spec.reference_url or "",
        operator=str(operator) if operator and operator != VARIES else None,
        parameters=shown | plan.job.model_dump(exclude_defaults=True, exclude=HOW),
    )


def _flags(options: MergeOptions) -> list[str]:
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


def _parent(parent: Parent, plan: Plan, digests: BackgroundDigests) -> facts.Parent:
    is_base = parent is plan.base
    grid = build_grid(plan.roles, {"": plan.coefficients.get(parent.name, {})})
    return facts.Parent(
        role="base" if is_base else "expert",
        model=source_of(parent, digests),
        adapter=adapter_of(parent, digests),
        weight="" if is_base else summary(grid.experts[""]),
        architecture=str((getattr(parent.config, "architectures", None) or [""])[0]),
        parameters=parameters_of(parent),
    )


def source_of(parent: Parent, digests: BackgroundDigests) -> facts.Source:
    """A parent's model, without its adapter."""
    path = parent.reference.model.path
    local = Path(path).is_dir()
    return facts.Source(
        name=display_name(str(parent.reference.model), local),
        hub_id=None if local else path,
        commit=parent.commit,
        files=tuple(file_facts(f, digests) for f in parent.weight_files),
        licence=licence(parent.folder),
    )


def adapter_of(parent: Parent, digests: BackgroundDigests) -> facts.Source | None:
    """A parent's adapter, None when it has none."""
    adapter = parent.reference.lora
    if adapter is None:
        return None
    local = Path(adapter.path).is_dir()
    return facts.Source(
        name=display_name(str(adapter), local),
        hub_id=None if local else adapter.path,
        files=tuple(file_facts(f, digests) for f in parent.adapter_files),
        licence=licence(Path(adapter.path)) if local else None,
    )


def parameters_of(parent: Parent) -> int | None:
    """The number of a parent's weights, None where its headers are not known."""
    return sum(math.prod(h.shape) for h in (parent.tensors or {}).values()) or None


def file_facts(file: Path, digests: BackgroundDigests | None = None) -> facts.WeightFile:
    """Name, hash and size of a weight file. digests: where its hash is already being computed."""
    digest = digests[file] if digests is not None else sha256(file)
    return facts.WeightFile(name=file.name, sha256=digest, size=file.stat().st_size)


def licence(folder: Path | None) -> str | None:
    """The licence that a model's own card declares."""
    from huggingface_hub import ModelCard

    card_file = folder / "README.md" if folder is not None else None
    if card_file is None or not card_file.exists():  # load() would take the path for a Hub id
        return None
    try:
        declared = ModelCard.load(card_file).data.license
    except Exception:  # a card that cannot be read: not known
        return None
    return str(declared) if declared else None


def _tokenizer(plan: Plan, folder: Path) -> str:
    if not any(folder.glob("token*")):
        return ""
    config = plan.config
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source in (None, "base"):
        return display_name(str(plan.base.reference.model), plan.base.commit is None)
    return "union of the parents' tokenizers" if source == "union" else display_name(str(source))


def has_chat_template(folder: Path) -> bool:
    """Whether a model's folder brings a chat template."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config.get("chat_template")) or (folder / "chat_template.jinja").exists()


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """This package's release, those of others, and Python's."""
    versions = {"mergekit-unconstrained": __version__}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    return versions | {"python": platform.python_version()}
