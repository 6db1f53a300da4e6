"""DARE as published: survivors divided by the probability of surviving.

Reference: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models
as a Free Lunch", https://arxiv.org/abs/2311.03099, Eqs. 2 to 4.

    m_i ~ Bernoulli(1 - p), independently for every entry                                   (1)
    s_i = m_i d_i / (1 - p)                                                                 (2)
    D   = sum_i w_i s_i                                          combine: linear            (3)
    D   = sum_i a_i w_i s_i / sum_i a_i w_i,                     combine: ties              (4)
          a_i = [sign(w_i s_i) = sign(sum_j w_j s_j)], + for a sum of zero

so that s_i has the mean d_i. mergekit's `dare_*` brings the L1 norm of s_i back to that of d_i
instead, and its `dare_ties` does not divide by the weights in (4), which is the mean over those who
agree of TIES (arXiv 2306.01708); TIES' own trimming is left out, as p has taken its place (ours).
The masks depend on the seed, the tensor's name and the model alone, so neither shards nor the order
of tensors change a byte.

The paper finds that dropping fails where mean |d_i| is above 0.03: a warning says so. p = 1 keeps
nothing (ours).
"""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import torch
from pydantic import Field

from mergekit_unconstrained.compat import PerNonBase, TensorGroup
from mergekit_unconstrained.engine.context import finish
from mergekit_unconstrained.engine.footprint import per_entry
from mergekit_unconstrained.engine.tensor_method import base_of, tensor_method
from mergekit_unconstrained.numerics.keeping import magnitudes
from mergekit_unconstrained.numerics.operators import merge
from mergekit_unconstrained.numerics.settings import Expert, Settings

LOG = logging.getLogger(__name__)
Finite = Annotated[float, Field(allow_inf_nan=False)]
LARGE = 0.03
"""Mean |d_i| beyond which the paper sees the method fail."""


@tensor_method("dare_exact", "DARE as published")
def dare_exact(
    group: TensorGroup,  # one output tensor: base and experts, any equal shape
    weight: PerNonBase[Finite] = 1.0,  # w_i
    drop: PerNonBase[Annotated[float, Field(ge=0, le=1)]] = 0.9,  # p
    combine: Literal["linear", "ties"] = "linear",
    seed: int = 0,  # of the masks
    lambda_: Finite = 1.0,  # scales D; `lambda` in a recipe
) -> torch.Tensor:
    """Eqs. (1) to (4) for one tensor in float32 or wider; the base's shape and dtype."""
    base, name = base_of(group), group.metadata.name or ""
    experts = []
    for entry in group.non_base:
        p, model = drop[entry.id], str(entry.id)
        if p > 0 and base.numel():
            size = float(magnitudes(base, entry.tensor, torch.float32).mean())
            if size > LARGE:
                _warn(model, name, size)
        experts.append(Expert(entry.tensor, weight[entry.id], density=1 - p, model=model))
    settings = Settings(
        operator="dare_ties" if combine == "ties" else "dare_linear",
        lambda_=lambda_,
        normalize=combine == "ties",
        rescale="inverse",
        seed=seed,
        name=name,
    )
    return finish(group, merge(base, experts, settings))


dare_exact.work = per_entry(4, 1)  # magnitudes; masks


_warned: set[str] = set()
"""Models of which this process has said so."""


def _warn(model: str, tensor: str, size: float) -> None:
    if model in _warned:
        return
    _warned.add(model)
    LOG.warning(
        "%s of %s lies %.2g from the base on average: DARE is known to fail above %g; drop less, "
        "or use another method",
        tensor or "a tensor",
        model,
        size,
        LARGE,
    )
