"""The composition root: the life of a job, and the only place that wires the layers together.

    check -> plan -> stage in OUT.partial -> run -> card -> rename

Every front end of mergekit comes here through the hook (`run`); our own command too.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from pydantic import ValidationError

from mergekit_unconstrained import __version__, compat, present
from mergekit_unconstrained.compat import MergeConfiguration, MergeMethod, MergeOptions
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.recipe import check_recipe
from mergekit_unconstrained.config.show import print_grid
from mergekit_unconstrained.engine import staging, starting_tables
from mergekit_unconstrained.engine.context import MergeContext, using
from mergekit_unconstrained.engine.digest import BackgroundDigests
from mergekit_unconstrained.engine.plan import VARIES, Plan, make_plan
from mergekit_unconstrained.engine.starting_tables import StartKind
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.hub import record
from mergekit_unconstrained.resources import cache_dir

RunMerge = Callable[..., Any]


def run(
    run_merge: RunMerge,
    config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    source: str | None = None,
) -> None:
    """What `mergekit.merge.run_merge` does for the methods of plugins while the hook is active.

    run_merge: mergekit's own. source: the recipe's text where the front end still has it.
    """
    method = compat.get(config.merge_method)
    if compat.is_ours(method):
        document = _document(config, source)
        _run_job(run_merge, method, config, Path(out_path), options, document)
    elif hasattr(method, "merge_models"):
        method.merge_models(config, out_path, options, source)
    else:
        run_merge(config, out_path, options, source)


def run_recipe(
    path: str, out: str, options: MergeOptions, overrides: Mapping[str, Any] | None = None
) -> None:
    """Our own front end: as mergekit-yaml, with clear errors from the first byte of the recipe.

    overrides: job options set on the command line; they become keys of the recipe's `parameters`.
    """
    document, config, method = load_recipe(path)
    if not compat.is_ours(method):
        if overrides:
            raise RecipeError(
                f"{path}: {', '.join(overrides)} work with our methods only, and "
                f"{method.spec.name!r} is mergekit's own"
            )
        run(compat.run_merge, config, out, options, document.text)
        return
    if overrides:
        # Into the text, so that the recipe that is kept with the result says it too.
        parameters = {**(document.data.get("parameters") or {}), **overrides}
        text = yaml.safe_dump({**document.data, "parameters": parameters}, sort_keys=False)
        document = Document.parse(text, path)
    _run_job(compat.run_merge, method, config, Path(out), options, document)


def load_recipe(path: str) -> tuple[Document, MergeConfiguration, MergeMethod]:
    """Read a recipe file for our own commands: one clear error for whatever is wrong with it."""
    document = Document.read(path)
    if not isinstance(document.data, dict):
        document.fail((), "a recipe is a mapping with `merge_method` and `models`")
    if "merge_method" not in document.data:
        document.fail((), "names no `merge_method`")
    method = compat.get(str(document.data["merge_method"]))
    try:
        config = MergeConfiguration.model_validate(document.data)
    except Exception as error:
        if compat.is_ours(method):
            check_recipe(document, method)  # names the place, where pydantic only names the type
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            place = tuple(part for part in first["loc"] if part in _parts(document))
            document.fail(place, f"{first['input']!r} will not do: {first['msg']}")
        raise RecipeError(f"{path}: {' '.join(str(error).split())}") from error
    return document, config, method


def _parts(document: Document) -> set[str | int]:
    """Every word and index that a place in a document may hold."""
    return {part for place in document.lines for part in place}


def plan_recipe(path: str, options: MergeOptions | None = None) -> Plan:
    """Check a recipe of one of our methods and say what it would do."""
    document, config, method = load_recipe(path)
    if not compat.is_ours(method):
        raise RecipeError(
            f"{document.where(('merge_method',))}: {method.spec.name!r} is mergekit's own method; "
            "only recipes of ours can be checked and planned"
        )
    return make_plan(document, config, method, options or MergeOptions())


def starting_table(models: list[str], start: StartKind, lora_merge_cache: str | None) -> str:
    """The text of a coefficient table for models[0] as base and the others as experts."""
    method = compat.get("layerwise")
    base, *experts = models
    data = {
        "merge_method": "layerwise",
        "base_model": base,
        "models": [{"model": e, "parameters": {"weight": 1.0}} for e in experts],
    }
    config = MergeConfiguration.model_validate(data)
    options = MergeOptions(lora_merge_cache=lora_merge_cache)
    plan = make_plan(Document("command line", data), config, method, options)
    if start != "uniform":
        options = _apply_adapters(plan, options)
    load = compat.tensor_loader(options)
    total = plan.in_bytes if start == "energy" else 0
    with present.byte_progress(f"reading {len(models)} models", total) as advance:
        table = starting_tables.starting_table(
            start, base, experts, plan.roles, load, progress=advance
        )
    command = "mergekit-unconstrained coefficients init " + shlex.join([*models, "--from", start])
    explanation = starting_tables.explain(start, len(experts), plan.layers)
    return starting_tables.dump_table(table, comment=f"{explanation}\n{command}")


def show_plan(path: str, out: Path | None, options: MergeOptions) -> None:
    """Print what a recipe would do, with a time measured on a sample."""
    plan = plan_recipe(path, options)
    if out is not None:
        staging.check_out(out)
    present.print_plan(plan, out, estimate_seconds(plan))


def show_coefficients(path: str) -> None:
    """Print what a recipe's coefficients come to, layer by kind."""
    plan = plan_recipe(path)
    print_grid(record.grid_of(plan), present.console)


def plot_coefficients(path: str, picture: Path) -> None:
    """Draw what a recipe's coefficients come to."""
    from mergekit_unconstrained.hub import heatmap  # brings matplotlib

    plan = plan_recipe(path)
    heatmap.draw(record.grid_of(plan), picture, title=Path(path).name)


def estimate_seconds(plan: Plan) -> float:
    """Time of the arithmetic, from one merge of a million random entries on this machine."""
    cells = [next(iter(c.values()), None) for c in plan.coefficients.values()]
    generator = torch.Generator().manual_seed(0)
    count = len(cells) + 1
    sample = [torch.randn(1024, 1024, generator=generator).bfloat16() for _ in range(count)]
    group = compat.TensorGroup.from_tensors(sample, base_index=0, name="sample")
    parameters = {k: v for k, v in plan.shared.items() if v != VARIES} | {"coefficients": ""}
    parameters["weight"] = [c.weight if c and c.weight is not None else 1.0 for c in cells]
    parameters["density"] = [c.density if c and c.density is not None else 1.0 for c in cells]
    known = {p.name for p in plan.method.spec.parameters}
    started = time.perf_counter()
    plan.method((group,), parameters={k: v for k, v in parameters.items() if k in known})
    elapsed = time.perf_counter() - started
    entries = sum(math.prod(t.shape) for t in plan.tensors if t.shape is not None)
    return elapsed * entries / sample[0].numel()


# -- the life of a job ----------------------------------------------------------------------------


def _run_job(
    run_merge: RunMerge,
    method: MergeMethod,
    config: MergeConfiguration,
    out: Path,
    options: MergeOptions,
    document: Document,
) -> None:
    started = time.monotonic()
    plan = make_plan(document, config, method, options)
    if plan.job.dry_run:
        present.print_plan(plan, out)
        return
    staging.check_out(out)
    staging.check_space(out, int(plan.out_bytes * 1.02))
    compat.forget_loaders()
    digests = BackgroundDigests(plan.files)
    try:
        with staging.staged(out, _job_hash(plan)) as partial:
            run_options = _apply_adapters(plan, options).model_copy(
                update={
                    "write_model_card": False,  # ours replaces it
                    "copy_tokenizer": options.copy_tokenizer and plan.base_has_tokenizer,
                }
            )
            out_dtype = compat.dtype_from_name(config.out_dtype)
            with using(MergeContext(plan.roles, plan.job.allow_nan, out_dtype)):
                if hasattr(method, "merge_models"):
                    method.merge_models(config, str(partial), run_options, document.text)
                else:
                    run_merge(config.model_copy(deep=True), str(partial), run_options, None)
            seconds = time.monotonic() - started
            record.describe(plan, partial, out.name, digests, seconds, options)
    finally:
        digests.close()
    if not options.quiet:
        present.print_summary(plan, out, time.monotonic() - started)


def _apply_adapters(plan: Plan, options: MergeOptions) -> MergeOptions:
    """Apply every parent's adapter beforehand, each into a folder that appears when complete.

    mergekit knows an applied adapter by its path alone. In our own cache the folder depends on the
    files' sizes and times too, so that a retrained adapter is not taken for the old one.
    """
    adapters = [p for p in (plan.base, *plan.experts) if p.reference.lora is not None]
    if not adapters:
        return options
    if options.lora_merge_cache:
        cache = Path(options.lora_merge_cache)
    else:
        cache = cache_dir() / "adapters" / _files_hash(plan)[:16]
    cache.mkdir(parents=True, exist_ok=True)
    options = options.model_copy(update={"lora_merge_cache": str(cache)})
    for parent in adapters:
        with present.status(f"applying the adapter of {parent.name}", options.quiet):
            compat.merge_adapter(parent.reference, cache, options)
    return options


def _document(config: MergeConfiguration, source: str | None) -> Document:
    """The recipe with its lines where the text survived the front end, else its parsed content."""
    if source is None:
        return Document("recipe", yaml.safe_load(config.to_yaml()))
    context = click.get_current_context(silent=True)
    name = (context.params.get("config_file") if context else None) or "recipe"
    return Document.parse(source, str(name))


def _job_hash(plan: Plan) -> str:
    """What makes two jobs the same: recipe, coefficient table, parents' files, version."""
    table = plan.table.document.text if plan.table is not None else None
    content = json.dumps([plan.document.data, table, _files_hash(plan), __version__], default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _files_hash(plan: Plan) -> str:
    """Identity of the parents' files: names, sizes and times."""
    files = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in plan.files]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
