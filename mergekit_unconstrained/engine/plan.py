"""From a recipe to everything that will be done, before a weight is read.

mergekit's own planner resolves gradients, filters, slices and defaults, so what is checked and
shown here is what will be computed. It runs on headers alone: no download, no adapter merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeConfiguration, MergeMethod, MergeOptions
from mergekit_unconstrained.config.agreement import HOW_TO_MERGE_VOCABULARIES, check_agreement
from mergekit_unconstrained.config.document import Document, walk
from mergekit_unconstrained.config.parents import Parent, TensorHeader, read_parent
from mergekit_unconstrained.config.recipe import JobOptions, check_recipe
from mergekit_unconstrained.config.table import Coefficients, Table, load_table
from mergekit_unconstrained.engine import checks
from mergekit_unconstrained.engine.context import tensor_roles
from mergekit_unconstrained.errors import ModelError, RecipeError
from mergekit_unconstrained.numerics.roles import Role, role_from_name

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    inputs: model -> the name under which its file holds the tensor (None: an optional tensor that
    the model lacks). coefficients: expert -> resolved weight and density. parameters: of the whole
    merge, as they are for this tensor; input_parameters: model -> its own. converted: the models
    that hold the tensor in another form, which mergekit converts on loading.
    """

    name: str
    role: Role
    shape: tuple[int, ...] | None
    dtype: str
    inputs: Mapping[str, str | None]
    coefficients: Mapping[str, Coefficients] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    input_parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    converted: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size in the output, 0 when the shape is not known."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 4) if self.shape is not None else 0


@dataclass(frozen=True)
class Plan:
    """A checked recipe: what goes in and what comes out.

    tasks, architecture, out_config: mergekit's own of the same names, for the engine.
    """

    document: Document
    config: MergeConfiguration
    method: MergeMethod
    job: JobOptions
    base: Parent
    experts: tuple[Parent, ...]
    tensors: tuple[PlannedTensor, ...]
    table: Table | None = None
    layers: int = 0
    shared: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[compat.PlannedTask, ...] = ()
    architecture: Any = None
    out_config: Any = None

    @property
    def roles(self) -> dict[str, Role]:
        """Output tensor -> role."""
        return {t.name: t.role for t in self.tensors}

    @property
    def coefficients(self) -> dict[str, dict[str, Coefficients]]:
        """Expert -> output tensor -> resolved weight and density."""
        return {
            e.name: {
                t.name: t.coefficients[e.name] for t in self.tensors if e.name in t.coefficients
            }
            for e in self.experts
        }

    @property
    def files(self) -> tuple[Path, ...]:
        """Every weight file of every parent that lies here, adapters included."""
        parents = (self.base, *self.experts)
        return tuple(f for p in parents for f in (*p.weight_files, *p.adapter_files))

    @property
    def base_has_tokenizer(self) -> bool:
        """Whether mergekit can copy a tokenizer; it prints a traceback when it tries in vain."""
        folder = self.base.folder
        return folder is None or checks.has_tokenizer(folder)

    @property
    def out_bytes(self) -> int:
        """Bytes of weights that will be written."""
        return sum(t.bytes for t in self.tensors)

    @property
    def in_bytes(self) -> int:
        """Bytes of weights that will be read, all parents together."""
        return sum(
            math.prod(h.shape) * _BYTES.get(_DTYPES.get(h.dtype, ""), 4)
            for parent in (self.base, *self.experts)
            for h in (parent.tensors or {}).values()
        )


def make_plan(
    document: Document, config: MergeConfiguration, method: MergeMethod, options: MergeOptions
) -> Plan:
    """Check a recipe against its parents and resolve every coefficient.

    config is not changed. Raises RecipeError or ModelError with the one thing to mend.
    """
    job = check_recipe(document, method)
    base_reference = config.base_model
    if base_reference is None:
        document.fail(
            (), f"{method.spec.name!r} needs a `base_model`: the model that all experts come from"
        )
    references = sorted(set(config.referenced_models()) - {base_reference}, key=_order(document))
    if not references:
        document.fail((), "names no expert beside the base model")
    checks.check_count(document, method, len(references))
    base, *experts = [
        read_parent(r, trust_remote_code=options.trust_remote_code)
        for r in (base_reference, *references)
    ]
    checks.check_tokenizer(document, config, (base, *experts))
    tokenizer_given = bool(config.tokenizer or config.tokenizer_source)
    if not options.allow_crimes:
        for expert in experts:
            check_agreement(base, expert, tokenizer_given=tokenizer_given)

    architecture = compat.get_architecture_info(config, options)
    parents = {p.name: p for p in (base, *experts)}
    checks.check_layers(document, config, architecture, parents)
    out_config = compat.output_config(config, architecture, options.trust_remote_code)
    roles = tensor_roles(architecture, out_config)
    try:
        tasks = compat.plan_tasks(
            config,
            architecture,
            options,
            out_config,
            {p.reference: p.tensors for p in parents.values() if p.tensors is not None},
        )
    except (RuntimeError, ValueError) as error:
        checks.name_what_is_missing(document, method, error)
        raise RecipeError(f"{document.name}: {' '.join(str(error).split())}") from error
    table = _table(document, tasks)
    layers = max((r.layer + 1 for r in roles.values() if r.layer is not None), default=0)
    tensors = tuple(
        _tensor(task, roles, parents, table, config, base, tokenizer_given, options)
        for task in tasks
    )
    plan = Plan(
        document, config, method, job, base, tuple(experts), tensors, table, layers,
        shared=_shared(tasks), tasks=tuple(tasks), architecture=architecture, out_config=out_config,
    )  # fmt: skip
    checks.check_settings(plan)
    checks.check_operators(plan, tasks)
    checks.check_agreement_of_experts(plan, tasks)
    checks.check_swapped_layers(plan, tasks)
    checks.check_subspace(plan, tasks)
    if table is not None:
        checks.check_table(plan, table)
    checks.check_weights(plan)
    return plan


VARIES = "varies, see the recipe"


def _shared(tasks: list[compat.PlannedTask]) -> dict[str, Any]:
    """The parameters of the whole merge; VARIES where they differ from tensor to tensor."""
    values = dict(tasks[0].parameters.items()) if tasks else {}
    return {
        name: value if all(t.parameters[name] == value for t in tasks) else VARIES
        for name, value in values.items()
    }


def _order(document: Document) -> Callable[[compat.ModelReference], tuple[int, str]]:
    """mergekit keeps models in a set; the recipe's own order is the order of the file."""
    places: dict[compat.ModelReference, int] = {}
    for place, value in walk(document.data):
        if place and place[-1] == "model":
            with suppress(ValueError):
                places.setdefault(compat.ModelReference.model_validate(value), len(places))
    return lambda reference: (places.get(reference, len(places)), str(reference))


# -- tensors --------------------------------------------------------------------------------------


def _tensor(
    task: compat.PlannedTask,
    roles: Mapping[str, Role],
    parents: Mapping[str, Parent],
    table: Table | None,
    config: MergeConfiguration,
    base: Parent,
    tokenizer_given: bool,
    options: MergeOptions,
) -> PlannedTensor:
    weight = task.output
    role = roles.get(weight.name) or role_from_name(weight.name, weight.vocabulary_axis)
    inputs: dict[str, str | None] = {}
    shapes: dict[str, TensorHeader] = {}
    converted = []
    for model, info in task.inputs.items():
        parent = parents[model]
        if parent.tensors is None:
            inputs[model] = info.name
            continue
        stored = compat.stored_name(info, parent.tensors)
        if stored is None and not info.optional:
            model_type = getattr(parent.config, "model_type", "")
            if not compat.can_convert(model_type, parent.tensors, info):
                raise ModelError(
                    f"{model} has no tensor {info.name}, which its architecture needs: the "
                    "checkpoint is incomplete"
                )
            converted.append(model)
        inputs[model] = stored
        if stored is not None:
            shapes[model] = parent.tensors[stored]
    flexible = (
        weight.vocabulary_axis if tokenizer_given or options.unsafe_truncate_embeddings else None
    )
    first = shapes.get(base.name) or next(iter(shapes.values()), None)
    for model, header in shapes.items():
        if first is None or _cut(header.shape, flexible) == _cut(first.shape, flexible):
            continue
        hint = "these models cannot be merged tensor by tensor"
        if weight.vocabulary_axis is not None and _cut(
            header.shape, weight.vocabulary_axis
        ) == _cut(first.shape, weight.vocabulary_axis):
            hint = "the vocabularies differ: " + HOW_TO_MERGE_VOCABULARIES
        raise ModelError(
            f"{weight.name} is {list(header.shape)} in {model} but {list(first.shape)} in the base "
            f"{base.name}: {hint}"
        )
    coefficients = coefficients_of(task, role, table, base.name)
    dtype = weight.force_dtype or config.out_dtype or config.dtype
    dtype = dtype or (_DTYPES.get(first.dtype, "float32") if first is not None else "float32")
    return PlannedTensor(
        weight.name, role, first.shape if first is not None else None, dtype, inputs, coefficients,
        task.parameters, task.input_parameters, tuple(converted),
    )  # fmt: skip


def coefficients_of(
    task: compat.PlannedTask, role: Role, table: Table | None, base: str
) -> dict[str, Coefficients]:
    """Weight and density of every expert in a tensor, from the table or the recipe."""
    coefficients = {}
    for model, values in task.input_parameters.items():
        if model == base or model not in task.inputs:
            continue
        given = Coefficients(values.get("weight"), values.get("density"))
        cell = table.lookup(model, role) if table is not None else Coefficients()
        coefficients[model] = cell.over(given)
    return coefficients


def _cut(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else tuple(s for i, s in enumerate(shape) if i != axis)


def _table(document: Document, tasks: list[compat.PlannedTask]) -> Table | None:
    path = tasks[0].parameters.get("coefficients") if tasks else None
    if not path:
        return None
    if any(t.parameters.get("coefficients") != path for t in tasks):
        document.fail(("parameters", "coefficients"), "must be one file for the whole merge")
    return load_table(str(path))
