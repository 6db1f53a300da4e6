"""Layer-wise merging of same-architecture experts.

Reference: Zhang et al., "Unconstrained Model Merging for Enhanced LLM Reasoning",
https://arxiv.org/abs/2410.13699, the part on models of the same architecture: TIES and task
arithmetic with coefficients of their own for every layer.

    T*[l, k] = T0[l, k] + lambda * D( {w_i[l, k], rho_i[l, k], T_i[l, k] - T0[l, k]}_i )      (1)

for layer l and kind of tensor k; D is the operator (numerics/operators.py, Eqs. 2-9). The paper
names CMA-ES for finding the coefficients, and TIES and task arithmetic as operators. The kinds of
tensor, the table's format and the other operators are ours.

scope: tensor is mergekit's, rho_i is a share of every tensor; scope: model is that of the papers of
TIES and Breadcrumbs, rho_i is a share of all entries of the expert (engine/thresholds.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field

from mergekit_unconstrained.compat import PerNonBase, TensorGroup
from mergekit_unconstrained.config.table import load_table
from mergekit_unconstrained.engine.context import finish, role_of
from mergekit_unconstrained.engine.footprint import OneTensor
from mergekit_unconstrained.engine.plan import PlannedTensor
from mergekit_unconstrained.engine.prepass import Measure, of_model
from mergekit_unconstrained.engine.tensor_method import base_of, tensor_method
from mergekit_unconstrained.engine.thresholds import Span, thresholds, trimmed
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.numerics.keeping import kept_ranks
from mergekit_unconstrained.numerics.operators import merge
from mergekit_unconstrained.numerics.settings import OPERATORS, Expert, OperatorName, Settings

Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
RescaleSetting = Annotated[
    Literal["auto", "none", "inverse", "l1"],
    # mergekit's own spelling of the same switch.
    BeforeValidator(lambda v: {True: "l1", False: "none"}[v] if isinstance(v, bool) else v),
]
NormalizeSetting = Annotated[
    Literal["auto", "true", "false"],
    BeforeValidator(lambda v: str(v).lower() if isinstance(v, bool) else v),
]


@tensor_method("layerwise", "Layer-wise merging")
def layerwise(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite | None] = None,  # w_i, unless the table gives it
    density: PerNonBase[Fraction] = 1.0,  # rho_i, unless the table gives it
    gamma: PerNonBase[Fraction] = 0.01,  # breadcrumbs: fraction of outliers dropped
    epsilon: PerNonBase[Fraction] = 0.15,  # della: half-width of the keeping probability
    operator: OperatorName = "task_arithmetic",  # D
    coefficients: str = "",  # path of a coefficient table
    rescale: RescaleSetting = "auto",  # of what is kept; auto: as upstream's method does
    normalize: NormalizeSetting = "auto",  # divide by the weights; auto: as upstream's method
    select_topk: Fraction = 1.0,  # sce: fraction of entries selected by variance
    lambda_: Finite = 1.0,  # scales D; `lambda` in a recipe
    scope: Literal[
        "tensor", "model"
    ] = "tensor",  # ties, breadcrumbs: of which a density is a share
    seed: int = 0,  # of the random masks
    precision: Literal["float32", "float64"] = "float32",  # of the arithmetic
) -> torch.Tensor:
    """Eq. (1) for one tensor. Returns the base's shape and dtype."""
    name = group.metadata.name or ""
    table = load_table(coefficients) if coefficients else None
    role = role_of(group.metadata)
    experts = []
    for entry in group.non_base:
        model = str(entry.id)
        cell = table.lookup(model, role) if table else None
        w = weight[entry.id] if cell is None or cell.weight is None else cell.weight
        if w is None:
            raise RecipeError(
                f"no weight for {model} in {name or 'an unnamed tensor'}: set `weight` for the "
                "model, or give it a `default` in the coefficient table"
            )
        experts.append(
            Expert(
                tensor=entry.tensor,
                weight=w,
                density=density[entry.id] if cell is None or cell.density is None else cell.density,
                gamma=gamma[entry.id],
                epsilon=epsilon[entry.id],
                model=model,
            )
        )
    shared = {
        "operator": operator,
        "lambda": lambda_,
        "normalize": normalize,
        "rescale": rescale,
        "select_topk": select_topk,
        "seed": seed,
        "precision": precision,
    }
    settings = Settings.of(name, shared)
    if scope == "model":
        base = base_of(group)
        experts = [trimmed(base, e, settings, _span(operator, e.density, e.gamma)) for e in experts]
    return finish(group, merge(base_of(group), experts, settings))


def entrywise(one: OneTensor) -> bool:
    """Whether a tensor can be merged by parts: no entry's share depends on the others."""
    settings = Settings.of("", one.parameters)
    rules = settings.rules
    rescale = rules.rescale if settings.rescale is None else settings.rescale
    # With thresholds of the whole model, every entry knows by itself whether it is kept.
    keeps = rules.keep == "all" or (one.parameters["scope"] == "model" and rescale == "none")
    return keeps and rules.combine in ("add", "elect")


layerwise.entrywise = entrywise


def needs(tensors: Sequence[PlannedTensor]) -> tuple[Measure, ...]:
    """With `scope: model`, the magnitudes at which the experts are cut."""
    if not of_model(tensors):
        return ()
    for operator in {t.parameters["operator"] for t in tensors}:
        if "scope" not in OPERATORS[operator].parameters:
            raise RecipeError(f"`scope: model` means nothing to operator {operator!r}")

    def span(tensor: PlannedTensor, model: str) -> Span:
        density = tensor.coefficients[model].density
        gamma = tensor.input_parameters[model]["gamma"]
        return _span(tensor.parameters["operator"], 1.0 if density is None else density, gamma)

    precision = {t.parameters["precision"] for t in tensors}
    return (thresholds(tensors, span, getattr(torch, max(precision))),)


def _span(operator: OperatorName, density: float, gamma: float) -> Span:
    return functools.partial(kept_ranks, operator, density=density, gamma=gamma)
