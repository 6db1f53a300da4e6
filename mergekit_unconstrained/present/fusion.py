"""What people see of a fusion: its plan, the progress of its stages, the summary."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from mergekit_unconstrained.fusion.estimates import Estimate, estimate, logits_shape
from mergekit_unconstrained.fusion.plan import FusionPlan, Member
from mergekit_unconstrained.fusion.preview import preview
from mergekit_unconstrained.fusion.records import Origin
from mergekit_unconstrained.fusion.workdir import WorkDir, read_manifest
from mergekit_unconstrained.present import card, console, duration, size


def _count(number: float) -> str:
    """134.5 M."""
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g} G"


@contextmanager
def without_other_bars() -> Iterator[None]:
    """Keep transformers' own progress bars, one for every model that is loaded, out of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def warn(message: str) -> None:
    """A line on stderr that stands out."""
    Console(stderr=True).print(f"[yellow]{escape(message)}[/]", highlight=False)


def print_plan(plan: FusionPlan, out: Path | None) -> None:
    """Models, data and stages with sizes and times."""
    console.print(tree(plan, out), highlight=False)


def tree(plan: FusionPlan, out: Path | None) -> Tree:
    """The plan as a tree: pivot, sources, stages."""
    seen = preview(plan)
    found = estimate(plan, seen)
    root = Tree(f"[bold]{escape(plan.method.spec.name)}[/]: {escape(plan.summary)}")
    models = root.add("models")
    models.add(_member("pivot", plan.pivot, found))
    for source in plan.sources:
        models.add(_member("source", source, found))
    data = root.add("data")
    data.add(escape(f"{plan.dataset}: {found.rows:,} conversations, about {found.tokens:,} tokens"))
    for note in seen.notes:
        data.add(escape(note))
    s = plan.settings
    ways = root.add("fusion")
    ways.add(f"alignment {s.alignment}, vocabulary map {s.vocabulary_map}, top {s.top_k}")
    ways.add(f"target {s.target} per {s.per}, loss {s.loss}, lm_loss_weight {s.lm_loss_weight:g}")
    steps = f"{found.steps:,} steps of {s.batch_size}, learning rate {plan.learning_rate:g}"
    ways.add(steps + (f", LoRA rank {plan.lora_rank}" if plan.lora_rank else ", all weights"))
    if len(plan.sources) > 1 and s.pairing == "pairwise":
        ways.add(f"one target for each source, merged by {s.post_merge}")
    stages = root.add("stages")
    for name, seconds in found.seconds.items():
        least = f"at least {duration(seconds)}" if seconds >= 60 else "under a minute"
        stages.add(f"{escape(name)}: {least} of arithmetic on this machine")
    named = out is not None or plan.settings.work_dir is not None
    folder = plan.work_dir(out or Path()) if named else Path()
    free = free_space(folder)
    room = f"[yellow]only {size(free)} free[/]" if free < found.disk else f"{size(free)} free"
    root.add(f"disk: about {size(found.disk)} in {escape(str(folder))}, {room}")
    root.add(_memory(plan, found))
    return root


def free_space(folder: Path) -> int:
    """Bytes free where a folder lies or will lie."""
    where = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(where).free


def _memory(plan: FusionPlan, found: Estimate) -> str:
    told = f"memory: at least {size(found.memory)} for the weights and optimiser in training"
    if not found.logits:
        return f"{told}; activations and logits come on top"
    batch, length, words = logits_shape(plan)
    return (
        f"{told}; logits and their gradient take up to {size(found.logits)} more (2 x {batch} "
        f"conversations x {length:,} tokens x {words:,} words x 4 bytes), and activations"
    )


def _member(role: str, member: Member, found: Estimate) -> str:
    parent = member.parent
    architecture = (getattr(parent.config, "architectures", None) or ["?"])[0]
    parameters = found.parameters.get(member.name)
    count = f"{_count(parameters)} parameters" if parameters else "on the Hub"
    licence = found.licences.get(member.name) or "licence not known"
    return escape(f"{role}: {member.name} ({architecture}, {count}, {licence})")


def print_stages(
    work: WorkDir, folders: Sequence[Path], outdated: Mapping[Path, str] | None = None
) -> None:
    """Stages of a work folder: finished or not, time, the figure that matters.

    outdated: folder -> why the recipe does not use it any more.
    """
    table = Table(title=escape(str(work.root)), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("what came of it")
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest is not None:
            done = escape(_result(manifest)) if manifest["finished"] else "unfinished"
            if folder in (outdated or {}):
                done = escape(f"not used by this recipe ({(outdated or {})[folder]})")
            name = escape(str(folder.relative_to(work.root)))
            table.add_row(name, duration(float(manifest["seconds"])), done)
    console.print(table, highlight=False)


def print_nothing_begun(work: WorkDir) -> None:
    """What `fuse status` says before the first stage."""
    console.print(escape(f"nothing was begun yet: there is no {work.root}"), highlight=False)


def _result(manifest: dict[str, Any]) -> str:
    found = manifest["results"]
    kind = str(manifest["stage"]).partition("/")[0]
    if kind == "data":
        cut = f", {found['cut']:,} cut" if found["cut"] else ""
        repeated = found.get("repeated", 0)
        kept = f"; {repeated:,} repeat another, never across the split" if repeated else ""
        return f"{found['summary']}; {found['held_out']:,} held out{cut}{kept}"
    if kind == "distributions":
        held = found["held_out"]
        score = f", {held['bits_per_byte']:.4f} bits per byte held out" if held else ""
        speed = found.get("tokens_per_second")
        read = f", {speed:,.0f} tokens a second read" if speed else ""
        return f"{found['tokens']:,} tokens{score}{read}"
    if kind == "alignment":
        return (
            f"{found['coverage']:.1%} of positions covered, "
            f"{found['label_consistency']:.1%} label consistency"
        )
    if kind == "targets":
        won = ", ".join(f"{name} {share:.0%}" for name, share in found["won"].items())
        return f"won by {won}" if won else ""
    if kind == "train":
        parts = [f"{found['steps']:,} steps"]
        if found["bits_per_byte"]:
            before, after = found["bits_per_byte"]
            parts.append(f"held out {before:.4f} -> {after:.4f} bits per byte")
        return ", ".join(parts)
    held = found.get("held_out")
    return f"{held['bits_per_byte']:.4f} bits per byte held out" if held else ""


def print_summary(plan: FusionPlan, out: Path, seconds: float) -> None:
    """One line at the end of a job."""
    names = ", ".join(s.name for s in plan.sources)
    console.print(
        f"[bold]{escape(str(out))}[/]: {escape(plan.pivot.name)} with {escape(names)} fused into "
        f"it in {duration(seconds)}{card(out)}",
        highlight=False,
    )


def print_mixture(
    groups: Sequence[Any], fusion: FusionPlan | None, summary: str, out: Path | None
) -> None:
    """The tree of `unconstrained`: what is merged with what, then the fusion."""
    root = Tree(f"[bold]unconstrained[/]: {escape(summary)}")
    for index, group in enumerate(groups):
        role = "pivot" if index == 0 else "source"
        branch = root.add(escape(f"{role} {group.name}"))
        if group.recipe is None:
            branch.add(escape(f"{group.members[0].name}, taken as it is"))
            continue
        branch.add(escape(f"merged by layerwise from the base {group.base.name}"))
        for expert in group.recipe.data["models"]:
            weight = expert["parameters"]["weight"]
            branch.add(escape(f"{expert['model']}, weight {weight}"))
    if fusion is not None:
        root.children.append(tree(fusion, out))
    console.print(root, highlight=False)


def print_inspection(pivot: Any, source: Any, shown: Any, positions: int) -> None:
    """Position by position: the pivot's token, how it came by a distribution, its likeliest ids.

    pivot, source: fusion.models.LocalModel. shown: fusion.inspection.Inspection.
    """
    table = Table(
        title=escape(f"row {shown.conversation.row}: {source.name} -> {pivot.name}"),
        title_justify="left",
    )
    for heading in ("bytes", "pivot's token", "source's token", "how", "transferred"):
        table.add_column(heading)
    record, encoded, aligned = shown.record, shown.encoded, shown.aligned
    theirs = {int(s): int(t) for s, t in zip(record.starts, record.tokens, strict=True)}
    for i in range(min(positions, len(encoded.positions))):
        order = np.argsort(-aligned.probs[i])[:4]
        entries = [
            f"{_piece(pivot, int(aligned.ids[i, j]))} {aligned.probs[i, j]:.2f}"
            for j in order
            if aligned.ids[i, j] >= 0 and aligned.probs[i, j] > 0
        ]
        lost = float(aligned.tail[i] + aligned.unmapped[i])
        start, end = int(encoded.starts[i]), int(encoded.ends[i])
        their = theirs.get(start)
        table.add_row(
            f"{start}-{end}",
            escape(_piece(pivot, int(encoded.response_ids[i]))),
            escape(_piece(source, their)) if their is not None else "",
            Origin(int(aligned.origin[i])).name.lower(),
            escape("  ".join(entries) + (f"  (elsewhere {lost:.2f})" if entries else "")),
        )
    console.print(table, highlight=False)


def _piece(model: Any, token: int) -> str:
    piece = model.table.pieces[token] if token < len(model.table.pieces) else None
    return repr((piece or b"").decode("utf-8", errors="backslashreplace"))
