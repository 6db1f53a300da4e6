"""A comparison of merge methods for people and programs: compare.md, .json, scores.csv, a plot.

Intervals are 95 % of a mean over the test examples (1.96 standard errors).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.evaluation.records import Scored
from mergekit_unconstrained.evaluation.statistics import Mean, mean_and_error
from mergekit_unconstrained.hub.markdown import md
from mergekit_unconstrained.hub.names import display_name

Z = 1.96
PLOT = "compare.png"
MIB = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One row: a parent or a method.

    kind: base, expert, ours or mergekit. values: the tuned numbers. search: the score they had on
    the search split. seconds, memory: of the merge, processor time and bytes. failure: why there
    are no scores.
    """

    name: str
    kind: str
    values: Mapping[str, float] = field(default_factory=dict)
    search: float | None = None
    candidates: int = 0
    scores: Mapping[str, Sequence[Scored]] = field(default_factory=dict)
    seconds: float = math.nan
    memory: int = 0
    failure: str = ""

    @property
    def is_parent(self) -> bool:
        """Whether nothing was merged for it."""
        return self.kind in ("base", "expert")

    @property
    def title(self) -> str:
        """As tables call it."""
        return f"{self.kind} {display_name(self.name)}" if self.is_parent else self.name

    def mean(self, task: str) -> Mean:
        """Over the test examples of a task."""
        return mean_and_error([one.value for one in self.scores.get(task, ())])


@dataclass(frozen=True)
class Comparison:
    """All rows. units, weights: of the tasks; budget: candidates that every method had."""

    entries: Sequence[Entry]
    units: Mapping[str, str]
    weights: Mapping[str, float]
    budget: int
    seed: int

    def objective(self, entry: Entry) -> Mean:
        """The weighted mean over tasks that the search raises, here on the test split."""
        weighed = {t: self.weights[t] for t in self.units if self.weights[t] > 0}
        if entry.failure or not weighed:
            return Mean(math.nan, math.nan, 0)
        means = {t: entry.mean(t) for t in weighed}
        total = sum(weighed.values())
        value = sum(w * means[t].mean for t, w in weighed.items()) / total
        error = math.sqrt(sum((w * means[t].error) ** 2 for t, w in weighed.items())) / total
        return Mean(value, error, min(m.n for m in means.values()))

    @property
    def ranked(self) -> list[Entry]:
        """Parents first, then methods by their objective, failed ones last."""
        parents = [e for e in self.entries if e.is_parent]
        methods = [e for e in self.entries if not e.is_parent]

        def place(entry: Entry) -> float:
            value = self.objective(entry).mean
            return math.inf if math.isnan(value) else -value

        return parents + sorted(methods, key=place)


def write(found: Comparison, folder: Path) -> None:
    """All files of a comparison, into a folder; older ones are replaced."""
    texts = {
        "compare.md": markdown(found),
        "compare.json": as_json(found),
        "scores.csv": rows(found),
    }
    for name, text in texts.items():
        with replacing(folder / name) as stream:
            stream.write(text.encode())
    draw(found, folder / PLOT)


def cells(found: Comparison, entry: Entry) -> list[str]:
    """A row of the table: name, kind, tasks, objective, processor seconds, MiB."""
    if entry.failure:
        return [entry.title, entry.kind, *["failed"] * (len(found.units) + 1), "", ""]
    means = [*(entry.mean(t) for t in found.units), found.objective(entry)]
    cost = ["", ""]
    if not entry.is_parent and not math.isnan(entry.seconds):
        cost = [f"{entry.seconds:.2f}", f"{entry.memory / MIB:.0f}"]
    return [entry.title, "" if entry.is_parent else entry.kind, *map(interval, means), *cost]


def headings(found: Comparison) -> list[str]:
    """Of `cells`."""
    tasks = [f"{name} ({unit})" for name, unit in found.units.items()]
    return ["", "of", *tasks, "objective", "CPU s", "MiB"]


def interval(mean: Mean) -> str:
    """`0.412 ± 0.031`, the half width of the interval."""
    return "" if math.isnan(mean.mean) else f"{mean.mean:.3f} ± {Z * mean.error:.3f}"


def markdown(found: Comparison) -> str:
    """The table and how it came about."""
    n = {t: max((e.mean(t).n for e in found.entries), default=0) for t in found.units}
    weighed = ", ".join(f"{t} x {w:g}" for t, w in found.weights.items() if w > 0)
    counts = ", ".join(f"{t} {count}" for t, count in n.items())
    table = [headings(found), *(cells(found, e) for e in found.ranked)]
    lines = [
        "# Comparison of merge methods",
        "",
        f"Every method had {found.budget} candidates to tune its numbers on the search split "
        f"(seed {found.seed}), where the objective is the weighted mean of {weighed}. Everything "
        "here is of the test split, scored once: mean ± half the width of a 95 % interval over "
        f"examples ({counts}). CPU s and MiB are those of the merge alone, from files to files in "
        "one thread, without start-up. Methods whose intervals overlap are not told apart.",
        "",
        *_table(table),
        "",
        f"![score against cost]({PLOT})",
        "",
        "## What was tuned",
        "",
    ]
    for entry in found.ranked:
        if entry.failure:
            lines.append(f"* {md(entry.name)}: failed, {md(entry.failure)}")
        elif not entry.is_parent:
            values = ", ".join(f"{md(k)} {v:g}" for k, v in entry.values.items())
            lines.append(f"* {md(entry.name)}: {values or 'has no numbers to tune'}")
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *rest = [[md(cell) for cell in row] for row in rows]
    marks = ["---", "---", *["---:"] * (len(first) - 2)]
    return [f"| {' | '.join(row)} |" for row in (first, marks, *rest)]


def as_json(found: Comparison) -> str:
    """Everything but the single examples."""

    def number(x: float) -> float | None:
        return None if math.isnan(x) else x

    entries = [
        {
            "name": display_name(e.name) if e.is_parent else e.name,
            "kind": e.kind,
            "failure": e.failure,
            "values": dict(e.values),
            "search": e.search,
            "candidates": e.candidates,
            "cpu_seconds": number(e.seconds),
            "memory_bytes": e.memory,
            "objective": number(found.objective(e).mean),
            "tasks": {
                t: {"mean": number(m.mean), "error": number(m.error), "n": m.n}
                for t in found.units
                for m in [e.mean(t)]
            },
        }
        for e in found.ranked
    ]
    content = {
        "budget": found.budget,
        "seed": found.seed,
        "units": dict(found.units),
        "weights": dict(found.weights),
        "entries": entries,
    }
    return json.dumps(content, indent=1)


def rows(found: Comparison) -> str:
    """scores.csv: one line a model and test example."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "kind", "task", "example", "value"])
    for entry in found.ranked:
        name = display_name(entry.name) if entry.is_parent else entry.name
        for task in found.units:
            for one in entry.scores.get(task, ()):
                writer.writerow([name, entry.kind, task, one.id, repr(one.value)])
    return text.getvalue()


def draw(found: Comparison, path: Path) -> None:
    """The objective against processor time: a numbered point a method, lines for the parents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 6.0), layout="constrained")
    axes, names = figure.subplots(1, 2, width_ratios=[3.4, 1])
    names.set_axis_off()
    shown = [
        (entry, found.objective(entry))
        for entry in found.ranked
        if not entry.is_parent and not entry.failure and not math.isnan(entry.seconds)
    ]
    colours = {"ours": "C0", "mergekit": "C1"}
    for place, (entry, mean) in enumerate(shown, 1):
        colour, half, above = colours[entry.kind], Z * mean.error, 2 + len(shown) - place
        point = (entry.seconds, mean.mean)
        axes.errorbar(*point, half, fmt="o", ms=11, mfc="white", lw=0.6, color=colour, zorder=above)
        text = {"fontsize": 6.5, "color": colour, "va": "center", "zorder": above + 0.2}
        axes.annotate(str(place), point, ha="center", **text)
        names.text(0, 1 - place / (len(shown) + 2), f"{place}  {entry.name}", **text)
    names.text(0, 1, "ours", color="C0", fontsize=8.5, weight="bold", va="center")
    names.text(0.3, 1, "mergekit", color="C1", fontsize=8.5, weight="bold", va="center")
    for entry in (e for e in found.entries if e.is_parent):
        level = found.objective(entry).mean
        if not math.isnan(level):
            axes.axhline(level, lw=0.8, ls=":", color="0.4")
            axes.annotate(entry.title, (1, level), xycoords=("axes fraction", "data"),
                          fontsize=7, ha="right", va="bottom", color="0.3")  # fmt: skip
    if shown:
        axes.set_xscale("log")
    axes.set_xlabel("processor seconds of the merge")
    axes.set_ylabel("objective on the test split, with 95 % intervals")
    figure.savefig(path, dpi=130)
