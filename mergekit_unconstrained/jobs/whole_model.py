"""The pre-pass of a job: what its method wants to know of whole models, measured or remembered."""

from __future__ import annotations

import mmap

import torch

from mergekit_unconstrained import __version__, compat, present
from mergekit_unconstrained.compat import MergeOptions
from mergekit_unconstrained.engine import prepass
from mergekit_unconstrained.engine.digest import sha256
from mergekit_unconstrained.engine.plan import Plan, PlannedTensor
from mergekit_unconstrained.engine.source import CannotStreamError, MappedLoader, map_parents
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.resources import cache_dir


def measures_of(plan: Plan) -> tuple[prepass.Measure, ...]:
    """What the method of a plan wants to know; RecipeError where that cannot be found out."""
    needs = prepass.needs_of(plan.method.spec.name)
    measures = needs(plan.tensors) if needs is not None else ()
    if measures and (plan.config.tokenizer or plan.config.tokenizer_source):
        place = ("tokenizer",) if plan.config.tokenizer else ("tokenizer_source",)
        raise RecipeError(
            f"{plan.document.where(place)}: vocabularies are brought together tensor by tensor, "
            "and `scope: model` looks at the parents as they are: give the parents one tokenizer "
            "first, or set `scope: tensor`"
        )
    return prepass.widened(measures, prepass.widest(plan))


def statistics(plan: Plan, options: MergeOptions) -> prepass.Statistics | None:
    """What a plan's method wants to know of its parents, which may take two passes over them.

    None where it asks for nothing. Adapters must have been applied into options.lora_merge_cache.
    """
    measures = measures_of(plan)
    if not measures:
        return None
    base = plan.base.name

    def take() -> prepass.Statistics:
        load = loader(plan, options)
        total = 0 if options.quiet else prepass.bytes_read(measures, plan.tensors, base)
        with present.byte_progress("looking at the whole model", total) as advance:
            return prepass.measure(
                measures,
                plan.tensors,
                base,
                load,
                allow_nan=plan.job.allow_nan,
                advance=advance,
            )

    parents = (plan.base, *plan.experts)
    if not all(p.weight_files for p in parents):  # still on the Hub: its files have no hash yet
        return take()
    content = {p.name: [sha256(f) for f in (*p.weight_files, *p.adapter_files)] for p in parents}
    settings = [str(options.lora_merge_dtype), plan.config.dtype, plan.job.allow_nan]
    # All parameters but the one by which a result is only scaled at the end.
    parameters = [
        [{k: v for k, v in t.parameters.items() if k != "lambda"}, t.input_parameters]
        for t in plan.tensors
    ]
    coefficients = [t.coefficients for t in plan.tensors]
    identity = [__version__, plan.method.spec.name, content, settings, repr(parameters),
                repr(coefficients)]  # fmt: skip
    return prepass.kept(cache_dir() / "prepass", identity, measures, plan.tensors, base, take)


def loader(plan: Plan, options: MergeOptions) -> prepass.Load:
    """Tensors through mergekit's lazy loader, in the recipe's dtype as a kernel gets them.

    On the pages of mapped files, which the system may have again as soon as the next tensor of the
    same model is asked for.
    """
    dtype = compat.dtype_from_name(plan.config.dtype)
    parents = {p.reference: p.name for p in (plan.base, *plan.experts)}
    mapped: dict[str, MappedLoader] = {}
    try:
        loaders = map_parents(parents, compat.set_loader_options(options))
        mapped = {parents[reference]: loader for reference, loader in loaders.items()}
    except CannotStreamError:
        pass  # pickles, which mergekit reads as a whole
    stored = compat.stored_tensors(options)
    before: dict[str, str] = {}

    def load(model: str, tensor: PlannedTensor) -> torch.Tensor:
        name = tensor.inputs[model]
        assert name is not None
        if model in mapped and model in before:
            mapped[model].files[before[model]].advise(before[model], mmap.MADV_DONTNEED)
        before[model] = name
        found = stored(model, name)
        return found if dtype is None else found.to(dtype)

    return load
