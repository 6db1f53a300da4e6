"""Job B, distribution fusion: stages in a work folder, then one output folder as of any merge.

    check -> plan -> data -> distributions -> alignment -> targets -> training -> merge -> card

Whatever ends a run, the next one with the same recipe goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_unconstrained import __version__, compat, present
from mergekit_unconstrained.compat import MergeConfiguration, MergeMethod, MergeOptions
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.engine import staging
from mergekit_unconstrained.engine.digest import BackgroundDigests
from mergekit_unconstrained.engine.plan import make_plan
from mergekit_unconstrained.errors import OutputError, RecipeError
from mergekit_unconstrained.fusion import stages
from mergekit_unconstrained.fusion.models import LocalModel, identity_of
from mergekit_unconstrained.fusion.plan import FusionPlan, Member, plan_fusion
from mergekit_unconstrained.fusion.scores import Score
from mergekit_unconstrained.fusion.stages import Run
from mergekit_unconstrained.fusion.workdir import WorkDir, hashed, safe
from mergekit_unconstrained.hub import fusion_record
from mergekit_unconstrained.hub.access import check_access
from mergekit_unconstrained.jobs.publishing import Publication, without_keys
from mergekit_unconstrained.jobs.weights import RunMerge, apply_adapters, files_hash, merge_into
from mergekit_unconstrained.present import bars
from mergekit_unconstrained.present import fusion as display

STEPS = ("collect", "align", "target", "train", "merge")
"""What `mergekit-unconstrained fuse STEP` may stop after."""


def plan(
    document: Document, config: MergeConfiguration, method: MergeMethod, options: MergeOptions
) -> FusionPlan:
    """Check a recipe and say what it would do."""
    found = plan_fusion(document, config, method, options)
    if found.settings.post_merge == "none" and len(trainings(found)) > 1:
        raise RecipeError(
            "`post_merge: none` leaves one model for every source, and the output is one model: "
            "name one source, use `pairing: joint`, or choose a merge"
        )
    return found


def show(plan: FusionPlan, out: Path | None) -> None:
    """Print a plan: models, data, stages with sizes and times."""
    display.print_plan(plan, out)


def run(
    run_merge: RunMerge,
    method: MergeMethod,
    config: MergeConfiguration,
    out: Path,
    options: MergeOptions,
    document: Document,
) -> None:
    """Carry out a recipe of `distribution_fusion`."""
    found = plan(document, config, method, options)
    if found.job.dry_run:
        show(found, out)
        return
    fuse(found, out, options, run_merge)


def trainings(plan: FusionPlan) -> list[tuple[Member, ...]]:
    """The sources of every target that is trained: one each, or all together."""
    if plan.settings.pairing == "joint":
        return [plan.sources]
    return [(source,) for source in plan.sources]


def fuse(
    plan: FusionPlan,
    out: Path,
    options: MergeOptions,
    run_merge: RunMerge,
    until: str = "merge",
    publication: Publication | None = None,
) -> None:
    """Run the stages that are not there yet, up to `until`, and put the result in place.

    publication: what is asked for, where that was checked already.
    """
    started = time.monotonic()
    if publication is None:
        publication = publication_of(plan, options)
        if until == "merge":
            publication.check(card=options.write_model_card)
    plan = dataclasses.replace(plan, document=without_keys(plan.document))
    if until == "merge":
        if publication.goes_on(out):
            publication.push(out)
            return
        staging.check_out(out)
    if until in ("train", "merge"):
        check_checkpoint_pushes(plan, options.quiet)
    for warning in fusion_record.licence_warnings(plan):
        display.warn(warning)
    work = WorkDir(plan.work_dir(out))
    # Groups that were merged for this very run lie in the folder already.
    with work.locked(plan.settings.resume or bool(plan.groups)), display.without_other_bars():
        run = located(plan, options, work)
        made = run_stages(run, until)
        if until == "merge":
            finish(run, made, out, options, run_merge, started, publication)
    if not options.quiet:
        display.print_stages(work, made.all())
        if until == "merge":
            display.print_summary(plan, out, time.monotonic() - started)
    if until == "merge":
        publication.push(out)


def publication_of(plan: FusionPlan, options: MergeOptions) -> Publication:
    """What a recipe says of publishing; the job is known by recipe, settings, models and data."""
    pivots = {"pivot", *(f"base of {group.name}" for group in plan.groups[:1])}
    merged = tuple(parent for role, parent in plan.parents if role in pivots)
    teachers = tuple(parent for role, parent in plan.parents if role not in pivots)
    data = Path(plan.dataset).expanduser()
    identity = {
        "recipe": without_keys(plan.document).data,
        "settings": plan.settings.model_dump(mode="json", exclude={"work_dir", "resume"}),
        "files": files_hash((*merged, *teachers)),
        "data": [data.stat().st_size, data.stat().st_mtime_ns] if data.exists() else None,
        "version": __version__,
    }
    return Publication(plan.job, hashed(identity), merged, teachers, options.quiet)


def check_checkpoint_pushes(plan: FusionPlan, quiet: bool) -> None:
    """Before anything is trained: whether `training: {push_to_hub: true}` will be let."""
    training = plan.settings.training
    if not training.get("push_to_hub"):
        return
    names = ["+".join(safe(m.name) for m in members) for members in trainings(plan)]
    for name in (*names, *(("sft",) if plan.settings.sft_baseline else ())):
        repo_id = str(stages.pushed_as(plan, name)["hub_model_id"])
        with present.status(f"asking the Hub about {repo_id}", quiet):
            check_access(repo_id, private=training.get("hub_private_repo", True) is not False)


def located(plan: FusionPlan, options: MergeOptions, work: WorkDir) -> Run:
    """Every model in a folder here: fetched where it is on the Hub, its adapter applied."""
    models = [local_model(m, plan, options) for m in plan.members]
    return Run(
        plan=plan,
        pivot=models[0],
        sources=tuple(models[1:]),
        work=work,
        progress=bars.quiet if options.quiet else bars.progress,
        quiet=options.quiet,
    )


def local_model(member: Member, plan: FusionPlan, options: MergeOptions) -> LocalModel:
    """A member whose files are here."""
    reference = member.parent.reference
    plain = compat.ModelReference(model=reference.model)
    with present.status(f"fetching {member.parent.name}", options.quiet):
        folder = Path(plain.local_path(options.transformers_cache))
    weights = folder
    if reference.lora is not None:
        adapted = apply_adapters([member.parent], options)
        assert adapted.lora_merge_cache is not None
        weights = compat.merge_adapter(reference, Path(adapted.lora_merge_cache), adapted)
    files = [f for f in weights.iterdir() if f.suffix in (".safetensors", ".bin", ".json")]
    return LocalModel(
        name=member.name,
        weights=weights,
        tokenizer_folder=folder,
        identity=identity_of(files),
        max_length=plan.settings.max_length,
        chat_template=member.chat_template,
        weight=member.weight,
    )


def run_stages(run: Run, until: str) -> fusion_record.Stages:
    """Every stage up to `until`; those that are there already are taken as they are."""
    data = stages.prepare_data(run)
    needed = [*((run.pivot,) if run.needs_pivot else ()), *run.sources]
    found = fusion_record.Stages(data=data)
    for model in needed:
        found.distributions[model.name] = stages.collect(run, data, model)
    if until == "collect":
        return found
    for source in run.sources:
        found.alignments[source.name] = stages.align(
            run, data, source, found.distributions[source.name]
        )
    if until == "align":
        return found
    by_name = {m.name: m for m in run.sources}
    own = found.distributions.get(run.pivot.name)
    for members in trainings(run.plan):
        sources = [by_name[m.name] for m in members]
        parts = {m.name: (found.distributions[m.name], found.alignments[m.name]) for m in sources}
        target = stages.targets(run, data, own, parts)
        found.targets[stages.target_name(sources)] = target
        if until != "target":
            job = stages.training_job(run, target, sources)
            found.trained[stages.target_name(sources)] = stages.train(run, *job)
    if until != "target" and run.settings.sft_baseline:
        first = next(iter(found.targets.values()))
        found.sft = stages.train(run, *stages.training_job(run, first, (), sft=True))
    return found


# -- the merge of the targets ---------------------------------------------------------------------


def finish(
    run: Run,
    made: fusion_record.Stages,
    out: Path,
    options: MergeOptions,
    run_merge: RunMerge,
    started: float,
    publication: Publication,
) -> None:
    """Put the only target, or the merge of several, into OUT with its card."""
    plan = run.plan
    parents = [parent for _, parent in plan.parents]
    digests = BackgroundDigests(f for p in parents for f in (*p.weight_files, *p.adapter_files))
    models = {name: stages.model_of(stage) for name, stage in made.trained.items()}
    identity = hashed({"trained": [s.key for s in made.trained.values()], "recipe": plan.document})
    try:
        with staging.staged(out, identity) as partial:
            if len(models) == 1:
                (only,) = models.values()
                shutil.copytree(only, partial, dirs_exist_ok=True)
            else:
                merge_targets(run, models, partial, options, run_merge)
            scores = dev_scores(run, made, partial)
            seconds = time.monotonic() - started
            fusion_record.describe(plan, made, partial, out.name, digests, scores, seconds, options)
            publication.note(partial)
    finally:
        digests.close()


def merge_targets(
    run: Run,
    models: dict[str, Path],
    folder: Path,
    options: MergeOptions,
    run_merge: RunMerge,
) -> None:
    """Merge several targets by the recipe of job A that is written to WORK/merge.yml."""
    text = targets_recipe(run, models, options)
    path = run.work.root / "merge.yml"
    path.write_text(text, encoding="utf-8")
    document = Document.parse(text, str(path))
    config = MergeConfiguration.model_validate(document.data)
    method = compat.get(config.merge_method)
    merge_into(folder, run_merge, make_plan(document, config, method, options), options)


def targets_recipe(run: Run, models: dict[str, Path], options: MergeOptions) -> str:
    """The recipe: the pivot as base, the targets as experts."""
    kind = run.settings.post_merge
    weights = {m.name: m.weight for m in run.sources}
    total = sum(weights.get(name, 1.0) for name in models) or 1.0
    experts = [
        {
            "model": str(folder.absolute()),
            "parameters": {"weight": weights.get(name, 1.0) / total},
        }
        for name, folder in models.items()
    ]
    parameters: dict[str, Any] = {"operator": "task_arithmetic" if kind == "layerwise" else kind}
    if kind in ("sce", "sce_dense"):
        parameters["select_topk"] = 0.1  # FuseChat
    if kind == "ties":
        for expert in experts:
            expert["parameters"] = {**expert["parameters"], "density": 0.2}  # type: ignore[dict-item]
    if kind == "layerwise":
        table = energy_table(run, list(models.values()), options)
        parameters["coefficients"] = str(table.absolute())
    recipe = {
        "merge_method": "layerwise",
        "base_model": str(run.pivot.weights.absolute()),
        "models": experts,
        "parameters": parameters,
        "dtype": pivot_dtype(run.plan.pivot.parent),
    }
    return yaml.safe_dump(recipe, sort_keys=False)


def energy_table(run: Run, targets: Sequence[Path], options: MergeOptions) -> Path:
    """`post_merge: layerwise`: weights by the energy of each task vector, layer by kind (ours)."""
    from mergekit_unconstrained.jobs.tables import starting_table as table_text

    base = str(run.pivot.weights.absolute())
    models = [base, *(str(t.absolute()) for t in targets)]
    path = run.work.root / "coefficients.yml"
    path.write_text(table_text(models, "energy", options.lora_merge_cache), encoding="utf-8")
    return path


def pivot_dtype(pivot: Parent) -> str:
    """The dtype most of the pivot's weights are stored in."""
    names = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    stored = [h.dtype for h in (pivot.tensors or {}).values() if h.dtype in names]
    return names[max(set(stored), key=stored.count)] if stored else "bfloat16"


def dev_scores(run: Run, made: fusion_record.Stages, result: Path) -> dict[str, Score]:
    """Bits per byte on the held-out conversations, of every model there is.

    result: the folder with the finished weights, scored last and not kept.
    """
    if not made.data.results["held_out"]:
        return {}
    found: dict[str, Score] = {}
    for model in run.models:
        stage = made.distributions.get(model.name)
        known = stage.results["held_out"] if stage is not None else None
        role = "pivot" if model is run.pivot else "source"
        scored = Score(**known) if known else stages.held_out_score(run, made.data, model)
        found[f"{role} {model.name}"] = scored
    trained = {"SFT on the same data": made.sft} if made.sft is not None else {}
    if len(made.trained) > 1:
        trained |= {f"target of {name}": stage for name, stage in made.trained.items()}
    for name, stage in trained.items():
        model = run.as_pivot(name, stages.model_of(stage))
        found[name] = stages.held_out_score(run, made.data, model)
    own = run.as_pivot("this model", result)
    found[own.name] = stages.held_out_score(run, made.data, own, keep=False)
    return found


# -- looking at what is there ---------------------------------------------------------------------


def work_of(plan: FusionPlan, out: Path) -> WorkDir:
    """The work folder, which must exist."""
    work = WorkDir(plan.work_dir(out))
    if not work.root.is_dir():
        raise OutputError(f"{work.root} does not exist: nothing was begun for this output")
    return work


def status(plan: FusionPlan, out: Path) -> None:
    """Print every stage that was begun."""
    work = work_of(plan, out)
    display.print_stages(work, [folder for folder, _ in work.stages()])


def inspect(
    plan: FusionPlan, out: Path, options: MergeOptions, row: int | None, positions: int
) -> None:
    """Print one conversation, position by position, for every source."""
    run = located(plan, options, work_of(plan, out))
    with run.work.locked(), display.without_other_bars():
        made = run_stages(run, "align")
    for source in run.sources:
        stage = made.distributions[source.name]
        shown = stages.inspection(run, made.data, source, stage, made.alignments[source.name], row)
        display.print_inspection(run.pivot, source, shown, positions)
