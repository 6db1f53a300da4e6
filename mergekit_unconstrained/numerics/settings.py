"""What layer-wise merging is asked for: the operators, and their settings for one tensor.

The formulas stand in operators.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from mergekit_unconstrained.numerics import sparsify

OperatorName = Literal[
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "della",
    "sce",
    "linear",
    "varm",
    "sce_dense",
]


@dataclass(frozen=True)
class Operator:
    """What an operator does to the task vectors; the defaults are those of mergekit's method."""

    keep: Literal["all", "magnitude", "random", "outliers", "magprune", "variance"] = "all"
    combine: Literal["add", "elect", "erase", "erase_exactly", "weigh"] = "add"
    normalize: bool = False
    rescale: sparsify.Rescale = "none"
    parameters: frozenset[str] = frozenset()  # which optional parameters mean something here


OPERATORS: dict[OperatorName, Operator] = {
    "task_arithmetic": Operator(),
    "ties": Operator(
        "magnitude",
        combine="elect",
        normalize=True,
        parameters=frozenset({"density", "rescale", "scope"}),
    ),
    "dare_linear": Operator(
        "random", rescale="l1", parameters=frozenset({"density", "rescale", "seed"})
    ),
    "dare_ties": Operator(
        "random",
        combine="elect",
        rescale="l1",
        parameters=frozenset({"density", "rescale", "seed"}),
    ),
    "breadcrumbs": Operator(
        "outliers", parameters=frozenset({"density", "rescale", "gamma", "scope"})
    ),
    "della": Operator(
        "magprune",
        combine="elect",
        normalize=True,
        rescale="l1",
        parameters=frozenset({"density", "rescale", "seed", "epsilon"}),
    ),
    "sce": Operator(
        "variance", combine="erase", normalize=True, parameters=frozenset({"select_topk"})
    ),
    "linear": Operator(normalize=True),
    "varm": Operator(combine="weigh"),
    "sce_dense": Operator(
        "variance", combine="erase_exactly", normalize=True, parameters=frozenset({"select_topk"})
    ),
}
assert tuple(OPERATORS) == get_args(OperatorName)


@dataclass(frozen=True)
class Kept:
    """What the first pass found for one expert: s_i = factor * d_i where mask is not False.

    mask: [n] bool, None where every entry is kept.
    """

    mask: torch.Tensor | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Expert:
    """One expert's share in one tensor.

    tensor: T_i, any float dtype, the shape of the base. weight: w_i. density: fraction of entries
    kept. gamma: fraction of outliers dropped (breadcrumbs). epsilon: half-width of the keeping
    probability (della). model: its name, which keys its random masks. kept: what the first pass
    would find, where that is known already.
    """

    tensor: torch.Tensor
    weight: float
    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.15
    model: str = ""
    kept: Kept | None = None


@dataclass(frozen=True)
class Settings:
    """What all experts share. None for `normalize` and `rescale` is the operator's default.

    dtype is the arithmetic's; float64 inputs raise it to float64. name is the tensor's, and keys
    the random masks. zero_sign: what a sum of exactly zero elects in (5). granularity: whether (10)
    has one share a tensor or one an entry.
    """

    operator: OperatorName = "task_arithmetic"
    lambda_: float = 1.0
    normalize: bool | None = None
    rescale: sparsify.Rescale | None = None
    select_topk: float = 1.0
    seed: int = 0
    name: str = ""
    dtype: torch.dtype = torch.float32
    zero_sign: Literal[1, -1] = 1
    granularity: Literal["tensor", "element"] = "tensor"
    custom: Operator | None = None

    @property
    def rules(self) -> Operator:
        """What the operator does; `custom` where that is none of OPERATORS."""
        return self.custom or OPERATORS[self.operator]

    @classmethod
    def of(cls, name: str, parameters: Mapping[str, Any]) -> Settings:
        """For one tensor, from the parameters of a recipe of `layerwise` (validated)."""
        normalize, rescale = parameters["normalize"], parameters["rescale"]
        return cls(
            operator=parameters["operator"],
            lambda_=parameters["lambda"],
            normalize=None if normalize == "auto" else normalize == "true",
            rescale=None if rescale == "auto" else rescale,
            select_topk=parameters["select_topk"],
            seed=parameters["seed"],
            name=name,
            dtype=getattr(torch, parameters["precision"]),
        )
