"""Worker processes, for methods that call torch again and again on little.

Two threads that do so hand Python's lock to and fro, and take up to twice the CPU time of one
(recipes/LOG.md); two processes do not know of each other. They are forked, so that they have the
plan, the mapped parents and the open output without anything being sent to them: what travels are
names of tensors there and hashes back. A forked process ends when the one that forked it does, even
where that is killed, leaves signals from the terminal to it, and sends it what is logged.

A method says that it may be merged so by `in_processes`: it keeps nothing from one tensor to the
next and draws no bars. Linux only: elsewhere a forked process may not use the system's libraries.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from logging.handlers import QueueHandler, QueueListener
from typing import TYPE_CHECKING, Any

from mergekit_unconstrained.errors import WorkerKilledError

if TYPE_CHECKING:
    from mergekit_unconstrained.engine.workers import Job, Workers

LINUX = sys.platform == "linux"
WORTH_A_PROCESS = 32 << 20
"""Bytes of output for which a process gains more than starting it takes (some 20 ms)."""
BATCH_BYTES = 16 << 20
"""Bytes of tensors that a process is given at a time, at most; to give them costs 1 ms."""
BATCHES = 8
"""How often every process is given some, at least, so that all end together."""
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Pool:
    """Workers. submit: gives tensors to one of them, batch_bytes together where they are small."""

    executor: Executor
    submit: Callable[[Sequence[Job]], Future[list[str]]]
    count: int
    batch_bytes: int


def how_many(jobs: Sequence[Job], most: int, device: str | None) -> int:
    """How many forked processes to merge these tensors by; 0 where threads are better."""
    count = min(most, _bytes(jobs) // WORTH_A_PROCESS)
    if not LINUX or device not in (None, "cpu") or count < 2:
        return 0
    allowed = all(getattr(job.task.method, "in_processes", False) for job in jobs)
    return count if allowed and _has_semaphores() else 0


def _bytes(jobs: Sequence[Job]) -> int:
    return sum(job.output.bytes for job in jobs)


def _has_semaphores() -> bool:
    """Some containers have no shared memory, without which processes cannot wait for each other."""
    try:
        multiprocessing.get_context("fork").Lock()
    except (ImportError, OSError):
        return False
    return True


@contextmanager
def forked(jobs: Sequence[Job], workers: Workers, count: int) -> Iterator[Pool]:
    """So many processes; WorkerKilledError where one is killed."""
    context = multiprocessing.get_context("fork")
    records = context.Queue()
    listener = QueueListener(records, _Again())
    held = {job.output.name: job for job in jobs}
    batch_bytes = min(BATCH_BYTES, _bytes(jobs) // (BATCHES * count))
    pool = ProcessPoolExecutor(
        count, context, initializer=_begin, initargs=(os.getpid(), workers, held, records)
    )

    def submit(few: Sequence[Job]) -> Future[list[str]]:
        return pool.submit(_work, [job.output.name for job in few])

    thaws = not gc.get_freeze_count()
    gc.freeze()  # or looking for garbage would copy every page of what is shared
    try:
        with warnings.catch_warnings():
            # Python 3.12 and later: of threads that hold locks, which a worker never asks for.
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(_nothing).result()
        listener.start()
        try:
            with pool:
                yield Pool(pool, submit, count, batch_bytes)
        finally:
            listener.stop()
    except BrokenProcessPool as error:
        raise WorkerKilledError(
            "a process that merged was killed, most likely because the memory was full: run the "
            "same command again to go on, with `--num-threads 1` to take less memory"
        ) from error
    finally:
        if thaws:
            gc.unfreeze()
        records.close()


class _Again(logging.Handler):
    """Logs here what a worker logged."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)


# -- in a worker ----------------------------------------------------------------------------------

_workers: Workers
_jobs: Mapping[str, Job]


def _begin(parent: int, workers: Workers, jobs: Mapping[str, Job], records: Any) -> None:
    global _workers, _jobs
    _workers, _jobs = workers, jobs
    ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.root.handlers[:] = [QueueHandler(records)]
    logging.captureWarnings(capture=True)
    workers.start()


def _work(names: Sequence[str]) -> list[str]:
    try:
        return _workers.work_all([_jobs[name] for name in names])
    except BaseException as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


def _nothing() -> None:
    """All processes are forked with the first thing that they are given."""
