"""mergekit's own methods by our kernels and engine, for who asks: `--fast`, or the environment.

A recipe, its output and its card are mergekit's; the card says which kernels computed it. Of the
job options `engine`, `memory_budget` and `verify` work here too, in the recipe's `parameters`,
where mergekit itself takes no notice of them. The files' sha256, which takes time that can be seen
beside a linear merge, is taken where `verify` asks for it, and then stands in the card.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergekit_unconstrained import __version__, compat, present
from mergekit_unconstrained.compat import MergeConfiguration, MergeOptions
from mergekit_unconstrained.config.recipe import JobOptionError, JobOptions, job_options
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.engine import journal, staging, streaming
from mergekit_unconstrained.engine.fast import FAST, fast_method
from mergekit_unconstrained.errors import RecipeError

RunMerge = Callable[..., Any]
"""mergekit's `run_merge`."""
LOG = logging.getLogger(__name__)
SWITCH = "MERGEKIT_UNCONSTRAINED_FAST"
JOB_KEYS = ("engine", "memory_budget", "verify")
"""Job options that mean something here."""


def is_asked_for() -> bool:
    """Whether the environment asks for the fast kernels."""
    return os.environ.get(SWITCH, "") not in ("", "0")


def run(
    run_merge: RunMerge,
    config: MergeConfiguration,
    out: Path,
    options: MergeOptions,
    source: str | None,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Carry out a recipe of one of mergekit's methods; by `run_merge` what we cannot do.

    source: the recipe's text where the front end still has it. overrides: values of JOB_KEYS that
    go before the recipe's.
    """
    name = config.merge_method
    source = source or config.to_yaml()
    job = _job_options({**(config.parameters or {}), **(overrides or {})})
    try:
        if name not in FAST:
            raise streaming.CannotStreamError(f"there is no fast kernel for {name!r}")
        if job.engine == "mergekit":
            raise streaming.CannotStreamError("the recipe's `engine` asks for them")
        _warn_of_ignored(config)
        started = time.monotonic()
        with compat.configs_read_once():
            work = _work(config, options, job)
            _merge(work, config, out, options, source)
    except streaming.CannotStreamError as error:
        LOG.warning("merging with mergekit's own kernels and executor: %s", error)
        run_merge(config, str(out), options, source)
        return
    if not options.quiet:
        took = present.duration(time.monotonic() - started)
        message = f"{out}: {len(work.tasks):,} tensors merged by {name}, {_said(name)}, in "
        present.console.print(message + took, markup=False, highlight=False)


def _job_options(given: Mapping[str, Any]) -> JobOptions:
    try:
        return job_options({k: v for k, v in given.items() if k in JOB_KEYS})
    except JobOptionError as error:
        raise RecipeError(f"`parameters: {error.name}` {error}") from None


def _warn_of_ignored(config: MergeConfiguration) -> None:
    """Name the parameters that mergekit passes over in silence."""
    known = {p.name for p in compat.get(config.merge_method).spec.parameters}
    places = [config.parameters, *(m.parameters for m in config.models or ())]
    for name in dict.fromkeys(k for given in places for k in given or {}):
        if name not in known and name not in JOB_KEYS:
            LOG.warning(
                "%r has no parameter %r, so it does nothing. %s",
                config.merge_method,
                name,
                suggest(name, (*known, *JOB_KEYS)),
            )


def _said(name: str) -> str:
    return f"fast kernel ({FAST[name].relation})"


def _work(config: MergeConfiguration, options: MergeOptions, job: JobOptions) -> streaming.Work:
    """Plan the recipe as mergekit does, with our variant of its method."""
    compat.forget_loaders()
    architecture = compat.get_architecture_info(config, options)
    if (reason := streaming.refusal(architecture, options)) is not None:
        raise streaming.CannotStreamError(reason)
    out_config = compat.output_config(config, architecture, options.trust_remote_code)
    cache = compat.set_loader_options(options)
    references = config.referenced_models()
    headers = {r: cache.get(r).index.tensor_paths for r in references}
    method = fast_method(config.merge_method, options.random_seed or 0)
    variant = config.model_copy(update={"merge_method": method.spec.name})
    try:
        tasks = compat.plan_tasks(variant, architecture, options, out_config, headers)
    except ValueError as error:  # mergekit's own words, without its traceback
        raise RecipeError(f"the recipe cannot be planned: {error}") from error
    trust = options.trust_remote_code
    types = {r: getattr(r.config(trust_remote_code=trust), "model_type", "") for r in references}
    base = config.base_model
    return streaming.Work(tasks, types, base, config, architecture, out_config, job, hashes=False)


def _merge(
    work: streaming.Work, config: MergeConfiguration, out: Path, options: MergeOptions, source: str
) -> None:
    cache = compat.set_loader_options(options)
    indices = [cache.get(r).index for r in work.types]
    files = sorted({Path(i.base_path) / f for i in indices for f in set(i.tensor_paths.values())})
    job = hashlib.sha256(f"{source}\0{options.random_seed}\0fast".encode()).hexdigest()
    total = 0 if options.quiet else sum(f.stat().st_size for f in files) // max(1, len(work.types))
    with staging.staged(out, job, journal.NAME) as partial:
        identity = journal.identity_of(job, files)
        with present.byte_progress("merging", total) as advance:
            digests = streaming.merge(work, partial, options, identity, advance)
        if options.write_model_card:
            compat.write_card(config, source, partial, out.name)
            with (partial / "README.md").open("a", encoding="utf-8") as card:
                card.write(
                    f"\nMerged with the {_said(config.merge_method)} of mergekit-unconstrained "
                    f"{__version__}.\n"
                )
                for file, digest in sorted(digests.items()):
                    card.write(f"\n* `{file}`: sha256 `{digest}`, read back\n")
