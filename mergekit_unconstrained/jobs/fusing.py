"""Job B, distribution fusion: stages in a work folder, then one output folder as of any merge.

    check -> plan -> data -> distributions -> alignment -> targets -> training -> merge -> card

Whatever ends a run, the next one with the same recipe goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

from mergekit_unconstrained import __version__, present
from mergekit_unconstrained.compat import MergeConfiguration, MergeMethod, MergeOptions
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.engine import staging
from mergekit_unconstrained.engine.digest import BackgroundDigests
from mergekit_unconstrained.errors import OutputError, RecipeError
from mergekit_unconstrained.fusion import stages
from mergekit_unconstrained.fusion.data.prepared import CONVERSATIONS
from mergekit_unconstrained.fusion.estimates import disk_needed
from mergekit_unconstrained.fusion.freshness import outdated
from mergekit_unconstrained.fusion.inspection import inspection
from mergekit_unconstrained.fusion.plan import FusionPlan, Member, plan_fusion
from mergekit_unconstrained.fusion.preview import BYTES_PER_TOKEN, preview
from mergekit_unconstrained.fusion.scores import Score
from mergekit_unconstrained.fusion.stages import Run
from mergekit_unconstrained.fusion.workdir import Stage, WorkDir, hashed, safe
from mergekit_unconstrained.hub import fusion_record
from mergekit_unconstrained.hub.access import check_access
from mergekit_unconstrained.jobs.fast import RunMerge
from mergekit_unconstrained.jobs.fused_targets import merge_targets
from mergekit_unconstrained.jobs.fusion_models import located
from mergekit_unconstrained.jobs.publishing import Publication, without_keys
from mergekit_unconstrained.jobs.weights import files_hash
from mergekit_unconstrained.present import fusion as display
from mergekit_unconstrained.present import size

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
    warn_of_licences(plan)


def examine(plan: FusionPlan) -> None:
    """What `check` does beside planning: read data that lies here, warn of licences.

    DataError and ModelError as a run would have.
    """
    if Path(plan.dataset).expanduser().exists():
        for note in preview(plan).notes:
            display.warn(note)
    warn_of_licences(plan)


def warn_of_licences(plan: FusionPlan, told: str | None = None) -> None:
    """A line for every source whose licence has a word on this use; told: was said already."""
    for warning in fusion_record.licence_warnings(plan):
        if warning not in (told or ""):
            display.warn(warning)


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
        display.print_plan(found, out)
        publication = publication_of(found, options)
        publication.warn()
        warn_of_licences(found, publication.warning)
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
    told = publication.warning if publication is not None else None
    if publication is None:
        publication = publication_of(plan, options)
        if until == "merge":
            publication.check(card=options.write_model_card)
            told = publication.warning
    plan = dataclasses.replace(plan, document=without_keys(plan.document))
    if until == "merge":
        if publication.goes_on(out):
            publication.push(out)
            return
        staging.check_out(out)
    if until in ("train", "merge"):
        check_checkpoint_pushes(plan, options.quiet)
    warn_of_licences(plan, told)
    work = WorkDir(plan.work_dir(out))
    # Groups that were merged for this very run lie in the folder already.
    with work.locked(plan.settings.resume or bool(plan.groups)), display.without_other_bars():
        run = located(plan, options, work)
        made = run_stages(run, until)
        if until == "merge":
            finish(run, made, out, options, run_merge, started, publication)
    for source in plan.sources:
        for warning in fusion_record.source_warnings(source.name, made):
            display.warn(warning)
    for warning in fusion_record.training_warnings(made):
        display.warn(warning)
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


def run_stages(run: Run, until: str) -> fusion_record.Stages:
    """Every stage up to `until`; those that are there already are taken as they are."""
    data = stages.prepare_data(run)
    warn_of_space(run, data)
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


def warn_of_space(run: Run, data: Stage) -> None:
    """Say before the first model is loaded that the disk of the work folder may be too small."""
    manifests = [manifest for _, manifest in run.work.stages()]
    if any(m["finished"] and str(m["stage"]).startswith("train/") for m in manifests):
        return
    text = (data.folder / CONVERSATIONS).stat().st_size
    count = int(data.results["conversations"])
    needed = disk_needed(run.plan, count, int(text / BYTES_PER_TOKEN), text)
    held = sum(f.stat().st_size for f in run.work.root.rglob("*") if f.is_file())
    free = display.free_space(run.work.root)
    if free < needed - held:
        display.warn(
            f"the stages take about {size(needed - held)} more in {run.work.root}, and "
            f"{size(free)} are free there: make room, or set `work_dir` to another disk; a run "
            "that fills the disk can be continued"
        )


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


def work_of(plan: FusionPlan, out: Path) -> WorkDir:
    """The work folder, which must exist."""
    work = WorkDir(plan.work_dir(out))
    if not work.root.is_dir():
        raise OutputError(f"{work.root} does not exist: nothing was begun for this output")
    return work


def status(plan: FusionPlan, out: Path) -> None:
    """Print every stage that was begun, if any was, and which are not what the recipe needs."""
    work = WorkDir(plan.work_dir(out))
    if not work.root.is_dir():
        display.print_nothing_begun(work)
        return
    display.print_stages(work, [f for f, _ in work.stages()], outdated(work, plan))


def inspect(
    plan: FusionPlan, out: Path, options: MergeOptions, row: int | None, positions: int
) -> None:
    """Print one conversation, position by position, for every source."""
    run = located(plan, options, work_of(plan, out))
    with run.work.locked(), display.without_other_bars():
        made = run_stages(run, "align")
    for source in run.sources:
        stage = made.distributions[source.name]
        shown = inspection(run, made.data, source, stage, made.alignments[source.name], row)
        display.print_inspection(run.pivot, source, shown, positions)
