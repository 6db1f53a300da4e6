"""What people see of a search: what will be searched, its progress, the result."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mergekit_unconstrained.hub.search_report import Report
from mergekit_unconstrained.present import console, duration, size
from mergekit_unconstrained.search.memory import LiveMerge
from mergekit_unconstrained.search.run import LABELS, SEARCHED
from mergekit_unconstrained.search.samplers import population, uniform_count
from mergekit_unconstrained.search.space import Space
from mergekit_unconstrained.search.study import Finished, Study


def print_plan(plan: Any) -> None:
    """Method, genome, tasks and cost. plan: jobs.searching.SearchPlan."""
    s, genome = plan.settings, plan.spaces.searched.genome
    name = plan.merge.method.spec.name
    experts = ", ".join(e.name for e in plan.merge.experts)
    console.print(f"[bold]search[/] of {escape(name)} over {escape(experts)}", highlight=False)
    drawn = s.population or population(len(genome))
    ways = f"{s.sampler}, population {drawn}" if s.sampler in ("cma", "nsga2") else s.sampler
    console.print(f"  genome     {len(genome)} numbers; {ways}, seed {s.seed}", highlight=False)
    if first := _uniform_first(plan):
        console.print(
            f"  start      the first {min(first, s.budget)} of {s.budget} candidates are uniform "
            "merges, the others finer",
            highlight=False,
        )
    for parameter in dict.fromkeys(g.address[1] for g in genome.genes):
        found = [g for g in genome.genes if g.address[1] == parameter]
        first = found[0]
        console.print(
            f"    {escape(parameter)}: {len(found)} from {first.low:g} to {first.high:g}, "
            f"start {first.start:g}",
            highlight=False,
        )
    for task in plan.tasks:
        counts = ", ".join(f"{split} {len(task.examples(split))}" for split in task.splits())
        line = f"  task       {task.name} ({task.unit}, weight {task.weight:g}): {counts}"
        console.print(escape(line), highlight=False)
    studies = [LABELS[name] for name in plan.studies]
    scored = [t for t in plan.tasks if "search" in t.splits() and t.weight > 0]
    examples = sum(len(t.examples("search")) for t in scored)
    limit = f", or {duration(s.time)} of search" if s.time else ""
    console.print(
        f"  cost       {len(studies)} studies ({'; '.join(studies)}) x {s.budget} candidates x at "
        f"most {examples} examples{limit}",
        highlight=False,
    )
    console.print("  time       told when the first candidate is scored", highlight=False)
    console.print(f"  memory     {_memory(plan)}", highlight=False)
    for note in notes(plan):
        console.print(f"  [yellow]note[/]       {escape(note)}", highlight=False)


def _uniform_first(plan: Any) -> int:
    """How many uniform candidates come first; only CMA-ES begins with them."""
    s = plan.settings
    return uniform_count(plan.spaces.searched.genome, s) if s.sampler == "cma" else 0


def _memory(plan: Any) -> str:
    """Weights that a search holds: the live model, and the parents as far as they may be held."""
    numbers = sum(math.prod(t.shape) for t in plan.merge.tensors if t.shape is not None)
    width = {"bfloat16": 2, "float16": 2}.get(plan.settings.dtype, 4)
    room = int(psutil.virtual_memory().available * plan.settings.memory)
    told = (
        f"live model {size(numbers * width)} (half on an accelerator, unless `dtype` says), "
        f"parents {size(plan.merge.in_bytes)}"
    )
    if plan.merge.in_bytes > room:
        told += f", of which {size(room)} are held and the rest is read anew for every candidate"
    return told


def notes(plan: Any) -> list[str]:
    """What a plan's owner may not have meant."""
    s, genes = plan.settings, len(plan.spaces.searched.genome)
    found = []
    if _uniform_first(plan) >= s.budget:
        found.append(
            f"every one of the {s.budget} candidates is a uniform merge, and none has values of "
            "its own for a layer or kind: raise the budget, or lower `uniform_first`"
        )
    if genes > s.budget / 3:
        found.append(
            f"{genes} numbers are many for {s.budget} candidates: share them between more layers "
            "(`genome: {layers: 4}`), or raise the budget"
        )
    scored = [t for t in plan.tasks if "search" in t.splits() and t.weight > 0]
    units = dict.fromkeys(t.unit for t in scored)
    if len(units) > 1 and s.sampler != "nsga2":
        found.append(
            f"the tasks' scores ({', '.join(units)}) are averaged as they are, so that one with a "
            "wide range outweighs the others: set `weight`, 0 for a task that is only reported"
        )
    return found


def print_genome(space: Space, live: LiveMerge) -> None:
    """What is left of the genome, and what is held in memory."""
    fixed = f", {len(space.genome.fixed)} more change nothing" if space.genome.fixed else ""
    anew = f", {live.read_anew} of them read anew for each" if live.read_anew else ""
    console.print(
        f"  searched   {len(space.genome)} numbers{fixed}; {len(live.held)} tensors are merged for "
        f"every candidate{anew}, {live.fixed} never change",
        highlight=False,
    )


def print_estimate(plan: Any, study: Study) -> None:
    """How long the candidates will take, by those of the search that were scored in full."""
    s = plan.settings
    whole = [f.seconds for f in study.finished if not f.dropped and not f.failure]
    if not whole:
        return
    each = statistics.median(whole)
    left = s.budget - len(study.finished) + len(s.baselines) * s.budget
    limit = f" (the search itself ends after {duration(s.time)})" if s.time else ""
    early = ", and less where some are dropped early" if s.racing.enabled else ""
    console.print(
        f"  time       a candidate takes {f'{each:.2g} s' if each < 1 else duration(each)}: the "
        f"{left} left are {duration(left * each)} at most, this machine as busy as now{early}"
        f"{limit}; finalists and test split come on top",
        highlight=False,
    )


class SearchBar:
    """One line of a study: candidates, best, mean, evaluations a minute, time left."""

    def __init__(self, bar: Progress, label: str, study: Study, budget: int, examples: int) -> None:
        self._bar = bar
        self._label = label
        self._study = study
        self._examples = examples
        self._seen = 0
        self._done = 0
        self._started = time.monotonic()
        self._task = bar.add_task(escape(label), total=budget, state="")
        self.refresh()

    def examples(self, count: int) -> None:
        """Told how many more examples of the running candidate are scored."""
        self._seen += count

    def trial(self, _: Finished) -> None:
        """Told of every finished candidate."""
        self._done += 1
        self.refresh()

    def refresh(self) -> None:
        """Draw the line from the storage."""
        finished = self._study.finished
        whole = [f.value for f in finished if not f.failure]
        best = self._study.best
        parts = []
        if best is not None:
            parts.append(f"best {best.value:.4f}, mean {sum(whole) / len(whole):.4f}")
        minutes = (time.monotonic() - self._started) / 60
        if self._done:
            rate = self._done / minutes
            parts.append(f"{rate:.1f} a minute")
            total = self._bar.tasks[self._task].total or 0
            if total > len(finished):
                parts.append(f"{duration((total - len(finished)) / rate * 60)} left")
        failed = sum(bool(f.failure) for f in finished)
        if failed:
            parts.append(f"{failed} failed")
        self._bar.update(self._task, completed=len(finished), state=escape("; ".join(parts)))


@contextmanager
def search_bar(label: str, study: Study, budget: int, examples: int) -> Iterator[SearchBar]:
    """The progress of one study, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield SearchBar(bar, label, study, budget, examples)


def print_summary(report: Report, out: Path, seconds: float) -> None:
    """The table that matters, and what it says."""
    if report.tasks:
        table = Table(
            title="test split, ± one standard error", title_justify="left", box=SIMPLE_HEAD
        )
        table.add_column("model")
        for task in report.tasks:
            table.add_column(escape(f"{task.name}\n{task.unit}, n = {task.n}"), justify="right")
        for model in report.tasks[0].means:
            cells = [
                f"{t.means[model].mean:.3f} ± {t.means[model].error:.3f}" for t in report.tasks
            ]
            style = "bold" if model == LABELS[SEARCHED] else ""
            table.add_row(escape(model), *cells, style=style)
        console.print(table, highlight=False)
        for sentence in report.verdict:
            console.print(escape(sentence), highlight=False)
    console.print(
        f"{escape(str(out))} in {duration(seconds)}; the report is report.md", highlight=False
    )
