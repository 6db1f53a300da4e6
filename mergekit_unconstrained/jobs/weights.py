"""Job A, a method that works tensor by tensor.

check -> plan -> stage in OUT.partial -> run -> card -> rename
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mergekit_unconstrained import __version__, compat, present
from mergekit_unconstrained.catalog import entry_for
from mergekit_unconstrained.compat import (
    MergeConfiguration,
    MergeMethod,
    MergeOptions,
    ParameterScope,
)
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.engine import budget, journal, notices, prepass, staging, streaming
from mergekit_unconstrained.engine.context import MergeContext, using
from mergekit_unconstrained.engine.digest import BackgroundDigests
from mergekit_unconstrained.engine.plan import VARIES, Plan, make_plan
from mergekit_unconstrained.hub import record
from mergekit_unconstrained.hub.facts import DataSet
from mergekit_unconstrained.jobs import whole_model
from mergekit_unconstrained.jobs.fast import RunMerge
from mergekit_unconstrained.jobs.publishing import Publication, without_keys
from mergekit_unconstrained.resources import cache_dir

LOG = logging.getLogger(__name__)


def estimate_seconds(plan: Plan) -> float:
    """Time of the arithmetic, from one merge of a random matrix on this machine."""
    entry = entry_for(plan.method.spec.name)
    matrices = entry is not None and entry.cost == "matrices"
    side = 256 if matrices else 1024
    cells = [next(iter(c.values()), None) for c in plan.coefficients.values()]
    generator = torch.Generator().manual_seed(0)
    count = len(cells) + 1
    sample = [torch.randn(side, side, generator=generator).bfloat16() for _ in range(count)]
    name = next((t.name for t in plan.tensors if t.role.kind == "up"), "sample")
    group = compat.TensorGroup.from_tensors(sample, base_index=0, name=name)
    parameters = {k: v for k, v in plan.shared.items() if v != VARIES}
    if "coefficients" in parameters:
        parameters["coefficients"] = ""
    own = {p.name for p in plan.method.spec.parameters if p.scope != ParameterScope.SHARED}
    for name in own & {"weight", "density"}:
        values = [getattr(c, name, None) for c in cells]
        parameters[name] = [1.0 if v is None else v for v in values]
    if "scope" in parameters:
        parameters["scope"] = "tensor"
    started = time.perf_counter()
    plan.method((group,), parameters=parameters)
    elapsed = time.perf_counter() - started
    shapes = [(t.shape, t.role) for t in plan.tensors if t.shape is not None]
    if matrices:
        inner = [s for s, role in shapes if len(s) == 2 and role.layer is not None]
        return elapsed * sum(math.prod(s) * min(s) for s in inner) / side**3
    return elapsed * sum(math.prod(s) for s, _ in shapes) / side**2


def show(plan: Plan, out: Path | None, options: MergeOptions, seconds: float | None = None) -> None:
    """Print what a plan would do, and what is worth saying of it."""
    measures = whole_model.measures_of(plan)
    beforehand = prepass.bytes_read(measures, plan.tensors, plan.base.name)
    present.print_plan(plan, out, budget.most_memory(plan), beforehand, seconds)
    for said in notices.before(plan, options):
        LOG.warning(said)
    Publication(plan.job, "", (plan.base, *plan.experts)).warn()


@compat.configs_read_once()
def run_job(
    run_merge: RunMerge,
    method: MergeMethod,
    config: MergeConfiguration,
    out: Path,
    options: MergeOptions,
    document: Document,
    *,
    finishing: Callable[[Path], None] = lambda _: None,
    data: Sequence[DataSet] = (),
    publication: Publication | None = None,
) -> None:
    """Carry out a recipe of a tensor method; OUT appears when it is complete, and is published.

    finishing: may add files to the finished folder before it gets its name. data: what the
    coefficients were chosen on, for the card. publication: what is asked for, where the recipe that
    the user wrote is another one.
    """
    started = time.monotonic()
    plan = make_plan(document, config, method, options)
    whole_model.measures_of(plan)
    parents = (plan.base, *plan.experts)
    if plan.job.dry_run:
        show(plan, out, options)
        return
    for said in notices.same_models(plan):
        LOG.warning(said)
    plan = dataclasses.replace(plan, document=without_keys(plan.document))
    if publication is None:
        publication = Publication(plan.job, _job_hash(plan), parents, quiet=options.quiet)
        publication.check(card=options.write_model_card)
    if publication.goes_on(out):
        publication.push(out)
        return
    staging.check_out(out)
    if not staging.partial_of(out).exists():
        staging.check_space(out, int(plan.out_bytes * 1.02))
    digests = BackgroundDigests(plan.files)
    try:
        with staging.staged(out, _recipe_hash(plan), journal.NAME) as partial:
            written = _merge_weights(partial, run_merge, plan, options)
            seconds = time.monotonic() - started
            plan = record.resolved(plan, options)
            record.lay_out(plan, partial, out.name, options)
            finishing(partial)
            record.describe(plan, partial, out.name, digests, seconds, options, data, written)
            publication.note(partial)
    finally:
        digests.close()
    if not options.quiet:
        present.print_summary(plan, out, time.monotonic() - started)
    publication.push(out)


def merge_into(folder: Path, run_merge: RunMerge, plan: Plan, options: MergeOptions) -> None:
    """Write a plan's merged weights, config and tokenizer into a folder, without a card."""
    _merge_weights(folder, run_merge, plan, options)
    streaming.forget(folder)


def _merge_weights(
    folder: Path, run_merge: RunMerge, plan: Plan, options: MergeOptions
) -> Mapping[str, str]:
    """Merge by the streaming engine, or by mergekit's executor where that cannot.

    Gives file name -> sha256 where the engine knows them; its journal stays in the folder.
    """
    compat.forget_loaders()
    run_options = apply_adapters((plan.base, *plan.experts), options).model_copy(
        update={
            "write_model_card": False,  # ours replaces it
            "copy_tokenizer": options.copy_tokenizer and plan.base_has_tokenizer,
        }
    )
    out_dtype = compat.dtype_from_name(plan.config.out_dtype)
    statistics = whole_model.statistics(plan, run_options)
    context = MergeContext(plan.roles, plan.job.allow_nan, out_dtype, statistics, options.quiet)
    with using(context):
        reason = ""
        if plan.job.engine == "streaming":
            reason = streaming.refusal(plan.architecture, run_options) or ""
            if not reason:
                try:
                    return _stream(folder, plan, run_options)
                except streaming.CannotStreamError as error:
                    reason = str(error)
            LOG.warning("merging with mergekit's executor, which cannot be resumed: %s", reason)
        streaming.clear(folder)
        run_merge(plan.config.model_copy(deep=True), str(folder), run_options, None)
    return {}


def _stream(folder: Path, plan: Plan, options: MergeOptions) -> Mapping[str, str]:
    """Merge by the engine of this package, with a bar."""
    files = [f for p in (plan.base, *plan.experts) for f in (*p.weight_files, *p.adapter_files)]
    identity = journal.identity_of(_recipe_hash(plan), files)
    total = 0 if options.quiet else plan.out_bytes
    work = streaming.Work.of(plan)
    with present.byte_progress("merging", total) as advance:
        return streaming.merge(work, folder, options, identity, advance)


def apply_adapters(parents: Sequence[Parent], options: MergeOptions) -> MergeOptions:
    """Apply every parent's adapter beforehand, each into a folder that appears when complete.

    mergekit knows an applied adapter by its path alone. In our own cache the folder depends on the
    files' sizes and times too, so that a retrained adapter is not taken for the old one.
    """
    adapters = [p for p in parents if p.reference.lora is not None]
    if not adapters:
        return options
    if options.lora_merge_cache:
        cache = Path(options.lora_merge_cache)
    else:
        cache = cache_dir() / "adapters" / files_hash(parents)[:16]
    cache.mkdir(parents=True, exist_ok=True)
    options = options.model_copy(update={"lora_merge_cache": str(cache)})
    for parent in adapters:
        with present.status(f"applying the adapter of {parent.name}", options.quiet):
            compat.merge_adapter(parent.reference, cache, options)
    return options


def _job_hash(plan: Plan) -> str:
    """What makes two results the same: recipe, coefficient table, parents' files, version."""
    identity = files_hash((plan.base, *plan.experts))
    content = json.dumps([_recipe_hash(plan), identity, __version__])
    return hashlib.sha256(content.encode()).hexdigest()


def _recipe_hash(plan: Plan) -> str:
    """What makes two jobs the same: recipe and coefficient table.

    The journal of a merge holds the parents' files and the version beside it.
    """
    table = plan.table.document.text if plan.table is not None else None
    content = json.dumps([plan.document.data, table], default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def files_hash(parents: Sequence[Parent]) -> str:
    """Identity of the parents' files: names, sizes and times."""
    paths = [f for p in parents for f in (*p.weight_files, *p.adapter_files)]
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in paths]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
