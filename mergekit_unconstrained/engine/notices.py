"""What is worth saying of a plan before it runs, though nothing of it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mergekit_unconstrained.compat import MergeOptions
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.engine import budget, streaming
from mergekit_unconstrained.engine.plan import Plan


def before(plan: Plan, options: MergeOptions) -> list[str]:
    """A sentence for each."""
    said = [*same_models(plan), *_executor(plan, options), budget.warning(plan)]
    return [text for text in said if text]


def same_models(plan: Plan) -> Iterator[str]:
    """Parents that are one and the same, by whatever path."""
    seen = {_files(plan.base): plan.base}
    for expert in plan.experts:
        files = _files(expert)
        other = seen.setdefault(files, expert) if files else expert
        if other is plan.base:
            yield (
                f"{expert.name} is the base model itself: its task vector is zero, so it only "
                "takes a share where weights are divided by their sum"
            )
        elif other is not expert:
            yield f"{expert.name} and {other.name} are one model, which counts twice"


def _files(parent: Parent) -> tuple[Path, ...]:
    return tuple(f.resolve() for f in (*parent.weight_files, *parent.adapter_files))


def _executor(plan: Plan, options: MergeOptions) -> Iterator[str]:
    """Why mergekit's executor will merge, as far as headers say it."""
    if plan.job.engine != "streaming":
        return
    reason = streaming.refusal(plan.architecture, options)
    pickled = [p.name for p in (plan.base, *plan.experts) if _is_pickled(p)]
    if pickled:
        reason = f"{pickled[0]} is a .bin file, which is only read as a whole"
    if reason is not None:
        yield f"mergekit's executor will merge this, which cannot be resumed: {reason}"


def _is_pickled(parent: Parent) -> bool:
    return any(f.suffix == ".bin" for f in parent.weight_files)
