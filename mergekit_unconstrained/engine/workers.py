"""Tensor by tensor: read, merged, written, noted, by workers with one torch thread each.

The inputs are mapped files, so their pages cost memory while they are mapped, and no longer than
that: the pages behind a kernel that goes through a tensor by pieces are given back at once, and a
tensor whose rows can be merged one by one (`entrywise`) is read, merged and written by parts of a
few MiB. How many tensors are under way at a time is bounded by `memory_budget`.

Workers are processes where the method allows it and there is much to do (processes.py), and threads
otherwise, in which kernels that call torch for a piece at a time compute in turns (`_takes_turns`)
while other threads write. Devices: device.py.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeOptions, ModelReference, PlannedTask
from mergekit_unconstrained.config.recipe import JobOptions
from mergekit_unconstrained.engine import processes
from mergekit_unconstrained.engine.context import role_of
from mergekit_unconstrained.engine.device import Lane
from mergekit_unconstrained.engine.footprint import OneTensor
from mergekit_unconstrained.engine.journal import Journal
from mergekit_unconstrained.engine.layout import Output
from mergekit_unconstrained.engine.source import CannotStreamError, Input
from mergekit_unconstrained.engine.writer import Writer
from mergekit_unconstrained.errors import NonFiniteError
from mergekit_unconstrained.numerics.pieces import BEHIND

LOG = logging.getLogger(__name__)
PART = 1 << 21
"""Entries of a part, of a tensor that is merged by parts."""
BATCH_BYTES = 1 << 18
"""Bytes of small tensors that a thread is given at a time."""
WORK_BYTES = 12
"""Bytes an entry that a kernel may take for itself, unless its method says better
(engine/footprint.py): magnitudes, their partition, a mask ..."""
WORK_BYTES_EXPERT = 4
"""... and for each expert."""

Tensors = Mapping[ModelReference, torch.Tensor]


@dataclass
class Job:
    """One output tensor with its inputs."""

    task: PlannedTask
    inputs: dict[ModelReference, Input]
    output: Output

    @cached_property
    def rows(self) -> int:
        """How many rows (entries of the first axis) are merged at a time; all, or a part of them.

        A part where the method merges each row by itself, and the rows of the inputs are those of
        the output: the vocabulary is not permuted, nothing is assembled from other tensors.
        """
        shape = self.output.shape
        count = shape[0] if shape else 1
        entries = self.output.bytes // self.output.dtype.itemsize
        if entries < 2 * PART or self.task.tokenizer is not None or self.task.truncates:
            return count
        likes = [i.like if i.has_rows else None for i in self.inputs.values()]
        alike = all(like is not None and tuple(like.shape) == shape for like in likes)
        says = getattr(self.task.method, "entrywise", None)
        if not alike or says is None or not says(self.one):
            return count
        return max(1, PART * count // entries)

    @cached_property
    def one(self) -> OneTensor:
        """What the method says of itself depends on this."""
        role = role_of(compat.TensorMetadata.from_weight_info(self.task.output))
        return OneTensor(role, self.output.shape, len(self.inputs) - 1, self.task.parameters)

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is merged in one piece."""
        return not self.output.shape or self.rows >= self.output.shape[0]

    @cached_property
    def footprint(self) -> int:
        """Bytes of memory while the tensor is merged, at most; estimated."""
        found = [(i.like, i.is_copied) for i in self.inputs.values() if i.like is not None]
        entries = max((like.numel() for like, _ in found), default=0)
        # An input counts as it is mapped, and once more where it is copied on reading.
        read = sum(like.nbytes * (1 + is_copied) for like, is_copied in found)
        says = getattr(self.task.method, "work", None)
        work = None if says is None else says(self.one)
        if work is None:
            work = entries * (WORK_BYTES + WORK_BYTES_EXPERT * len(found))
        work *= 1 + any(like.dtype == torch.float64 for like, _ in found)
        total = read + self.output.bytes + work
        return total if self.is_whole else -(-total * self.rows // self.output.shape[0])


@dataclass
class Workers:
    """What every worker needs."""

    writer: Writer
    notes: Journal
    tokenizer: Any
    options: MergeOptions
    advance: Callable[[int], Any]

    def __post_init__(self) -> None:
        self._turn = threading.Lock()
        self._here = threading.local()

    def start(self) -> None:
        """Called once in every thread or process."""
        torch.set_num_threads(1)
        self._here.lane = Lane(self.options.device or "cpu")
        compat.set_loader_options(self.options)

    def work_all(self, jobs: Sequence[Job]) -> list[str]:
        """Work on one after the other; gives their hashes."""
        return [self.work(job) for job in jobs]

    def work(self, job: Job) -> str:
        """Read, merge and write one tensor; gives the hash of its bytes."""
        parts = self._whole(job) if job.is_whole else self._parts(job)
        return self.writer.write(job.output.name, parts)

    def note(self, jobs: Sequence[Job], digests: Sequence[str]) -> None:
        """Note tensors that are written; called by one thread alone."""
        for job, digest in zip(jobs, digests, strict=True):
            self.writer.done(job.output.name)
            self.notes.add(job.output.name, digest)
            self.advance(job.output.bytes)

    def _whole(self, job: Job) -> Iterator[torch.Tensor]:
        read = {m: i.read() for m, i in job.inputs.items()}
        with _giving_back(job):
            result = self._merged(job, {m: t for m, t in read.items() if t is not None})
        del read
        yield result
        for one in job.inputs.values():
            one.advise(mmap.MADV_DONTNEED)

    def _parts(self, job: Job) -> Iterator[torch.Tensor]:
        read = {m: i.stored_tensor() for m, i in job.inputs.items()}
        dtypes = {m: i.like.dtype for m, i in job.inputs.items() if i.like is not None}
        count = job.output.shape[0]
        for start in range(0, count, job.rows):
            rows = slice(start, min(start + job.rows, count))
            try:
                result = self._merged(
                    job, {m: t[rows].to(dtypes[m]) for m, t in read.items()}, rows
                )
            except NonFiniteError:  # once more as a whole, for it says how many entries are bad
                self._merged(job, {m: t.to(dtypes[m]) for m, t in read.items()})
                raise
            yield result
            for one in job.inputs.values():
                one.give_back(rows.start / count, rows.stop / count)

    def _merged(self, job: Job, tensors: Tensors, rows: slice | None = None) -> torch.Tensor:
        with self._turn if self._takes_turns(job) else nullcontext():
            result = self._here.lane.merged(
                tensors, lambda here: job.task.compute(here, self.tokenizer)
            )
        shape, dtype = job.output.shape, job.output.dtype
        if rows is not None:
            shape = (rows.stop - rows.start, *shape[1:])
        if result is None or (result.shape, result.dtype) != (shape, dtype):
            found = "nothing" if result is None else f"{list(result.shape)} {result.dtype}"
            raise CannotStreamError(
                f"the method gave {found} for {job.output.name}, not {list(shape)} {dtype}"
            )
        return result

    def _takes_turns(self, job: Job) -> bool:
        """Whether one thread at a time computes, while others write.

        A method that goes `by_pieces` calls torch for microseconds at a time, and two threads that
        do so hand Python's lock to and fro: up to twice the CPU time of one, and little or nothing
        gained on the clock (recipes/LOG.md). Whoever asks for `--num-threads` gets them.
        """
        by_pieces = getattr(job.task.method, "by_pieces", False)
        on_cpu = self.options.device in (None, "cpu")
        return by_pieces and on_cpu and not self.options.num_threads


@contextmanager
def _giving_back(job: Job) -> Iterator[None]:
    """Give the pages of mapped inputs back behind a kernel that goes through them by pieces."""
    entries = job.output.bytes // job.output.dtype.itemsize
    inputs = [i for i in job.inputs.values() if i.has_rows and not i.is_copied]
    begun = 0

    def passed(count: int, end: int) -> None:
        nonlocal begun
        if count != entries:
            return
        if end <= begun:  # another pass, from the beginning
            begun = 0
        if end - begun >= PART or end == entries:
            for one in inputs:
                one.give_back(begun / entries, end / entries)
            begun = end

    BEHIND.tell = passed if entries >= 2 * PART else None
    try:
        yield
    finally:
        BEHIND.tell = None


def merge_all(
    jobs: Sequence[Job], workers: Workers, settings: JobOptions, options: MergeOptions
) -> None:
    """Merge all tensors, as many at a time as there are workers and memory for."""
    budget = settings.memory_budget or _half_of_memory()
    if warning := over_budget(jobs, settings):
        LOG.warning(warning)
    used = 0
    running: dict[Future[list[str]], list[Job]] = {}

    def note_one() -> int:
        """Wait for a worker and note what it did; gives the footprint that is free again."""
        future = next(iter(wait(running, return_when=FIRST_COMPLETED).done))
        few = running.pop(future)
        workers.note(few, future.result())
        if workers.writer.hashes:
            hashing.submit(workers.writer.follow)
        return _footprint(few)

    with (
        _one_torch_thread(),
        _pool(jobs, workers, options) as pool,
        ThreadPoolExecutor(1, thread_name_prefix="sha256") as hashing,
    ):
        try:
            for few in _batches(jobs, pool.batch_bytes):
                needed = _footprint(few)
                while running and (len(running) > pool.count or used + needed > budget):
                    used -= note_one()
                for one in (i for job in few for i in job.inputs.values()):
                    one.advise(mmap.MADV_WILLNEED)
                used += needed
                running[pool.submit(few)] = few
            while running:
                note_one()
        except BaseException:
            pool.executor.shutdown(wait=True, cancel_futures=True)
            for future, few in running.items():
                if not future.cancelled() and future.exception() is None:
                    with suppress(Exception):  # a full disk, say, which is what is told anyway
                        workers.note(few, future.result())
            raise
        finally:
            hashing.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _pool(jobs: Sequence[Job], workers: Workers, options: MergeOptions) -> Iterator[processes.Pool]:
    """Processes or threads."""
    count = options.num_threads or cores()
    if forked := processes.how_many(jobs, count, options.device):
        with processes.forked(jobs, workers, forked) as pool:
            yield pool
        return
    with ThreadPoolExecutor(count, initializer=workers.start) as threads:

        def submit(few: Sequence[Job]) -> Future[list[str]]:
            return threads.submit(workers.work_all, few)

        yield processes.Pool(threads, submit, count, BATCH_BYTES)


def cores() -> int:
    """Those that this process may use, which on a cluster are a part of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def over_budget(jobs: Sequence[Job], settings: JobOptions) -> str:
    """What to say where the budget of a recipe does not hold every tensor; nothing otherwise."""
    largest = max(jobs, key=lambda job: job.footprint, default=None)
    budget = settings.memory_budget
    if largest is None or not budget or largest.footprint <= budget:
        return ""
    needed = -(-largest.footprint >> 20)
    return (
        f"{largest.output.name} alone takes about {needed:,} MiB, more than memory_budget: it is "
        f"merged by itself, and `memory_budget: {needed}MiB` is the least that holds every tensor"
    )


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Small tensors one after the other in one go: to pass them on by themselves takes longer."""
    few: list[Job] = []
    filled = 0
    for job in jobs:
        few.append(job)
        filled += job.output.bytes
        if filled >= size:
            yield few
            few, filled = [], 0
    if few:
        yield few


def _footprint(jobs: Sequence[Job]) -> int:
    """Of tensors that are merged one after the other."""
    return max(job.footprint for job in jobs)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Threads work on tensors, so torch needs none of its own: theirs would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
