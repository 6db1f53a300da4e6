"""Parameter competition balancing: PCB-Merging.

Reference: Du et al., "Parameter Competition Balancing for Model Merging",
https://arxiv.org/abs/2410.02396, and the authors' code `PCB_merge`.

    A_i     = |d_i|, clamped to its own quantiles q and 1 - q                               (1)
    self_i  = exp(N minmax(A_i)^2)                                                          (2)
    inter_i = tanh(d_i * sum_j d_j)                                                         (3)
    beta_i  = self_i * inter_i                                                              (4)
    s_i     = minmax(beta_i clamped from below at its quantile 1 - density)                 (5)
    D       = sum_i w_i sign(d_i) A_i s_i / max(sum_i s_i, 1e-12)                           (6)

w_i is `weight`, the paper's lambda_i. variant: language has q = 1e-4; vision has q = 1e-2 and

    n_i     = sign(d_i) minmax(A_i),   inter_i = sum_j tanh(n_i n_j)                        (7)

as in the authors' code for either. The paper takes a softmax in (2) and (3); their code does not,
and we follow the code. It puts the whole model into one vector: scope `model`. With scope `tensor`,
ours, quantiles and extremes are those of each tensor.

A quantile is a sorted entry, not an interpolation: of n entries, number int(n q) for a lower bound,
number int(n (1 - q) - 1) for an upper one. minmax of equal entries is zero (the code divides by
zero), and so is D where no s_i is positive.

Cost: a sort of every task vector and of its scores, and about ten passes over the entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mergekit_unconstrained.catalog import CATALOG
from mergekit_unconstrained.compat import (
    BasePolicy,
    InputContract,
    OptionalTensorPolicy,
    PerNonBase,
    TensorGroup,
    merge_method,
)
from mergekit_unconstrained.engine.task_vectors import add, is_finite, task_vectors

Finite = Annotated[float, Field(allow_inf_nan=False)]
Variant = Literal["language", "vision"]
QUANTILE: dict[str, float] = {"language": 1e-4, "vision": 1e-2}


@dataclass(frozen=True)
class Range:
    """Bounds of numbers x, [N, n], for every expert; each [N]."""

    low: torch.Tensor
    high: torch.Tensor

    def clamp(self, x: torch.Tensor) -> torch.Tensor:
        """x between low and high, [N, n]."""
        return x.clamp(self.low[:, None], self.high[:, None])

    def minmax(self, x: torch.Tensor) -> torch.Tensor:
        """The clamped x, low to 0 and high to 1; zero where low is high."""
        width = (self.high - self.low)[:, None]
        return (self.clamp(x) - self.low[:, None]) / torch.where(width > 0, width, torch.inf)


def magnitude_range(magnitudes: torch.Tensor, variant: Variant) -> Range:
    """The bounds of Eq. (1), from the |d_i|, [N, n]."""
    n, q = magnitudes.shape[1], QUANTILE[variant]
    ordered = magnitudes.sort(dim=1).values
    return Range(ordered[:, int(n * q)], ordered[:, int(n * (1 - q) - 1)])


def score_range(beta: torch.Tensor, density: float) -> Range:
    """The bounds of Eq. (5), from the beta_i, [N, n]; density 0 leaves none."""
    n = beta.shape[1]
    ordered = beta.sort(dim=1).values
    return Range(ordered[:, min(int(n * (1 - density)), n - 1)], ordered[:, -1])


def scores(d: torch.Tensor, bounds: Range, variant: Variant) -> torch.Tensor:
    """beta_i of Eq. (4), [N, n]; bounds: of the magnitudes."""
    normed = bounds.minmax(d.abs())
    itself = torch.exp(len(d) * normed.square())  # (2)
    if variant == "language":
        return itself * torch.tanh(d * d.sum(dim=0))  # (3), (4)
    n = normed.mul_(d.sign())
    return itself * torch.stack([torch.tanh(n_i * n).sum(dim=0) for n_i in n])  # (7), (4)


def pcb_vector(
    d: torch.Tensor,  # [N, n], the task vectors
    weights: torch.Tensor,  # [N], w_i
    density: float,
    variant: Variant,
) -> torch.Tensor:
    """D of Eq. (6), [n], with the quantiles of these entries."""
    magnitudes = magnitude_range(d.abs(), variant)
    beta = scores(d, magnitudes, variant)
    s = score_range(beta, density).minmax(beta)  # (5)
    return competition(d, s, magnitudes, weights)


def competition(
    d: torch.Tensor, s: torch.Tensor, magnitudes: Range, weights: torch.Tensor
) -> torch.Tensor:
    """D of Eq. (6), [n], from task vectors and s_i, [N, n], and w_i, [N]."""
    clamped = magnitudes.clamp(d.abs()) * d.sign()  # (1)
    return (weights[:, None] * clamped * s).sum(dim=0) / s.sum(dim=0).clamp(min=1e-12)


@merge_method(
    name="pcb",
    pretty_name="PCB-Merging",
    reference_url=CATALOG["pcb"].url,
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
)
def pcb(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite] = 1.0,  # w_i
    variant: Variant = "language",
    density: Annotated[float, Field(ge=0, le=1)] = 0.1,  # fraction of entries that compete
    scope: Literal["tensor"] = "tensor",  # noqa: ARG001 (of quantiles and extremes)
    lambda_: Finite = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eqs. (1) to (7) for one tensor in float32 or wider; the base's shape and dtype."""
    if group.base is None or not group.non_base:
        return group.tensors[0]
    d = task_vectors(group).flatten(1) if group.base.tensor.ndim else task_vectors(group)[:, None]
    weights = d.new_tensor([weight[entry.id] for entry in group.non_base])
    if not d.numel() or not is_finite(d):  # no quantiles among NaN: the mean shows where it is
        merged = (weights[:, None] * d).mean(dim=0)
    else:
        merged = pcb_vector(d, weights, density, variant)
    return add(group, merged.reshape(group.base.tensor.shape), lambda_)
