"""The streaming merge: mergekit's planned tasks, run tensor by tensor straight into their places.

What is planned, how a tensor is read and what a method does to it are mergekit's own tasks; the
executor around them is ours. Here is what there is to do, in the order in which the tensors lie in
the base's files; workers.py does it.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import (
    MergeConfiguration,
    MergeOptions,
    ModelReference,
    PlannedTask,
)
from mergekit_unconstrained.config.recipe import JobOptions
from mergekit_unconstrained.engine import journal, staging
from mergekit_unconstrained.engine.journal import Journal, JournalError
from mergekit_unconstrained.engine.layout import Layout, Output, lay_out
from mergekit_unconstrained.engine.plan import Plan
from mergekit_unconstrained.engine.source import CannotStreamError, Input, MappedLoader, map_parents
from mergekit_unconstrained.engine.workers import Job, Workers, merge_all
from mergekit_unconstrained.engine.writer import UNFINISHED, Writer, verify
from mergekit_unconstrained.errors import OutputError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What is to be merged, as mergekit's planner and this package's job options say it.

    types: model -> transformers' model type. base: whose files' order is followed, the first
    model's for None. hashes: whether the sha256 of the output's files is wanted, as it always is
    where the job is to `verify`.
    """

    tasks: Sequence[PlannedTask]
    types: Mapping[ModelReference, str]
    base: ModelReference | None
    config: MergeConfiguration
    architecture: Any
    out_config: Any
    job: JobOptions
    hashes: bool = True

    @classmethod
    def of(cls, plan: Plan, *, hashes: bool = True) -> Work:
        """That of a recipe of ours."""
        parents = (plan.base, *plan.experts)
        types = {p.reference: getattr(p.config, "model_type", "") for p in parents}
        base = plan.base.reference
        return cls(
            plan.tasks,
            types,
            base,
            plan.config,
            plan.architecture,
            plan.out_config,
            plan.job,
            hashes,
        )


def refusal(architecture: Any, options: MergeOptions) -> str | None:
    """Why a merge is left to mergekit's executor, before a file is opened; None for no reason."""
    if not hasattr(os, "pwrite") or not hasattr(mmap, "MAP_PRIVATE"):
        return "this system cannot write at given places of a file"
    if not options.safe_serialization:
        return "--no-safe-serialization writes pickles"
    if options.multi_gpu:
        return "--multi-gpu is mergekit's own executor for several devices"
    if getattr(architecture, "post_fill_parameters", False):
        return "mergekit fills in missing parameters of this architecture afterwards"
    return None


def merge(
    work: Work,
    folder: Path,
    options: MergeOptions,
    identity: Mapping[str, Any],
    advance: Callable[[int], Any] = lambda _: None,
    say: Callable[[str], Any] = LOG.warning,
) -> dict[str, str]:
    """Write the merged weights, config and tokenizer into a folder; file name -> sha256.

    identity: what the journal is held against, `inputs` among it; where the folder holds a journal
    of the same, the merge goes on from there, and otherwise says what is different and begins anew.
    advance: told of the bytes of every tensor that is done. CannotStreamError before anything is
    written, or when a method's result is not what was planned. The journal stays in the folder,
    until `forget`.
    """
    cache = compat.set_loader_options(options)
    tokenizers = {t.tokenizer for t in work.tasks if t.tokenizer is not None}
    try:
        loaders = map_parents(work.types, cache)
        tokenizer = compat.build_tokenizer(tokenizers.pop()) if tokenizers else None
        jobs = _jobs(work, loaders, tokenizer)
        layout = lay_out([job.output for job in jobs], options.out_shard_size)
        digests = _run(jobs, layout, tokenizer, work, folder, options, identity, advance, say)
    finally:
        compat.forget_loaders()
    if work.job.verify and (wrong := list(verify(folder, digests))):
        raise OutputError(
            f"{wrong[0]} does not read back as it was written: the disk or the memory of this "
            "machine is not to be trusted"
        )
    compat.finish_merge(work.config, work.architecture, work.out_config, folder, options, tokenizer)
    return digests


def forget(folder: Path) -> None:
    """Remove the journal of a finished merge."""
    (folder / journal.NAME).unlink(missing_ok=True)


def clear(folder: Path, keep: Container[str] = ()) -> None:
    """Remove the files that an earlier merge left in a folder, but for the note that locks it."""
    for file in folder.iterdir() if folder.exists() else ():
        if file.is_file() and file.name != staging.NOTE and file.name not in keep:
            file.unlink()


# -- what is to be done ---------------------------------------------------------------------------


def _jobs(work: Work, loaders: Mapping[ModelReference, MappedLoader], tokenizer: Any) -> list[Job]:
    """Every tensor of the output, in the order of the base's files."""
    jobs = []
    parents = {model: (loader, work.types[model]) for model, loader in loaders.items()}
    for task in work.tasks:
        present, label, count = {}, "", 0
        for model, load in task.loads.items():
            if (parent := parents.get(model)) is None:
                raise CannotStreamError("the recipe names a model in a way that cannot be followed")
            found = Input(load, *parent)
            label, count = max(label, found.label), count + 1
            if not found.is_missing:
                present[model] = found
        if not present or (len(present) < count and not task.output.optional):
            raise CannotStreamError(f"{task.output.name} is not in the files of every parent")
        if not task.is_skipped(present):
            jobs.append(Job(task, present, _output(task, present, label, tokenizer)))
    return sorted(jobs, key=lambda job: _place(job, work.base))


def _output(
    task: PlannedTask, inputs: Mapping[ModelReference, Input], label: str, tokenizer: Any
) -> Output:
    likes = [i.like for i in inputs.values() if i.like is not None]
    dtype = likes[0].dtype
    for like in likes[1:]:
        dtype = torch.promote_types(dtype, like.dtype)
    dtype = compat.dtype_from_name(task.dtype) or dtype
    shape = list(likes[0].shape)
    axis = task.output.vocabulary_axis
    if axis is not None and task.tokenizer is not None:
        rows = len(tokenizer.tokenizer.get_vocab())
        multiple = task.pad_to_multiple_of or 1
        shape[axis] = -(-rows // multiple) * multiple
    elif axis is not None and task.truncates:
        shape[axis] = min(like.shape[axis] for like in likes)
    return Output(task.output.name, tuple(shape), dtype, label)


def _place(job: Job, base: ModelReference | None) -> tuple[str, int]:
    found = (base and job.inputs.get(base)) or next(iter(job.inputs.values()))
    return found.place()


# -- doing it -------------------------------------------------------------------------------------


def _run(
    jobs: Sequence[Job],
    layout: Layout,
    tokenizer: Any,
    whole: Work,
    folder: Path,
    options: MergeOptions,
    identity: Mapping[str, Any],
    advance: Callable[[int], Any],
    say: Callable[[str], Any],
) -> dict[str, str]:
    headers = hashlib.sha256(b"".join(s.name.encode() + s.header for s in layout.shards))
    identity = {**identity, "the layout of the output": headers.hexdigest()}
    path = folder / journal.NAME
    finished: dict[str, str] = {}
    if path.exists():
        try:
            finished = journal.read(path, identity)
        except JournalError as error:
            say(f"{folder} was left by an unfinished merge, but {error}: starting over")
    folder.mkdir(parents=True, exist_ok=True)
    shards = {name for s in layout.shards for name in (s.name, s.name + UNFINISHED)}
    clear(folder, keep={journal.NAME, *shards} if finished else set())
    writer = Writer(folder, layout, hashes=whole.hashes or whole.job.verify)
    notes = None
    try:
        done = writer.recheck(finished)
        if done:
            counted = f"{len(done):,} of {len(jobs):,} tensors"
            say(f"going on with an unfinished merge, of which {counted} are done")
        notes = Journal(path, identity, new=not done)
        advance(sum(job.output.bytes for job in jobs if job.output.name in done))
        left = [job for job in jobs if job.output.name not in done]
        merge_all(left, Workers(writer, notes, tokenizer, options, advance), whole.job, options)
        notes.sync()
        return writer.finish()
    finally:
        writer.close()
        if notes is not None:
            notes.close()
