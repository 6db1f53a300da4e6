"""Every method on the same models and tasks, each with the same small budget to tune its numbers.

check -> for each method: tune on `search`, choose on `development`, score `test` once, measure the
merge -> table, plot

OUT holds everything: a folder a method, whose finished parts are not computed again, and at the top
what came of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import torch

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeMethod, MergeOptions
from mergekit_unconstrained.engine import staging
from mergekit_unconstrained.errors import OutputError, UnconstrainedError
from mergekit_unconstrained.evaluation.records import Scored
from mergekit_unconstrained.evaluation.subject import Subject
from mergekit_unconstrained.hub import comparison
from mergekit_unconstrained.hub.comparison import Entry
from mergekit_unconstrained.jobs import searching
from mergekit_unconstrained.jobs.costs import cost_of
from mergekit_unconstrained.jobs.searching import SearchPlan
from mergekit_unconstrained.jobs.weights import apply_adapters
from mergekit_unconstrained.present import comparison as display
from mergekit_unconstrained.present.bars import progress
from mergekit_unconstrained.search.contenders import contenders, genome_for, recipe_for
from mergekit_unconstrained.search.finals import Kept, choose
from mergekit_unconstrained.search.genome import Genome, layer_groups
from mergekit_unconstrained.search.run import SEARCHED, Searcher, Spaces, fixing_unused
from mergekit_unconstrained.search.space import Space, make_space
from mergekit_unconstrained.search.study import open_storage

BUDGET = 16
"""Candidates of every method: enough to leave bad defaults, too few for fine tuning (ours)."""


def compare(
    path: Path,
    out: Path,
    options: MergeOptions,
    *,
    methods: str = "all",
    budget: int | None = None,
    dry_run: bool = False,
    allow_code: bool | None = None,
) -> None:
    """Compare methods on the models and tasks of a search file, and write the table to OUT."""
    started = time.monotonic()
    if out.is_file():
        raise OutputError(f"{out} is a file: name a folder")
    wanted = contenders(methods)
    plan = searching.plan_search(path, options, budget=budget or BUDGET, allow_code=allow_code)
    if not any("test" in t.splits() for t in plan.tasks):
        plan.document.fail(("tasks",), "no task has a `test` split: there is nothing to compare on")
    display.print_plan(plan, wanted)
    if dry_run:
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as note, searching.keeping(out):
        staging.lock(note, out)
        entries = _entries(plan, wanted, out, options)
        found = comparison.Comparison(
            entries=entries,
            units={t.name: t.unit for t in plan.tasks if "test" in t.splits()},
            weights={t.name: t.weight for t in plan.tasks},
            budget=plan.settings.budget,
            seed=plan.settings.seed,
        )
        comparison.write(found, out)
    display.print_summary(found, out, time.monotonic() - started)


def _entries(
    plan: SearchPlan, wanted: Sequence[MergeMethod], out: Path, options: MergeOptions
) -> list[Entry]:
    """The parents, then every method."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    s, base = plan.settings, plan.merge.base
    options = apply_adapters((base, *plan.merge.experts), options)
    compat.forget_loaders()
    subject = Subject.load(
        str(base.folder or base.name),
        dtype=s.dtype or "auto",
        device=s.device or "auto",
        batch_size=s.batch_size,
    )
    subject.weights = ""
    entries = _parents(plan, subject, out, options)
    for index, method in enumerate(wanted, 1):
        display.print_method(method, index, len(wanted))
        try:
            entries.append(_entry(method, plan, subject, out / method.spec.name, options))
        except (UnconstrainedError, RuntimeError, ValueError, ArithmeticError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            entries.append(Entry(method.spec.name, _kind(method), failure=reason[:300]))
            display.print_failure(method, reason)
    return entries


def _kind(method: MergeMethod) -> str:
    return "ours" if compat.is_ours(method) else "mergekit"


def _parents(plan: SearchPlan, subject: Subject, out: Path, options: MergeOptions) -> list[Entry]:
    """Base and experts as they are, on the test split."""
    kept = Kept(out / "parents.json", _job(plan))
    live = None
    found = []
    for parent in (plan.merge.base, *plan.merge.experts):

        def score(name: str = parent.name) -> dict[str, Any]:
            nonlocal live
            live = live or searching.live_merge(plan.merge, subject, options, plan.settings.memory)
            live.write_parent(name)
            searcher = Searcher(plan.settings, plan.spaces, live, subject, plan.tasks)
            return _plain(searcher.score_in_full("test", plan.tasks))

        kind = "base" if parent is plan.merge.base else "expert"
        found.append(Entry(parent.name, kind, scores=_scored(kept.get(parent.name, score))))
    return found


def _entry(
    method: MergeMethod, plan: SearchPlan, subject: Subject, folder: Path, options: MergeOptions
) -> Entry:
    """One method: tuned, chosen, scored on the test split, and measured."""
    given = plan.settings.recipe
    genome = genome_for(method, given, plan.merge.layers)
    s = plan.settings.model_copy(
        update={
            "recipe": recipe_for(method, given),
            # The method's defaults, nine at random, the rest by TPE: CMA-ES would stay near the
            # defaults for as few numbers and candidates as here.
            "sampler": "tpe",
            "baselines": (),
        }
    )
    if genome is not None:
        s = s.model_copy(update={"genome": genome})
        space = make_space(plan.document, s.recipe, method, plan.merge.layers, genome)
    else:
        models = tuple(str(m["model"]) for m in s.recipe["models"])
        empty = Genome((), layer_groups(plan.merge.layers, plan.merge.layers))
        space = Space(s.recipe, empty, plan.merge.layers, models, in_table=False)
    folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(folder / "found.json", _job(plan))

    def tune() -> dict[str, Any]:
        torch.manual_seed(s.seed)  # mergekit's random methods draw from it
        merge = searching.merge_plan(plan.document, space, options)
        live = searching.live_merge(merge, subject, options, s.memory)
        fixed = fixing_unused(space, live) if len(space.genome) else space
        searcher = Searcher(s, Spaces(fixed, fixed, fixed), live, subject, plan.tasks)
        values, value, count = _chosen(searcher, folder, _job(plan))
        torch.manual_seed(s.seed)
        searcher.write(SEARCHED, values)
        scores = _plain(searcher.score_in_full("test", plan.tasks))
        best = fixed.candidate(values)
        searching.write_candidate(best, folder / "best")
        (folder / "merge.yml").write_text(best.in_one(), encoding="utf-8")
        return {"values": values, "value": value, "candidates": count, "scores": scores}

    found = kept.get("tuned", tune)

    def measure() -> dict[str, Any] | None:
        document = searching.write_candidate(
            space.candidate({**space.genome.start, **found["values"]}), folder / "best"
        )
        cost = cost_of(document, options)
        return asdict(cost) if cost is not None else None

    cost = kept.get("cost", measure) or {"seconds": math.nan, "memory": 0}
    return Entry(
        method.spec.name,
        _kind(method),
        values=found["values"],
        search=found["value"],
        candidates=found["candidates"],
        scores=_scored(found["scores"]),
        seconds=cost["seconds"],
        memory=cost["memory"],
    )


def _chosen(
    searcher: Searcher, folder: Path, job: str
) -> tuple[dict[str, float], float | None, int]:
    """The best values of a method, their score on the search split, and how many were tried."""
    if not len(searcher.spaces.searched.genome):
        return {}, None, 1
    budget = searcher.settings.budget
    study = searcher.study(SEARCHED, open_storage(None, folder / "journal.log"), job, budget)
    study.abandon()
    with progress("tuning", budget) as advance:
        advance(len(study.finished))
        study.run(budget, searcher.evaluate(SEARCHED), done=lambda _: advance(1))
    kept = Kept(folder / "development.json", job)
    best = choose(searcher, {SEARCHED: study}, kept, progress)[SEARCHED]
    return best.values, best.value, len(study.finished)


def _job(plan: SearchPlan) -> str:
    """What a method's result depends on: models, tasks on every split, settings, budget."""
    splits = [searching.digest_of(plan.tasks, split) for split in ("development", "test")]
    return "-".join([plan.job, *splits, str(plan.settings.budget)])


def _plain(scores: Mapping[str, Sequence[Scored]]) -> dict[str, Any]:
    return {task: [asdict(one) for one in found] for task, found in scores.items()}


def _scored(plain: Mapping[str, Any]) -> dict[str, list[Scored]]:
    return {task: [Scored(**one) for one in found] for task, found in plain.items()}
