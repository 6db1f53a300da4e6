"""What a merge costs: processor time and memory, from the parents' files to the result's.

In a process forked for it, so that neither start-up nor what this process holds is counted.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeConfiguration, MergeOptions
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.engine.plan import make_plan
from mergekit_unconstrained.errors import UnconstrainedError
from mergekit_unconstrained.jobs.weights import merge_into


@dataclass(frozen=True)
class Cost:
    """seconds of processor time in one thread, and bytes of memory beyond those at the start."""

    seconds: float
    memory: int


def cost_of(document: Document, options: MergeOptions) -> Cost | None:
    """Run a recipe into a temporary folder and measure it; None where a process cannot fork.

    UnconstrainedError says why a merge failed.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_merge, args=(there, document, options))
    with warnings.catch_warnings():
        # Python 3.12 warns of other threads, of which the child uses none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    there.close()
    try:
        found: Any = here.recv()
    except EOFError:
        found = "its process died"
    finally:
        child.join()
    if isinstance(found, str):
        raise UnconstrainedError(f"the merge through files failed: {found}")
    return Cost(*found)


def _merge(report: Connection, document: Document, options: MergeOptions) -> None:
    """In the child: merge, and report what it took."""
    import resource

    torch.set_num_threads(1)  # pools of threads do not survive a fork
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    before = psutil.Process().memory_info().rss
    options = options.model_copy(
        update={"quiet": True, "write_model_card": False, "copy_tokenizer": False}
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MERGEKIT_UNCONSTRAINED_CACHE"] = str(Path(folder) / "cache")
            config = MergeConfiguration.model_validate(document.data)
            method = compat.get(config.merge_method)
            out = Path(folder) / "out"
            started = resource.getrusage(resource.RUSAGE_SELF)
            if compat.is_ours(method):
                merge_into(out, compat.run_merge, make_plan(document, config, method, options),
                           options)  # fmt: skip
            else:
                compat.forget_loaders()
                compat.run_merge(config, str(out), options)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = used.ru_utime + used.ru_stime - started.ru_utime - started.ru_stime
        report.send((seconds, max(0, used.ru_maxrss * 1024 - before)))
    except Exception as error:
        report.send(" ".join(str(error).split())[:300] or type(error).__name__)
    finally:
        report.close()
