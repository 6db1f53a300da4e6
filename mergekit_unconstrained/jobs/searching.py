"""Job C, the search of coefficients.

check -> plan -> live model -> studies -> finalists on development -> test, once -> job A -> OUT

All state lies in OUT.search: the storage, the finalists' scores, the test scores, the recipe that
was found. Whatever ends a search, the same command goes on with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.storages import BaseStorage

from mergekit_unconstrained import __version__, compat
from mergekit_unconstrained.compat import MergeConfiguration, MergeOptions
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.parents import read_parent
from mergekit_unconstrained.engine import staging
from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.engine.plan import Plan, make_plan
from mergekit_unconstrained.errors import OutputError, RecipeError
from mergekit_unconstrained.evaluation.configured import ConfiguredTask
from mergekit_unconstrained.evaluation.records import Split
from mergekit_unconstrained.evaluation.splits import check_disjoint, fitness_refused
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.evaluation.task import Task
from mergekit_unconstrained.hub import search_report
from mergekit_unconstrained.hub.facts import CHOSEN_ON, DataSet
from mergekit_unconstrained.hub.pinning import clean
from mergekit_unconstrained.hub.publication import read as noted
from mergekit_unconstrained.jobs.publishing import Publication, without_keys
from mergekit_unconstrained.jobs.weights import apply_adapters, files_hash, run_job
from mergekit_unconstrained.present import search as display
from mergekit_unconstrained.present.bars import progress
from mergekit_unconstrained.search.finals import Chosen, Kept, choose, test
from mergekit_unconstrained.search.memory import LiveMerge
from mergekit_unconstrained.search.run import (
    LABELS,
    SEARCHED,
    Searcher,
    Spaces,
    fixing_unused,
)
from mergekit_unconstrained.search.samplers import grid_points
from mergekit_unconstrained.search.settings import GenomeSettings, SearchSettings, read_file
from mergekit_unconstrained.search.space import Candidate, Space, make_space
from mergekit_unconstrained.search.stock import stock_recipe
from mergekit_unconstrained.search.study import Study, open_storage

POLL_SECONDS = 2.0
LATER: tuple[Split, ...] = ("development", "test")


@dataclass(frozen=True)
class SearchPlan:
    """A checked search file.

    document: of the search file. spaces: before unused genes are fixed. merge: the plan of the
    start candidate, which every other one shares but for its numbers.
    """

    document: Document
    settings: SearchSettings
    tasks: tuple[Task, ...]
    spaces: Spaces
    merge: Plan
    job: str

    @property
    def studies(self) -> list[str]:
        """The search and its baselines, in the order in which they run."""
        return [SEARCHED, *self.settings.baselines]


def work_of(out: Path) -> Path:
    """Where a search for `out` keeps its state."""
    return out.with_name(out.name + ".search")


def plan_search(path: Path, options: MergeOptions, **changes: Any) -> SearchPlan:
    """Check a search file against models and tasks, before a weight is read.

    changes: settings that the command line overrides; None says nothing.
    """
    settings, document, tasks = read_file(path, changes)
    _check_tasks(document, settings, tasks)
    recipe = settings.recipe
    method = compat.get(str(recipe.get("merge_method", "")))
    if isinstance(method, compat.ModelMethod):
        document.fail(("recipe", "merge_method"), f"{method.spec.name} has no numbers to search")
    if "models" not in recipe:
        document.fail(("recipe",), "needs `models`; slices are the search's own")
    first = recipe.get("base_model") or recipe["models"][0]["model"]
    reference = compat.ModelReference.parse(str(first))
    config = read_parent(reference, trust_remote_code=options.trust_remote_code).config
    layers = int(getattr(config, "num_hidden_layers", 0))
    if not layers:
        document.fail(("recipe",), f"the config of {first} does not say how many layers it has")

    def space(genome: GenomeSettings) -> Space:
        tied = bool(getattr(config, "tie_word_embeddings", False))
        return make_space(document, recipe, method, layers, genome, tied_head=tied)

    uniform = settings.genome.model_copy(
        update={"layers": 0, "kinds": (), "outer": "tied", "smooth": False}
    )
    spaces = Spaces(
        space(settings.genome),
        tied=space(uniform.model_copy(update={"models": "tied"})),
        free=space(uniform),
    )
    _check_grid(document, settings, spaces.searched)
    merge = merge_plan(document, spaces.searched, options)
    return SearchPlan(document, settings, tasks, spaces, merge, _job(settings, tasks, merge))


def _check_grid(document: Document, settings: SearchSettings, space: Space) -> None:
    genes = len(space.genome)
    if settings.sampler == "grid" and grid_points(space.genome, settings.budget) < 2:
        document.fail(
            ("sampler",) if ("sampler",) in document.lines else (),
            f"a grid of {genes} numbers takes {2**genes:,} candidates at least, and the budget is "
            f"{settings.budget}: search fewer numbers, or with another sampler",
        )


def _check_tasks(
    document: Document, settings: SearchSettings, tasks: Sequence[ConfiguredTask]
) -> None:
    if not any("search" in t.splits() and t.weight > 0 for t in tasks):
        document.fail(("tasks",), "no task has a `search` split: nothing could be optimised")
    check_disjoint(tasks)
    if not settings.allow_test_split:
        for task in tasks:
            fitness_refused(task)


def merge_plan(document: Document, space: Space, options: MergeOptions) -> Plan:
    """The plan of job A for the start of the genome; what is wrong is named in the search file."""
    made = Document.parse(space.candidate(space.genome.start).in_one(), document.name)
    lines = {place[1:]: n for place, n in document.lines.items() if place[:1] == ("recipe",)}
    recipe = dataclasses.replace(made, lines=lines, spans={})
    config = MergeConfiguration.model_validate(recipe.data)
    return make_plan(recipe, config, compat.get(config.merge_method), options)


def write_candidate(candidate: Candidate, folder: Path) -> Document:
    """merge.yml, and coefficients.yml where the method has a table; the recipe as a document."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "coefficients.yml"
    if candidate.table is not None:
        with replacing(table) as stream:
            stream.write(candidate.table.encode())
    text = candidate.text(str(table))
    with replacing(folder / "merge.yml") as stream:
        stream.write(candidate.text().encode())
    return Document.parse(text, str(folder / "merge.yml"))


def _job(settings: SearchSettings, tasks: Sequence[Task], merge: Plan) -> str:
    """What the scores in a storage depend on; not the budget, which may grow."""
    free = {"budget", "time", "finalists", "baselines", "batch_size", "memory", "device"}
    content = [
        settings.model_dump(mode="json", exclude=free),
        digest_of([t for t in tasks if t.weight > 0], "search"),
        files_hash((merge.base, *merge.experts)),
        __version__,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def digest_of(tasks: Sequence[Task], split: Split) -> str:
    """What the scores on a split depend on beside the model: rules, examples, weights of tasks."""
    content = [
        [t.name, t.key, t.weight, [[e.id, e.digest] for e in t.examples(split)]]
        for t in tasks
        if split in t.splits()
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# -- running --------------------------------------------------------------------------------------


def search(
    path: Path,
    out: Path,
    options: MergeOptions,
    *,
    storage: str | None = None,
    dry_run: bool = False,
    **changes: Any,
) -> None:
    """Run a search, or go on with it, and write OUT."""
    started = time.monotonic()
    if "job" not in noted(out):  # a finished one may have to be published yet
        _check_out(out)
    plan = plan_search(path, options, **changes)
    parents = (plan.merge.base, *plan.merge.experts)
    publication = Publication(plan.merge.job, plan.job, parents, quiet=options.quiet)
    display.print_plan(plan)
    if dry_run:
        publication.warn()
        return
    publication.check(card=options.write_model_card)
    if publication.goes_on(out):
        publication.push(out)
        return
    _check_out(out)
    work = work_of(out)
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as note, keeping(work):
        staging.lock(note, work)
        searcher = prepare(plan, options)
        opened = open_storage(storage, work / "journal.log")
        studies = run_studies(plan, searcher, opened, shared=storage is not None, lead=True)
        kept = {
            split: Kept(work / f"{split}.json", plan.job + digest_of(plan.tasks, split))
            for split in LATER
        }
        chosen = choose(searcher, studies, kept["development"], progress)
        tested = test(searcher, chosen, kept["test"], progress)
        found = search_report.gather(searcher, studies, chosen, tested)
        write(plan, searcher, chosen[SEARCHED], found, out, options, publication)
    display.print_summary(found, out, time.monotonic() - started)


@contextmanager
def keeping(work: Path) -> Iterator[None]:
    """Say what is kept when the disk is full."""
    try:
        yield
    except OSError as error:
        if not staging.disk_full(error):
            raise
        raise OutputError(
            f"the disk is full: make room and run the same command again; {work} keeps every "
            "candidate that was finished"
        ) from error


def _check_out(out: Path) -> None:
    """As of any merge; a finished search says how to go on with it."""
    work = work_of(out)
    if out.is_dir() and any(out.iterdir()) and (work / "journal.log").is_file():
        raise OutputError(
            f"{out} is the result of a finished search. {work} keeps every candidate: remove {out} "
            "alone to go on with a larger --budget, or name another folder"
        )
    staging.check_out(out)


def work_along(
    path: Path, out: Path, options: MergeOptions, *, storage: str | None, **changes: Any
) -> None:
    """Evaluate candidates of a search that another process leads, until its budget is spent."""
    plan = plan_search(path, options, **changes)
    searcher = prepare(plan, options)
    opened = open_storage(storage, work_of(out) / "journal.log")
    run_studies(plan, searcher, opened, shared=True, lead=False)


def prepare(plan: SearchPlan, options: MergeOptions) -> Searcher:
    """The live model, the parents in memory, and the genes that change something."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    s = plan.settings
    options = apply_adapters((plan.merge.base, *plan.merge.experts), options)
    compat.forget_loaders()
    base = plan.merge.base
    subject = Subject.load(
        str(base.folder or base.name),
        dtype=s.dtype or "auto",
        device=s.device or "auto",
        batch_size=s.batch_size,
    )
    live = live_merge(plan.merge, subject, options, s.memory)
    given = plan.spaces
    spaces = Spaces(*(fixing_unused(one, live) for one in (given.searched, given.tied, given.free)))
    if not len(spaces.searched.genome):
        raise RecipeError(
            f"{plan.document.name}: no expert differs from the base where the genome is"
        )
    display.print_genome(spaces.searched, live)
    subject.weights = ""
    return Searcher(s, spaces, live, subject, plan.tasks)


def live_merge(merge: Plan, subject: Subject, options: MergeOptions, memory: float) -> LiveMerge:
    """The parents of a merge, read as far as a share of this machine's memory holds them."""
    config, parents = merge.config, (merge.base, *merge.experts)
    architecture = compat.get_architecture_info(config, options)
    out_config = compat.output_config(config, architecture, options.trust_remote_code)
    headers = {p.reference: p.tensors for p in parents if p.tensors is not None}

    def planner(config: MergeConfiguration) -> list[compat.PlannedTask]:
        return compat.plan_tasks(config, architecture, options, out_config, headers)

    budget = int(psutil.virtual_memory().available * memory)
    with progress("reading the parents", len(merge.tensors)) as advance:
        load = compat.stored_tensors(options)
        return LiveMerge(merge, subject.model, load, planner, budget, advance)


# -- studies --------------------------------------------------------------------------------------


def run_studies(
    plan: SearchPlan, searcher: Searcher, storage: BaseStorage, *, shared: bool, lead: bool
) -> dict[str, Study]:
    """The search, then every baseline with as many candidates as the search had.

    shared: whether other processes may be at work. lead: whether this one gives up what the dead
    left behind.
    """
    s = plan.settings
    studies: dict[str, Study] = {}
    for name in plan.studies:
        budget = len(studies[SEARCHED].trials) if studies else s.budget
        study = searcher.study(name, storage, plan.job, budget)
        deadline = math.inf
        if s.time and not studies:  # what earlier runs of the same search took counts
            spent = math.fsum(f.seconds for f in study.finished)
            deadline = time.monotonic() + s.time - spent
        studies[name] = study
        if lead:
            study.open()
        if lead and name == SEARCHED:
            if not study.trials:
                with progress("the first candidate", searcher.objective.size) as advance:
                    study.run(1, searcher.evaluate(name, advance), deadline=deadline)
            display.print_estimate(plan, study)
        with display.search_bar(LABELS[name], study, budget, searcher.objective.size) as bar:
            while True:
                if lead:
                    study.abandon(study.stale if shared else lambda _: True)
                evaluate = searcher.evaluate(name, bar.examples)
                study.run(budget, evaluate, deadline=deadline, done=bar.trial)
                if lead and time.monotonic() >= deadline:
                    study.close()  # workers know of no time limit
                if not study.unfinished:
                    break
                time.sleep(POLL_SECONDS)  # other workers are at the last candidates
                bar.refresh()
    return studies


# -- the result -----------------------------------------------------------------------------------


def write(
    plan: SearchPlan,
    searcher: Searcher,
    chosen: Chosen,
    found: search_report.Report,
    out: Path,
    options: MergeOptions,
    publication: Publication,
) -> None:
    """OUT: the merged model with its card, the recipe that makes it, and the report."""
    candidate = searcher.spaces.searched.candidate(chosen.values)
    document = write_candidate(candidate, work_of(out) / "best")
    config = MergeConfiguration.model_validate(document.data)

    texts = {"merge.yml": candidate.in_one()}
    if candidate.table is not None:
        stock = stock_recipe(make_plan(document, config, plan.merge.method, options))
        texts |= {"stock_merge.yml": stock} if stock is not None else {}
    parents = {p.name: p for p in (plan.merge.base, *plan.merge.experts)}

    def finishing(folder: Path) -> None:
        for name, text in texts.items():
            own = without_keys(Document.parse(text, name)).text or text
            (folder / name).write_text(clean(own, parents), encoding="utf-8")
        search_report.write(found, folder)

    run_job(
        compat.run_merge, plan.merge.method, config, out, options, document,
        finishing=finishing,
        data=[_data(task) for task in plan.tasks],
        publication=publication,
    )  # fmt: skip


def _data(task: Task) -> DataSet:
    """What the provenance says of a task: its splits by size, all its examples by hash."""
    splits = {split: task.examples(split) for split in task.splits()}
    digests = [example.digest for found in splits.values() for example in found]
    return DataSet(
        name=task.name,
        role=CHOSEN_ON,
        sha256=hashlib.sha256(" ".join(digests).encode()).hexdigest(),
        hashed="examples",
        rows={split: len(found) for split, found in splits.items()},
    )
