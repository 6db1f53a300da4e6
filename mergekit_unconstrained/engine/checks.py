"""What can be checked of a recipe only beside its parents: layers, tables, filters, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeConfiguration
from mergekit_unconstrained.config.document import Document, Place, walk
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.config.table import Table
from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import ModelError, RecipeError
from mergekit_unconstrained.numerics.settings import OPERATORS
from mergekit_unconstrained.numerics.sparsify import check_della

if TYPE_CHECKING:
    from mergekit_unconstrained.engine.plan import Plan


def check_count(document: Document, method: compat.MergeMethod, experts: int) -> None:
    """As many experts as the method merges; slices have their own, and mergekit counts them."""
    contract = method.spec.contract
    least, most = contract.min_non_base or 0, contract.max_non_base
    if "models" not in document.data or least <= experts <= (most or experts):
        return
    wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{most}"
    document.fail(
        ("models",),
        f"{method.spec.name!r} merges {wanted} expert{'' if wanted == '1' else 's'}, "
        f"and here {'is' if experts == 1 else 'are'} {experts} beside the base",
    )


def check_layers(
    document: Document,
    config: MergeConfiguration,
    architecture: compat.ModelArchitecture,
    parents: Mapping[str, Parent],
) -> None:
    """Equal depth without slices; layer ranges inside the models with them."""
    for name in config.modules or {}:
        if name not in architecture.modules:
            document.fail(
                ("modules", name), f"no such module. {suggest(name, architecture.modules)}"
            )
    for name, module in architecture.modules.items():
        depth = {m: module.architecture.num_layers(p.config) for m, p in parents.items()}
        places: list[tuple[Place, Any]] = []
        if config.slices:
            places = [(("slices", i), s) for i, s in enumerate(config.slices)]
        elif config.modules and name in config.modules and config.modules[name].slices:
            places = [
                (("modules", name, "slices", i), s)
                for i, s in enumerate(config.modules[name].slices or [])
            ]
        for place, output_slice in places:
            lengths = set()
            for i, source in enumerate(output_slice.sources):
                first, last = source.layer_range
                lengths.add(last - first)
                here = (*place, "sources", i, "layer_range")
                known = depth[str(source.model)]
                if not 0 <= first < last:
                    document.fail(here, f"[{first}, {last}] holds no layer")
                if last > known:
                    document.fail(
                        here, f"[{first}, {last}] goes beyond the {known} layers of {source.model}"
                    )
            if len(lengths) > 1:
                document.fail((*place, "sources"), "the ranges of one slice must be equally long")
        if not places and len(set(depth.values())) > 1:
            told = ", ".join(f"{m} has {d}" for m, d in depth.items())
            raise ModelError(f"the models differ in their number of layers: {told}")


def check_tokenizer(
    document: Document, config: MergeConfiguration, parents: Sequence[Parent]
) -> None:
    """Whether mergekit will find the tokenizers and the chat template that a recipe asks for."""
    names = [p.name for p in parents]
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    place: Place = ("tokenizer", "source") if config.tokenizer else ("tokenizer_source",)
    if source is not None:
        if str(source) not in ("union", "base", *names) and not Path(str(source)).is_dir():
            hint = suggest(source, ("union", "base", *names))
            document.fail(place, f"{str(source)!r} is no model of this recipe. {hint}")
        for parent in parents:
            if parent.folder is not None and not has_tokenizer(parent.folder):
                document.fail(place, f"{parent.name} has no tokenizer to build this one from")
    if config.chat_template not in (None, "auto"):
        try:
            compat.check_chat_template(config)
        except RuntimeError:
            document.fail(
                ("chat_template",),
                f"{config.chat_template!r} is neither a Jinja template nor the name of one of "
                "mergekit's",
            )


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder brings a tokenizer."""
    return any(folder.glob("token*")) or any(folder.glob("vocab*"))


def check_table(plan: Plan, table: Table) -> None:
    document = table.document
    if table.layers != plan.layers:
        document.fail(
            ("layers",), f"this table is for {table.layers} layers, the output has {plan.layers}"
        )
    names = [e.name for e in plan.experts]
    used = {table.key_for(name) for name in names}
    for key in used:
        sharing = [name for name in names if table.key_for(name) == key]
        if key is not None and len(sharing) > 1:
            document.fail(
                ("experts", key),
                f"{' and '.join(sharing)} both end in {key!r}: name them as in the recipe",
            )
    for key in table.experts:
        if key not in used:
            document.fail(("experts", key), f"the recipe has no such expert. {suggest(key, names)}")
    inner = {k for r in plan.roles.values() if r.layer is not None for k in r.keys}
    outer = {k for r in plan.roles.values() if r.layer is None for k in r.keys}
    for key, expert in table.experts.items():
        for _, word in expert.inner:
            if word not in inner:
                document.fail(
                    ("experts", key, "layers"),
                    f"no layer of this model has tensors of kind {word!r}. {suggest(word, inner)}",
                )
        for word in expert.outer:
            if word not in outer:
                tied = " (its head is tied to the embedding)" if word == "head" else ""
                document.fail(
                    ("experts", key, word),
                    f"this model has no tensor of kind {word!r} outside its layers{tied}",
                )


def check_weights(plan: Plan) -> None:
    """Every expert has a weight for every tensor."""
    if not any(p.name == "weight" for p in plan.method.spec.parameters):
        return
    for tensor in plan.tensors:
        for model, cell in tensor.coefficients.items():
            if cell.weight is None:
                where = plan.document.where(_place_of(plan.document, model))
                if plan.table is not None:
                    where = plan.table.document.where(
                        ("experts", plan.table.key_for(model) or model)
                    )
                raise RecipeError(
                    f"{where}: no weight for {model} in {tensor.name}: set `weight` in the model's "
                    "parameters, or a `default` in the coefficient table"
                )


def _place_of(document: Document, model: str) -> Place:
    """Where a recipe names a model."""
    places = (p for p, v in walk(document.data) if p and p[-1] == "model" and v == model)
    return next(places, ("models",))


def check_operators(plan: Plan, tasks: list[compat.PlannedTask]) -> None:
    """Refuse settings that the operator ignores or cannot work with.

    mergekit would ignore the former in silence. Front ends that parse recipes themselves may add
    them of their own accord, so there they are let pass.
    """
    operators = {str(t.parameters["operator"]) for t in tasks if "operator" in t.parameters}
    for task, tensor in zip(tasks, plan.tensors, strict=True):
        if task.parameters.get("operator") == "della":
            for model, cell in tensor.coefficients.items():
                epsilon = task.input_parameters[model]["epsilon"]
                check_della(1.0 if cell.density is None else cell.density, epsilon)
    if not operators or plan.document.text is None:
        return
    used = frozenset().union(*(OPERATORS[o].parameters for o in operators if o in OPERATORS))
    known = frozenset().union(*(o.parameters for o in OPERATORS.values()))
    documents = [plan.document] + ([plan.table.document] if plan.table is not None else [])
    for document in documents:
        for place, _ in walk(document.data):
            name = str(place[-1]) if place else ""
            inside = document is not plan.document or "parameters" in place[:-1]
            if inside and name in known - used:
                able = [o for o, operator in OPERATORS.items() if name in operator.parameters]
                document.fail(
                    place,
                    f"{name!r} means nothing to operator {', '.join(sorted(operators))!r}; it does "
                    f"to {', '.join(able)}",
                )


def check_agreement_of_experts(plan: Plan, tasks: list[compat.PlannedTask]) -> None:
    """Whether as many experts as have to agree are there at all."""
    needed = max((int(t.parameters.get("min_agreement", 0)) for t in tasks), default=0)
    count = len(plan.experts)
    if needed > count:
        plan.document.fail(
            ("parameters", "min_agreement"),
            f"min_agreement keeps what {needed} experts need, and there are only {count}: name "
            f"more experts, or set min_agreement: {count}",
        )


def check_swapped_layers(plan: Plan, tasks: list[compat.PlannedTask]) -> None:
    """Whether the model is as deep as the layers that `layer_swap` counts from both ends."""
    for task, tensor in zip(tasks, plan.tensors, strict=True):
        depth = tensor.role.depth
        if not {"bottom", "top", "transition"} <= task.parameters.keys() or not depth:
            continue
        bottom, top, transition = (task.parameters[n] for n in ("bottom", "top", "transition"))
        if bottom + top + 2 * transition > depth:
            plan.document.fail(
                ("parameters",),
                f"{bottom} layers at the bottom, {top} at the top and {transition} averaged on "
                f"each side are more than the {depth} layers of this model: lower `bottom`, `top` "
                "or `transition`",
            )


def check_subspace(plan: Plan, tasks: list[compat.PlannedTask]) -> None:
    """Whether the shared subspace of `doge` has a dimension at all."""
    for task, tensor in zip(tasks, plan.tensors, strict=True):
        part, shape = task.parameters.get("subspace"), tensor.shape
        if part is None or shape is None or len(shape) != 2 or tensor.role.layer is None:
            continue
        if int(part) > min(shape):
            plan.document.fail(
                ("parameters", "subspace"),
                f"one of {part} dimensions of {tensor.name}, {list(shape)}, is none: at most "
                f"{min(shape)}",
            )


def name_what_is_missing(
    document: Document, method: compat.MergeMethod, error: RuntimeError | ValueError
) -> None:
    """Say where a required parameter belongs, if that is what mergekit's planner lacked."""
    for parameter in method.spec.parameters:
        said, _, tensor = str(error).partition(" for ")
        if said != f"Missing required parameter {parameter.name}":
            continue
        shared = parameter.scope == compat.ParameterScope.SHARED
        place: Place = ("parameters",) if shared else ("models",)
        given = any(p and p[-1] == parameter.name for p, _ in walk(document.data))
        if given:
            problem = f"{parameter.name!r} has no value for {tensor}: add one without a `filter`"
        else:
            example = f"`parameters: {{{parameter.name}: VALUE}}`"
            where = "the recipe" if shared else "every model"
            problem = (
                f"{method.spec.name!r} needs {parameter.name!r}: write {example} in {where}; "
                f"`mergekit-unconstrained show {method.spec.name}` lists its values"
            )
        document.fail(place, problem)


def check_settings(plan: Plan) -> None:
    """Filters that match nothing and gradients with more points than layers."""
    names = {n for t in plan.tensors for n in (t.name, *filter(None, t.inputs.values()))}
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    for place, value in walk(plan.document.data):
        if "parameters" not in place:
            continue
        if place[-1] == "filter" and value not in (None, "*"):
            if not any(str(value) in name for name in names):
                plan.document.fail(place, f"{value!r} matches no tensor. {suggest(value, parts)}")
        elif (
            isinstance(value, list)
            and all(not isinstance(e, (dict, list)) for e in value)
            and len(value) > max(plan.layers, 1)
        ):
            plan.document.fail(
                place, f"a gradient of {len(value)} points over a model of {plan.layers} layers"
            )
