"""What a merge takes of memory for every tensor, beside what the engine reckons with.

    python tests/bench/growth.py RECIPE OUT

Merges in this process by one thread and prints JSON: `prepass`, the bytes by which the process grew
at most in the pre-pass, and `tensors`: name, shape, footprint, and the bytes by which it grew at
most while the tensor was merged. Linux only.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_unconstrained import compat
from mergekit_unconstrained.engine import prepass
from mergekit_unconstrained.engine.plan import make_plan
from mergekit_unconstrained.engine.workers import Job, Workers
from mergekit_unconstrained.jobs import load_recipe, weights

found: dict[str, Any] = {"prepass": 0, "tensors": []}


def resident(key: str) -> int:
    """Bytes in memory: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def growth(run: Callable[[], Any]) -> tuple[int, Any]:
    """By how many bytes the process grows at most; and what it returns."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    before = resident("VmRSS")
    result = run()
    return resident("VmHWM") - before, result


def main(recipe: str, out: str) -> None:
    work, measure = Workers.work, prepass.measure

    def measured_work(self: Workers, job: Job) -> str:
        grown, digest = growth(functools.partial(work, self, job))
        found["tensors"].append([job.output.name, job.output.shape, job.footprint, grown])
        return digest

    def measured_prepass(*args: Any, **kwargs: Any) -> Any:
        found["prepass"], result = growth(functools.partial(measure, *args, **kwargs))
        return result

    Workers.work, prepass.measure = measured_work, measured_prepass  # type: ignore[method-assign]
    document, config, method = load_recipe(recipe)
    options = compat.MergeOptions(num_threads=1, copy_tokenizer=False, quiet=True)
    plan = make_plan(document, config, method, options)
    weights.merge_into(Path(out), compat.run_merge, plan, options)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
