"""The composition root: the life of a job, and the only place that wires the layers together.

    check -> plan -> stage in OUT.partial -> run -> card -> rename

weights.py runs job A (a tensor method), fusing.py job B (distribution fusion), mixture.py both in
one recipe. Every front end of mergekit comes here through the hook (`run`); our own command too.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_unconstrained import compat
from mergekit_unconstrained.catalog import ALIAS_PREFIX
from mergekit_unconstrained.compat import MergeConfiguration, MergeMethod, MergeOptions
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.engine import staging
from mergekit_unconstrained.engine.plan import make_plan
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.jobs import fast
from mergekit_unconstrained.jobs.fast import RunMerge
from mergekit_unconstrained.jobs.recipes import document_of, load_recipe

LOG = logging.getLogger(__name__)

__all__ = [
    "check",
    "fuse_until",
    "fusion_status",
    "inspect_fusion",
    "load_recipe",
    "run",
    "run_recipe",
    "show_plan",
]


def run(
    run_merge: RunMerge,
    config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    source: str | None = None,
) -> None:
    """What `mergekit.merge.run_merge` does for the methods of plugins while the hook is active.

    mergekit's own methods come here where the environment asks for fast kernels.
    run_merge: mergekit's own. source: the recipe's text where the front end still has it.
    """
    method = compat.get(config.merge_method)
    if compat.is_builtin(method):
        fast.run(run_merge, config, Path(out_path), options, source)
    elif compat.is_ours(method):
        _run(run_merge, method, config, Path(out_path), options, document_of(config, source))
    elif hasattr(method, "merge_models"):
        method.merge_models(config, out_path, options, source)
    else:
        run_merge(config, out_path, options, source)


def run_recipe(
    path: str,
    out: str,
    options: MergeOptions,
    overrides: Mapping[str, Any] | None = None,
    *,
    fast_kernels: bool = False,
) -> None:
    """Our own front end: as mergekit-yaml, with clear errors from the first byte of the recipe.

    overrides: job options set on the command line; they become keys of the recipe's `parameters`.
    fast_kernels: run mergekit's own methods by our kernels (ours always are).
    """
    document, config, method = load_recipe(path)
    overrides = overrides or {}
    is_fast = compat.is_builtin(method) and (fast_kernels or fast.is_asked_for())
    useless = [k for k in overrides if not is_fast or k not in fast.JOB_KEYS]
    if useless and not compat.is_ours(method):
        than = ", or with --fast" if set(useless) <= set(fast.JOB_KEYS) else ""
        raise RecipeError(
            f"{path}: {_options(useless)} for our methods only{than}, and "
            f"{method.spec.name!r} is mergekit's own"
        )
    if fast_kernels and compat.is_ours(method):
        LOG.warning("--fast is for mergekit's own methods: %s is always so", method.spec.name)
    if is_fast:
        fast.run(compat.run_merge, config, Path(out), options, document.text, overrides)
    elif compat.is_builtin(method):
        compat.run_merge(config, out, options, document.text)
    elif not compat.is_ours(method):
        run(compat.run_merge, config, out, options, document.text)
    else:
        if overrides:
            # Into the text, so that the recipe that is kept with the result says it too.
            parameters = {**(document.data.get("parameters") or {}), **overrides}
            text = yaml.safe_dump({**document.data, "parameters": parameters}, sort_keys=False)
            document = dataclasses.replace(Document.parse(text, path), file_lines=document.lines)
        _run(compat.run_merge, method, config, Path(out), options, document)


def _options(keys: Sequence[str]) -> str:
    names = ", ".join("--" + key.replace("_", "-") for key in keys)
    return f"{names} {'is' if len(keys) == 1 else 'are'}"


def check(path: str, options: MergeOptions) -> str:
    """Check a recipe of ours against its parents; gives what it is, in a few words."""
    document, config, method = _ours(path)
    if isinstance(method, compat.ModelMethod):
        job = whole_models(method)
        found = job.plan(document, config, method, options)
        job.examine(found)
        return str(found.summary)
    from mergekit_unconstrained.engine import notices
    from mergekit_unconstrained.jobs import whole_model

    plan = make_plan(document, config, method, options)
    whole_model.measures_of(plan)
    for said in notices.before(plan, options):
        LOG.warning(said)
    count = len(plan.experts)
    experts = f"{count} expert{'s' if count != 1 else ''}"
    return f"{method.spec.name}, {experts}, {len(plan.tensors):,} tensors, {plan.layers} layers"


def show_plan(path: str, out: Path | None, options: MergeOptions) -> None:
    """Print what a recipe would do, with times measured on a sample."""
    document, config, method = _ours(path)
    if out is not None:
        staging.check_out(out)
    if isinstance(method, compat.ModelMethod):
        job = whole_models(method)
        job.show(job.plan(document, config, method, options), out)
    else:
        from mergekit_unconstrained.jobs import weights

        plan = make_plan(document, config, method, options)
        weights.show(plan, out, options, weights.estimate_seconds(plan))


def fuse_until(path: str, out: Path, options: MergeOptions, step: str) -> None:
    """Run the stages of a fusion up to one of fusing.STEPS."""
    plan, job = _fusion(path, out, options)
    job.fuse(plan, out, options, compat.run_merge, step)


def fusion_status(path: str, out: Path, options: MergeOptions) -> None:
    """Print what a fusion's work folder holds."""
    from mergekit_unconstrained.jobs import fusing, mixture

    found = _planned_fusion(path, options)
    if isinstance(found, mixture.Mixture):
        found = found.fusion
    fusing.status(found, out)


def inspect_fusion(
    path: str, out: Path, options: MergeOptions, row: int | None, positions: int
) -> None:
    """Print how one conversation's distributions reach the pivot."""
    plan, job = _fusion(path, out, options)
    job.inspect(plan, out, options, row, positions)


def _fusion(path: str, out: Path, options: MergeOptions) -> tuple[Any, Any]:
    """The fusion's plan of a recipe, groups merged, and the module that runs it."""
    from mergekit_unconstrained.jobs import fusing, mixture

    found = _planned_fusion(path, options)
    if isinstance(found, mixture.Mixture):
        assert found.fusion is not None
        found = mixture.merged_groups(found, found.fusion, out, options, compat.run_merge)
    return found, fusing


def _planned_fusion(path: str, options: MergeOptions) -> Any:
    """The plan of a recipe in which something is fused: a FusionPlan or a Mixture with one."""
    from mergekit_unconstrained.jobs import mixture

    document, config, method = _ours(path)
    if not isinstance(method, compat.ModelMethod):
        raise RecipeError(
            f"{document.where(('merge_method',))}: {method.spec.name!r} merges weights; `fuse` is "
            "for `distribution_fusion` and `unconstrained`"
        )
    found = whole_models(method).plan(document, config, method, options)
    if isinstance(found, mixture.Mixture) and found.fusion is None:
        raise RecipeError(f"{path}: all its models are merged in one group; nothing is fused")
    return found


def whole_models(method: MergeMethod) -> Any:
    """The module that runs a method of whole models: its functions plan, examine, show and
    run."""
    from mergekit_unconstrained.jobs import fusing, mixture  # they bring datasets and more

    name = method.spec.name.removeprefix(ALIAS_PREFIX)
    return {"distribution_fusion": fusing, "unconstrained": mixture}[name]


def _run(
    run_merge: RunMerge,
    method: MergeMethod,
    config: MergeConfiguration,
    out: Path,
    options: MergeOptions,
    document: Document,
) -> None:
    if isinstance(method, compat.ModelMethod):
        whole_models(method).run(run_merge, method, config, out, options, document)
    else:
        from mergekit_unconstrained.jobs import weights  # it brings the Hub's side

        weights.run_job(run_merge, method, config, out, options, document)


def _ours(path: str) -> tuple[Document, MergeConfiguration, MergeMethod]:
    document, config, method = load_recipe(path)
    if not compat.is_ours(method):
        raise RecipeError(
            f"{document.where(('merge_method',))}: {method.spec.name!r} is mergekit's own method; "
            "only recipes of ours can be checked and planned"
        )
    return document, config, method
