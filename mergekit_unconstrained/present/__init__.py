"""What people see on the terminal: plans, summaries, progress. Draws, decides nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from mergekit_unconstrained.engine.plan import Plan

console = Console()


def status(message: str, quiet: bool) -> AbstractContextManager[Any]:
    """A spinner beside a message while something of unknown length runs."""
    return nullcontext() if quiet else console.status(escape(message))


@contextmanager
def byte_progress(message: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar by bytes with the time left; gives a function that is told how many more were done.

    What ends well ends at the total, which may have been an estimate; what fails leaves no bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    # On stderr: what a command prints may be redirected into a file.
    with Progress(*columns, console=Console(stderr=True), disable=total == 0) as bar:
        task = bar.add_task(escape(message), total=total)
        try:
            yield lambda count: bar.advance(task, count)
        except Exception:
            bar.update(task, visible=False)
            raise
        bar.update(task, completed=total)


def size(count: int) -> str:
    """Bytes for people: 513.2 MiB."""
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


def print_plan(
    plan: Plan, out: Path | None, memory: int, beforehand: int, seconds: float | None = None
) -> None:
    """Parents, coefficients, sizes and what it will take.

    memory: bytes for the tensors. beforehand: bytes that are read of whole models before them.
    """
    table = Table(
        title=f"{escape(plan.method.spec.name)} of {experts(plan)}",
        title_justify="left",
    )
    for heading in ("", "model", "tensors", "size", "weight", "density"):
        table.add_column(heading, justify="right" if heading in ("tensors", "size") else "left")
    for parent in (plan.base, *plan.experts):
        cells = plan.coefficients.get(parent.name, {}).values()
        table.add_row(
            "base" if parent is plan.base else "expert",
            escape(parent.name),
            f"{len(parent.tensors):,}" if parent.tensors is not None else "?",
            size(sum(f.stat().st_size for f in (*parent.weight_files, *parent.adapter_files)))
            if parent.weight_files
            else "on the Hub",
            "" if parent is plan.base else span(c.weight for c in cells),
            "" if parent is plan.base else span(c.density for c in cells),
        )
    console.print(table)
    settings = [
        f"{p.name}={plan.shared[p.name]}"
        for p in plan.method.spec.shared_parameters
        if p.name == "operator" or plan.shared.get(p.name) != p.default
    ]
    lines = [
        "parameters  " + (", ".join(settings) or "all at their defaults"),
        f"output      {len(plan.tensors):,} tensors, {plan.layers} layers, {size(plan.out_bytes)}"
        + (f" in {out}" if out is not None else ""),
        f"disk        {size(plan.out_bytes)} needed, {size(_free(out))} free",
        f"memory      up to {size(memory)} for weights",
    ]
    if beforehand:
        lines.append(f"beforehand  {size(beforehand)} read of whole models, if not remembered")
    if seconds is not None:
        lines.append(f"time        about {duration(seconds)} on this machine, start-up apart")
    console.print(escape("\n".join(lines)), highlight=False)


def print_summary(plan: Plan, out: Path, seconds: float) -> None:
    """One line at the end of a job."""
    console.print(
        f"[bold]{escape(str(out))}[/]: {len(plan.tensors):,} tensors, {size(plan.out_bytes)}, "
        f"{experts(plan)} merged by {escape(plan.method.spec.name)} in "
        f"{duration(seconds)}{card(out)}",
        highlight=False,
    )


def card(out: Path) -> str:
    """Where the card is, if one was written."""
    return "; the card is README.md" if (out / "README.md").is_file() else ""


def experts(plan: Plan) -> str:
    """`1 expert`, `3 experts`."""
    return f"{len(plan.experts)} expert" + ("s" if len(plan.experts) != 1 else "")


def span(values: Iterable[float | None]) -> str:
    """`0.5`, or `0.1 to 0.9` when values differ."""
    known = sorted({v for v in values if v is not None})
    if not known:
        return ""
    return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _free(out: Path | None) -> int:
    start = (out or Path()).absolute()
    folder = next(p for p in (start, *start.parents) if p.exists())
    return shutil.disk_usage(folder).free
