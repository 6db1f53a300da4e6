"""What a search found, for people and for programs: report.md, report.json and plots.

The searched merge is compared with every parent and every baseline on the test split, example by
example; "no synergy found" is a sentence that this file writes when it is so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mergekit_unconstrained.evaluation.statistics import (
    Interval,
    Mean,
    mean_and_error,
    paired_bootstrap,
    synergy,
)
from mergekit_unconstrained.hub import search_plots
from mergekit_unconstrained.hub.markdown import code, md
from mergekit_unconstrained.hub.names import display_name
from mergekit_unconstrained.hub.record import HEATMAP
from mergekit_unconstrained.search.finals import Chosen, Tested
from mergekit_unconstrained.search.run import LABELS, SEARCHED, Searcher
from mergekit_unconstrained.search.study import Finished, Study, mean

CONFIDENCE = 0.95
MIXED_UNITS = (
    "**The searched tasks have scores of different units, averaged as they are**: a score with a "
    "wide range outweighs the others. Weights are the search file's."
)
MEANINGS = {
    SEARCHED: "the genome of the search file",
    "uniform_grid": "one value of every parameter for all experts, layers and kinds, on a grid",
    "uniform_random": "one value a parameter and expert for all layers and kinds, at random",
    "random": "the genome of the search file, at random",
}


@dataclass(frozen=True)
class StudyFacts:
    """One study, counted from the storage."""

    label: str
    candidates: int
    dropped: int
    failed: int
    examples: int
    seconds: float
    search: float | None
    development: float | None
    failures: Mapping[str, int]


@dataclass(frozen=True)
class TaskFacts:
    """One task on the test split.

    means: by model. differences: the searched merge less each other model, paired. gained, lost:
    ids of examples that the merge alone solves, and that a parent solves and the merge does not;
    None for tasks in which nothing is ever "solved".
    """

    name: str
    unit: str
    n: int
    means: Mapping[str, Mean]
    differences: Mapping[str, Interval]
    gained: Sequence[str] | None
    lost: Sequence[str] | None

    def beats(self, others: Sequence[str]) -> bool:
        """Whether the searched merge lies above all these models beyond the intervals."""
        return all(self.differences[o].low > 0 for o in others if o in self.differences)


@dataclass(frozen=True)
class Report:
    """Everything the report says."""

    method: str
    genes: int
    fixed: int
    sampler: str
    seed: int
    tasks: Sequence[TaskFacts]
    studies: Sequence[StudyFacts]
    parents: Sequence[str]
    baselines: Sequence[str]
    values: Mapping[str, float]
    splits: Mapping[str, Mapping[str, int]]
    meanings: Mapping[str, str] = field(default_factory=dict)
    mixed: bool = False
    history: Mapping[str, Sequence[Finished]] = field(default_factory=dict)
    front: Sequence[Finished] = ()
    importance: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> list[str]:
        """The sentences that say whether it was worth it."""
        sentences = [*(_about(t, self) for t in self.tasks), _by_development(self), _synergy(self)]
        return [sentence for sentence in sentences if sentence]

    @property
    def uniform(self) -> list[str]:
        """The baselines that have one value for all layers and kinds."""
        return [b for b in self.baselines if b.startswith("uniform")]

    @property
    def sentence(self) -> str:
        """How the coefficients were found, for the card."""
        (searched, *_) = self.studies
        tasks = ", ".join(self.splits)
        return (
            f"The coefficients were found by a search: {self.sampler}, {searched.candidates} "
            f"candidates, {self.genes} numbers, scored on {tasks}."
        )


def gather(
    searcher: Searcher,
    studies: Mapping[str, Study],
    chosen: Mapping[str, Chosen],
    tested: Tested,
) -> Report:
    """All facts, from the storage and the scores."""
    shown = _names(tested)
    results = {shown[label]: scores for label, scores in tested.items()}
    history = {LABELS[name]: study.finished for name, study in studies.items()}
    searched = searcher.spaces.searched
    plan = searcher.live.plan
    return Report(
        method=plan.method.spec.name,
        genes=len(searched.genome),
        fixed=len(searched.genome.fixed),
        sampler=searcher.settings.sampler,
        seed=searcher.settings.seed,
        tasks=[_task(t, results) for t in searcher.tasks if "test" in t.splits()],
        studies=[_study(name, study, chosen[name]) for name, study in studies.items()],
        parents=[s for label, s in shown.items() if label not in LABELS.values()],
        baselines=[LABELS[name] for name in studies if name != SEARCHED],
        values=chosen[SEARCHED].values,
        splits={
            t.name: {split: len(t.examples(split)) for split in t.splits()} for t in searcher.tasks
        },
        meanings={LABELS[name]: MEANINGS[name] for name in studies},
        mixed=len({t.unit for t in searcher.objective.tasks}) > 1,
        history=history,
        front=_front(studies[SEARCHED]) if searcher.objectives > 1 else (),
        importance=search_plots.importance(history[LABELS[SEARCHED]]),
    )


def _names(labels: Iterable[str]) -> dict[str, str]:
    """Label of `Tested` -> what tables call the model; no two the same."""
    found = {label: label for label in labels if label in LABELS.values()}
    for label in labels:
        if label in found:
            continue
        kind, _, name = label.partition(" ")
        shown = display_name(name)
        if (kind == "base" and shown != "base") or shown in LABELS.values():
            shown = f"{kind} {shown}"
        alike = sum(other == shown or other.startswith(f"{shown} (") for other in found.values())
        found[label] = f"{shown} ({alike + 1})" if alike else shown
    return {label: found[label] for label in labels}


def _front(study: Study) -> list[Finished]:
    numbers = set(study.front)
    return [f for f in study.finished if f.number in numbers]


def _study(name: str, study: Study, chosen: Chosen) -> StudyFacts:
    finished = study.finished
    reasons = [f.failure for f in finished if f.failure]
    return StudyFacts(
        label=LABELS[name],
        candidates=len(finished),
        dropped=sum(f.dropped for f in finished),
        failed=len(reasons),
        examples=sum(f.examples for f in finished),
        seconds=sum(f.seconds for f in finished),
        search=chosen.value,
        development=chosen.development,
        failures={r: reasons.count(r) for r in dict.fromkeys(reasons)},
    )


def _task(task: Any, results: Mapping[str, Mapping[str, Sequence[Any]]]) -> TaskFacts:
    scores = {model: found[task.name] for model, found in results.items()}
    values = {model: [one.value for one in found] for model, found in scores.items()}
    own = values[LABELS[SEARCHED]]
    gained: tuple[str, ...] | None = None
    lost: tuple[str, ...] | None = None
    if task.solved_at is not None:
        by_id = {m: {one.id: one.value for one in found} for m, found in scores.items()}
        parents = [found for m, found in by_id.items() if m not in LABELS.values()]
        gained, lost = synergy(by_id[LABELS[SEARCHED]], parents, task.solved_at)
    return TaskFacts(
        name=task.name,
        unit=task.unit,
        n=len(own),
        means={model: mean_and_error(found) for model, found in values.items()},
        differences={
            model: paired_bootstrap(own, found, confidence=CONFIDENCE)
            for model, found in values.items()
            if model != LABELS[SEARCHED]
        },
        gained=gained,
        lost=lost,
    )


# -- sentences ------------------------------------------------------------------------------------


def _about(task: TaskFacts, report: Report) -> str:
    said = []
    for what, others in (("every parent", report.parents), ("the uniform merges", report.uniform)):
        if not others:
            continue
        best = max(others, key=lambda m: task.means[m].mean)
        d = task.differences[best]
        if task.beats(others):
            said.append(f"above {what} ({_signed(d)} against {best})")
        elif d.high < 0:
            said.append(f"below {best} ({_signed(d)})")
        else:
            said.append(f"not above {what} beyond the interval ({_signed(d)} against {best})")
    return f"{task.name}: the searched merge is {' and '.join(said)}." if said else ""


def _by_development(report: Report) -> str:
    """Which study won where nothing was looked at twice."""
    known = {s.label: s.development for s in report.studies if s.development is not None}
    if len(known) < 2:
        return ""
    best = max(known, key=lambda label: known[label])
    values = ", ".join(f"{label} {value:.4f}" for label, value in known.items())
    return f"On the development split {best} is best ({values}; weighted means over the tasks)."


def _synergy(report: Report) -> str:
    """Whether some task is solved by the merge beyond all of its parents."""
    able = [t for t in report.tasks if t.gained is not None]
    if not able:
        return "Synergy cannot be judged: no task has answers that are right or wrong."
    found = [t.name for t in able if t.beats(report.parents)]
    if found:
        return f"Synergy: {', '.join(found)} beyond every parent."
    return (
        "No synergy found: on no task with right and wrong answers is the merge above every parent "
        "beyond the interval."
    )


def _signed(d: Interval) -> str:
    return f"{d.difference:+.3f}, {CONFIDENCE:.0%} interval {d.low:+.3f} to {d.high:+.3f}"


# -- files ----------------------------------------------------------------------------------------


def write(report: Report, folder: Path) -> None:
    """report.md, report.json and plots/ into a folder."""
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    drawn = search_plots.draw_all(report.history, report.front, report.importance, plots)
    drawn = {title: f"plots/{file}" for title, file in drawn.items()}
    if (folder / HEATMAP).is_file():
        drawn["Coefficients by layer and kind"] = HEATMAP
    (folder / "report.md").write_text(markdown(report, drawn), encoding="utf-8")
    content = {k: v for k, v in asdict(report).items() if k not in ("history", "front")}
    content["verdict"] = report.verdict
    content["this_model"] = LABELS[SEARCHED]
    content["found_by"] = report.sentence
    content["history"] = {
        label: [_brief(f) for f in found] for label, found in report.history.items()
    }
    content["front"] = [asdict(f) for f in report.front]
    (folder / "report.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _brief(found: Finished) -> dict[str, Any]:
    return {k: v for k, v in asdict(found).items() if k != "scores"}


def markdown(report: Report, plots: Mapping[str, str]) -> str:
    """The report as a page. plots: title -> file."""
    lines = ["# Search of merge coefficients", ""]
    fixed = (
        f"; {report.fixed} more change nothing and stayed at their start" if report.fixed else ""
    )
    lines += [
        f"Method {code(report.method)}, {report.genes} numbers searched by {report.sampler} "
        f"(seed {report.seed}){fixed}. The test split was scored once, when all was chosen.",
        "",
    ]
    lines += [f"- {md(label)}: {md(what)}" for label, what in report.meanings.items()]
    lines += ["", *([MIXED_UNITS, ""] if report.mixed else [])]
    if report.tasks:
        lines += ["## On the test split", "", *_table(report), ""]
        lines += [f"- {md(sentence)}" for sentence in report.verdict] + [""]
        lines += _examples(report)
    else:
        lines += ["No task has a test split, so nothing can be said beyond the data of the search."]
    lines += ["", "## What was spent", "", *_spent(report), ""]
    lines += _front_table(report)
    for title, file in plots.items():
        lines += [f"![{title}]({file})", ""]
    lines += ["## Coefficients", "", "| gene | value |", "|---|---|"]
    lines += [f"| {md(name)} | {value:g} |" for name, value in report.values.items()]
    return "\n".join(lines).rstrip() + "\n"


def _front_table(report: Report) -> list[str]:
    """The candidates that no other one beats in every task, on the search split."""
    if not report.front:
        return []
    tasks = list(report.front[0].scores)
    lines = ["## Trade-offs on the search split", ""]
    lines += [f"| candidate | {' | '.join(md(t) for t in tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for one in report.front:
        cells = " | ".join(f"{mean(one.scores[t]):.4f}" for t in tasks)
        lines.append(f"| {one.number} | {cells} |")
    lines += [
        "",
        "The written merge has the best weighted mean on the development split. The values "
        "of all are in report.json under `front`.",
        "",
    ]
    return lines


def _table(report: Report) -> list[str]:
    models = list(report.tasks[0].means)
    heads = [f"{md(t.name)} ({md(t.unit)}, n = {t.n})" for t in report.tasks]
    lines = [f"| model | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for model in models:
        cells = [f"{t.means[model].mean:.3f} ± {t.means[model].error:.3f}" for t in report.tasks]
        name = f"**{md(model)}**" if model == LABELS[SEARCHED] else md(model)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "± one standard error. The searched merge less each other model, paired:", ""]
    lines += [f"| against | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for model in models:
        if model != LABELS[SEARCHED]:
            cells = [_between(t.differences[model]) for t in report.tasks]
            lines.append(f"| {md(model)} | {' | '.join(cells)} |")
    lines += ["", f"Bootstrap over examples, {CONFIDENCE:.0%}, percentiles."]
    return lines


def _between(d: Interval) -> str:
    return f"{d.difference:+.3f} ({d.low:+.3f} to {d.high:+.3f})"


def _examples(report: Report) -> list[str]:
    lines = []
    for task in report.tasks:
        if task.gained is None or task.lost is None:
            continue
        lines.append(
            f"{md(task.name)}: {len(task.gained)} of {task.n} examples are solved by the searched "
            f"merge and by no parent; solved by a parent and lost: {len(task.lost)}."
        )
        lines.append("")
    return lines


def _spent(report: Report) -> list[str]:
    lines = [
        "| study | candidates | dropped early | failed | example evaluations | seconds "
        "| search score | development score |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in report.studies:
        scores = [f"{v:.4f}" if v is not None else "" for v in (s.search, s.development)]
        lines.append(
            f"| {s.label} | {s.candidates} | {s.dropped} | {s.failed} | {s.examples:,} "
            f"| {s.seconds:.0f} | {' | '.join(scores)} |"
        )
    lines += ["", "Counted from the storage. Scores are weighted means over the tasks."]
    for s in report.studies:
        lines += [
            f"- {s.label}, failed {n} times: {md(reason)}" for reason, n in s.failures.items()
        ]
    counts = [
        f"{md(task)} " + ", ".join(f"{split} {n}" for split, n in found.items())
        for task, found in report.splits.items()
    ]
    return [*lines, "", f"Examples: {'; '.join(counts)}. No question is in two splits."]
