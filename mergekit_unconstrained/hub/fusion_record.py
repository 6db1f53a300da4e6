"""What a fused model's folder says of itself: recipe, settings, curves, card, figures as JSON."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_unconstrained.catalog import entry_for
from mergekit_unconstrained.compat import MergeOptions
from mergekit_unconstrained.config.parents import Parent, weight_files
from mergekit_unconstrained.engine.digest import BackgroundDigests
from mergekit_unconstrained.fusion.plan import FusionPlan, Member, MergedGroup
from mergekit_unconstrained.fusion.scores import Score
from mergekit_unconstrained.fusion.settings import settings_text
from mergekit_unconstrained.fusion.workdir import Stage
from mergekit_unconstrained.hub import card, curves, facts, licences, record
from mergekit_unconstrained.hub.names import display_name
from mergekit_unconstrained.hub.pinning import pinned_recipe

SETTINGS = "fuse.yml"
CURVES = "losses.png"
FACTS = "fusion.json"


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
    parents = {parent.name: parent for _, parent in plan.parents}
    recipe = pinned_recipe(plan.document, parents, False, SETTINGS)
    (folder / record.RECIPE).write_text(recipe, encoding="utf-8")
    # The work folder is this machine's business, and may be an absolute path.
    settings = settings_text(plan.settings.model_copy(update={"work_dir": None}))
    (folder / SETTINGS).write_text(settings, encoding="utf-8")
    (folder / FACTS).write_text(json.dumps(_facts(made, scores), indent=2) + "\n", encoding="utf-8")
    if not options.write_model_card:
        return
    histories = curves.histories(made.trained, made.sft)
    if histories:
        curves.draw(histories, folder / CURVES, title)
    found = _card(plan, made, folder, title, digests, scores, seconds, recipe)
    card.write(folder, found)


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
    found["held_out_bits_per_byte"] = {name: vars(score) for name, score in scores.items()}
    return found


def _public(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results without what only this machine understands, and without its clock's."""
    hidden = ("feed", "report", "summary", "folder", "model")
    timed = ("tokens_per_second", "outside_forward")
    return {k: v for k, v in results.items() if k not in (*hidden, *timed)}


def _card(
    plan: FusionPlan,
    made: Stages,
    folder: Path,
    title: str,
    digests: BackgroundDigests,
    scores: Mapping[str, Score],
    seconds: float,
    recipe: str,
) -> facts.CardFacts:
    spec = plan.method.spec
    entry = entry_for(spec.name)
    method = facts.Method(
        name=spec.name,
        pretty_name=spec.pretty_name or spec.name,
        summary=entry.summary if entry else "",
        paper=entry.paper if entry else "",
        url=spec.reference_url or "",
    )
    data = made.data.results
    fusion = facts.Fusion(
        pivot=plan.pivot.name,
        dataset=display_name(plan.dataset, Path(plan.dataset).expanduser().exists()),
        conversations=int(data["conversations"]),
        held_out=int(data["held_out"]),
        left_out=dict(data["report"]["left_out"]),
        teachers=tuple(_teacher(m, made) for m in plan.sources),
        training=_training(plan, made),
        curves=CURVES if (folder / CURVES).exists() else None,
        groups=tuple(_group(g) for g in plan.groups),
        settings_name=SETTINGS,
    )
    return facts.CardFacts(
        title=title,
        method=method,
        parents=tuple(_parent(parent, role, digests) for role, parent in plan.parents),
        recipe=recipe,
        command=_command(plan),
        versions=record.versions((*record.PACKAGES, "tokenizers")),
        outputs=tuple(record.file_facts(f) for f in weight_files(folder)),
        tokenizer=plan.pivot.name,
        chat_template=record.has_chat_template(folder),
        seconds=round(seconds, 1),
        fusion=fusion,
        evaluation=tuple(
            facts.Score("held-out responses", "bits per byte", name, s.bits_per_byte, s.stderr, s.n)
            for name, s in scores.items()
        ),
        unknown=_unknown(plan),
    )


def _command(plan: FusionPlan) -> str:
    """What to run, and the file that it needs beside the recipe."""
    command = shlex.join(["mergekit-yaml", record.RECIPE, "OUT"])
    if not plan.settings_path:
        return command
    needed = f"# {record.RECIPE} needs {SETTINGS} of this folder in the current directory"
    return f"{needed}\n{command}"


def _unknown(plan: FusionPlan) -> tuple[str, ...]:
    """What a reader has to know of licences, and which task scores were not measured."""
    found = [
        "How good this model is at tasks: only the likelihood of held-out responses was measured."
    ]
    return (*found, *licence_warnings(plan))


def licence_warnings(plan: FusionPlan) -> tuple[str, ...]:
    """A sentence for every teacher whose licence says something about learning from it."""
    found = []
    for role, parent in plan.parents:
        name = display_name(parent.name, parent.commit is None)
        warning = licences.distillation(name, record.licence(parent.folder))
        if warning and role != "pivot":
            found.append(warning)
    return tuple(found)


def _teacher(member: Member, made: Stages) -> facts.Teacher:
    alignment = made.alignments[member.name].results
    shares: list[dict[str, float]] = [stage.results["won"] for stage in made.targets.values()]
    won = next((s for s in shares if member.name in s), {})
    return facts.Teacher(
        name=member.name,
        licence=record.licence(member.parent.folder),
        weight=member.weight,
        coverage=alignment.get("coverage"),
        label_consistency=alignment.get("label_consistency"),
        won=won.get(member.name),
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
        found["targets merged by"] = s.post_merge
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


def _parent(parent: Parent, role: str, digests: BackgroundDigests) -> facts.Parent:
    return facts.Parent(
        role=role,
        model=record.source_of(parent, digests),
        adapter=record.adapter_of(parent, digests),
        architecture=str((getattr(parent.config, "architectures", None) or [""])[0]),
        parameters=record.parameters_of(parent),
    )
