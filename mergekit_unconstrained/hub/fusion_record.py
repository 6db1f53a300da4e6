"""What a fused model's folder says of itself: recipe, settings, curves, card, figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_unconstrained.catalog import entry_for
from mergekit_unconstrained.compat import MergeOptions
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.engine.digest import BackgroundDigests, sha256
from mergekit_unconstrained.fusion.data.prepared import dataset_identity
from mergekit_unconstrained.fusion.plan import FusionPlan, Member, MergedGroup
from mergekit_unconstrained.fusion.plan import parameters_by_model as plan_parameters
from mergekit_unconstrained.fusion.scores import Score, paired_error
from mergekit_unconstrained.fusion.settings import settings_text
from mergekit_unconstrained.fusion.workdir import Stage, read_manifest
from mergekit_unconstrained.hub import card, curves, facts, licences, machine, provenance, sources
from mergekit_unconstrained.hub.folder_facts import card_facts
from mergekit_unconstrained.hub.names import display_name
from mergekit_unconstrained.hub.pinning import pinned_recipe, places, portable_file
from mergekit_unconstrained.hub.provenance import Provenance
from mergekit_unconstrained.hub.record import RECIPE, flags
from mergekit_unconstrained.hub.results import FUSION as FACTS

SETTINGS = "fuse.yml"
CURVES = "losses.png"


@dataclass
class Stages:
    """The finished stages of a fusion, by model or by target."""

    data: Stage
    distributions: dict[str, Stage] = field(default_factory=dict)
    alignments: dict[str, Stage] = field(default_factory=dict)
    targets: dict[str, Stage] = field(default_factory=dict)
    trained: dict[str, Stage] = field(default_factory=dict)
    sft: Stage | None = None

    def all(self) -> list[Path]:
        """Their folders, in the order in which they are made."""
        kinds = (self.distributions, self.alignments, self.targets, self.trained)
        made = [self.data, *(stage for kind in kinds for stage in kind.values())]
        return [stage.folder for stage in (*made, *((self.sft,) if self.sft else ()))]

    @property
    def seconds(self) -> float:
        """What they took when they were made, by whatever run."""
        manifests = (read_manifest(folder) for folder in self.all())
        return sum(float(m["seconds"]) for m in manifests if m is not None)


def describe(
    plan: FusionPlan,
    made: Stages,
    folder: Path,
    title: str,
    digests: BackgroundDigests,
    scores: Mapping[str, Score],
    seconds: float,
    options: MergeOptions,
) -> None:
    """Write everything but the weights into a finished output folder.

    scores: bits per byte on the held-out conversations, by what the card calls the model.
    """
    roles = [role for role, _ in plan.parents]
    found = sources.resolved([p for _, p in plan.parents], options.transformers_cache)
    parents = {parent.name: parent for parent in found}
    recipe = pinned_recipe(plan.document, parents, False, SETTINGS)
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    # The work folder is this machine's business, and may be an absolute path.
    settings = settings_text(plan.settings.model_copy(update={"work_dir": None}))
    (folder / SETTINGS).write_text(settings, encoding="utf-8")
    (folder / FACTS).write_text(json.dumps(_facts(made, scores), indent=2) + "\n", encoding="utf-8")
    histories = curves.histories(made.trained, made.sft) if options.write_model_card else []
    if histories:
        curves.draw(histories, folder / CURVES, title)
    names = places(parents.values())
    told = [_parent(p, role, names, digests) for role, p in zip(roles, found, strict=True)]
    licences_of = {p.name: sources.licence(p.folder) for p in found}
    known = _provenance(plan, made, folder, title, seconds, options, licences_of)
    known = known.model_copy(update={"parents": tuple(told)})
    known = provenance.write(folder, known)
    if options.write_model_card:
        card.write(folder, card_facts(folder, known))


def _facts(made: Stages, scores: Mapping[str, Score]) -> dict[str, Any]:
    """Counts and figures of every stage, without paths."""
    kinds: dict[str, Mapping[str, Stage]] = {
        "distributions": made.distributions,
        "alignment": made.alignments,
        "targets": made.targets,
        "training": {**made.trained, **({"sft": made.sft} if made.sft is not None else {})},
    }
    found: dict[str, Any] = {"data": _public(made.data.results)}
    for kind, stages in kinds.items():
        found[kind] = {name: _public(stage.results) for name, stage in stages.items()}
    found["held_out_bits_per_byte"] = _measured(scores)
    return found


def _measured(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """Every model's score, with the standard error of this model's difference to it."""
    own = scores.get(facts.THIS_MODEL)
    found = {}
    for name, score in scores.items():
        found[name] = {k: v for k, v in vars(score).items() if k != "parts"}
        paired = paired_error(own, score) if own is not None and own is not score else None
        if paired is not None:
            found[name]["paired"] = paired
    return found


def _public(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results without what only this machine understands, and without its clock's."""
    hidden = ("feed", "report", "summary", "folder", "model")
    timed = ("tokens_per_second", "outside_forward")
    shown = {k: v for k, v in results.items() if k not in (*hidden, *timed)}
    for part in ("train", "held_out"):
        if isinstance(scored := shown.get(part), Mapping):  # not of every conversation
            shown[part] = {k: v for k, v in scored.items() if k != "parts"}
    return shown


def _provenance(
    plan: FusionPlan,
    made: Stages,
    folder: Path,
    title: str,
    seconds: float,
    options: MergeOptions,
    licences_of: Mapping[str, str | None],
) -> Provenance:
    """All but the parents. licences_of: by the model's name in the recipe."""
    spec = plan.method.spec
    entry = entry_for(spec.name)
    method = facts.Method(
        name=spec.name,
        pretty_name=spec.pretty_name or spec.name,
        summary=entry.summary if entry else "",
        paper=entry.paper if entry else "",
        url=spec.reference_url or "",
    )
    return Provenance(
        title=title,
        method=method,
        parents=(),
        data=(_data(plan, made), *_files(plan)),
        recipe=RECIPE,
        settings=SETTINGS,
        flags=tuple(flags(options)),
        seeds={"settings": plan.settings.seed},
        tokenizer=plan.pivot.name,
        chat_template=sources.has_chat_template(folder),
        fusion=_fusion(plan, made, folder, licences_of),
        versions=machine.versions((*machine.PACKAGES, "tokenizers", "datasets", "accelerate")),
        machine=machine.hardware(),
        seconds=round(max(seconds, made.seconds), 1),
        unknown=(ONLY_LIKELIHOOD if made.data.results["held_out"] else NOTHING_MEASURED,),
    )


ONLY_LIKELIHOOD = (
    "How good this model is at tasks: only the likelihood of held-out responses was measured."
)
NOTHING_MEASURED = "How good this model is: no conversations were held out to measure it on."


def _fusion(
    plan: FusionPlan, made: Stages, folder: Path, licences_of: Mapping[str, str | None]
) -> facts.Fusion:
    data = made.data.results
    return facts.Fusion(
        pivot=plan.pivot.name,
        dataset=display_name(plan.dataset, Path(plan.dataset).expanduser().exists()),
        conversations=int(data["conversations"]),
        held_out=int(data["held_out"]),
        left_out=dict(data["report"]["left_out"]),
        teachers=tuple(_teacher(m, made, licences_of.get(m.parent.name)) for m in plan.sources),
        training=_training(plan, made),
        curves=CURVES if (folder / CURVES).exists() else None,
        groups=tuple(_group(g) for g in plan.groups),
        settings_name=SETTINGS,
        target=plan.settings.target,
        loss=plan.settings.loss,
        post_merge=plan.settings.post_merge if len(made.trained) > 1 else "",
        pairwise=plan.settings.pairing == "pairwise",
        pivot_competes=plan.settings.include_pivot,
    )


def _data(plan: FusionPlan, made: Stages) -> facts.DataSet:
    """The data that was trained on; a Hub id's state is not known."""
    path = Path(plan.dataset).expanduser()
    counts = made.data.results
    rows = {
        "trained on": int(counts["conversations"]) - int(counts["held_out"]),
        "held out": int(counts["held_out"]),
    }
    if not path.exists():
        return facts.DataSet(plan.dataset, facts.TRAINED_ON, hub_id=plan.dataset, rows=rows)
    folder = path if path.is_dir() else path.parent
    return facts.DataSet(
        name=path.name,
        role=facts.TRAINED_ON,
        sha256=dataset_identity(plan.dataset) if path.is_dir() else sha256(path),
        hashed="names and contents of its files" if path.is_dir() else "file",
        licence=sources.licence(folder),
        rows=rows,
        place=portable_file(plan.dataset),
    )


def _files(plan: FusionPlan) -> list[facts.DataSet]:
    """Chat templates and coefficient tables that the recipe takes from files."""
    named = [
        (str(own.get(key) or ""), key.replace("_", " "))
        for own in plan_parameters(plan.document).values()
        for key in ("chat_template", "coefficients")
    ]
    return [
        facts.DataSet(Path(file).name, role, sha256=sha256(Path(file)), place=portable_file(file))
        for file, role in dict.fromkeys(named)
        if file and Path(file).is_file()
    ]


def licence_warnings(plan: FusionPlan) -> tuple[str, ...]:
    """A sentence for every teacher whose licence says something about learning from it."""
    found = []
    for role, parent in plan.parents:
        name = display_name(parent.name, parent.commit is None)
        sources.fetch_card(parent.folder)
        warning = licences.distillation(name, sources.licence(parent.folder))
        if warning and role != "pivot":
            found.append(warning)
    return tuple(found)


WORSE_THAN_CHANCE = 1.0
"""Bits a token above those of a choice at random from which on a source is warned of (ours)."""


def source_warnings(name: str, made: Stages) -> tuple[str, ...]:
    """Sentences about a source that can teach nothing, as far as the stages are made."""
    found = []
    read = made.distributions[name].results
    bits, chance = (read.get(key) for key in ("bits_per_token", "chance_bits_per_token"))
    if bits is not None and chance is not None and bits > chance + WORSE_THAN_CHANCE:
        found.append(
            f"{name} reads the responses worse than chance ({bits:.1f} bits per token, where "
            f"tokens picked at random have {chance:.1f}): another model's tokenizer or chat "
            "template may lie in its folder."
        )
    if _won(name, made) == 0.0:
        found.append(
            f"{name} won none of the sampled conversations: no target comes from it, and what is "
            "trained on them learns nothing of it."
        )
    return tuple(found)


def training_warnings(made: Stages) -> tuple[str, ...]:
    """A sentence for every training after which held-out responses are less likely than before."""
    trained = {**made.trained, **({"sft": made.sft} if made.sft is not None else {})}
    found = []
    for name, stage in trained.items():
        before, after = stage.results.get("bits_per_byte") or (0.0, 0.0)
        if not after <= before:
            found.append(
                f"training {name} made the held-out responses less likely ({before:.4f} -> "
                f"{after:.4f} bits per byte): a lower learning_rate or fewer steps may help."
            )
    return tuple(found)


def _won(name: str, made: Stages) -> float | None:
    """The share of a sample's conversations whose target came from a source."""
    shares: list[dict[str, float]] = [stage.results["won"] for stage in made.targets.values()]
    # Of a mixture nobody wins anything.
    return next((s for s in shares if name in s and "mixture" not in s), {}).get(name)


def _teacher(member: Member, made: Stages, licence: str | None) -> facts.Teacher:
    alignment = made.alignments[member.name].results
    return facts.Teacher(
        name=member.name,
        licence=licence,
        weight=member.weight,
        coverage=alignment.get("coverage"),
        label_consistency=alignment.get("label_consistency"),
        won=_won(member.name, made),
        warnings=source_warnings(member.name, made),
    )


def _training(plan: FusionPlan, made: Stages) -> dict[str, str | int | float]:
    s = plan.settings
    found: dict[str, str | int | float] = {
        "loss": f"{s.lm_loss_weight:g} gold cross-entropy + {1 - s.lm_loss_weight:g} {s.loss}",
        "target": f"{s.target}, per {s.per}, compared in {s.compare.replace('_', ' ')}",
        "alignment": f"{s.alignment}, vocabulary map {s.vocabulary_map}, top {s.top_k}",
        "learning rate": plan.learning_rate,
        "schedule": f"{s.schedule}, warm-up {s.warmup_ratio:g}",
        "conversations a step": s.batch_size,
        "trained": f"a LoRA adapter of rank {plan.lora_rank}" if plan.lora_rank else "all weights",
        "seed": s.seed,
    }
    steps = {int(t.results["steps"]) for t in made.trained.values() if "steps" in t.results}
    if steps:
        found["steps"] = max(steps)
    if len(made.trained) > 1:
        found["targets merged by"] = s.post_merge + {
            "sce": f", select_topk {s.post_merge_topk:g}",
            "sce_dense": f", select_topk {s.post_merge_topk:g}",
            "ties": f", density {s.post_merge_density:g}",
        }.get(s.post_merge, "")
    if s.shuffle_source:
        found["control"] = "the sources' distributions were shuffled over conversations"
    return found


def _group(group: MergedGroup) -> facts.Group:
    def shown(parent: Parent) -> str:
        return display_name(parent.name, parent.commit is None)

    return facts.Group(
        name=group.name,
        base=shown(group.base) if group.base is not None else None,
        models=tuple(shown(m) for m in group.models),
    )


def _parent(
    parent: Parent, role: str, names: Mapping[str, str], digests: BackgroundDigests
) -> facts.Parent:
    return facts.Parent(
        role=role,
        model=sources.source_of(parent, names, digests),
        adapter=sources.adapter_of(parent, names, digests),
        architecture=sources.architecture_of(parent),
        parameters=sources.parameters_of(parent),
    )
