"""Any list of models in one recipe.

Reference: Zhang et al., "Unconstrained Model Merging for Enhanced LLM Reasoning",
https://arxiv.org/abs/2410.13699.

    1. group the models by architecture, shapes and tokenizer;
    2. merge every group of several models by `layerwise`, from the common base they name;
    3. fuse the groups into the pivot's group by `distribution_fusion`;
    4. merge the targets that result.

The base_model is the base of the pivot's group, or the pivot itself where no other model is of its
architecture. The rule for groups is ours; jobs/mixture.py runs it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mergekit_unconstrained.catalog import CATALOG
from mergekit_unconstrained.compat import (
    BasePolicy,
    InputContract,
    MergeMethodSpec,
    ModelMethod,
    ParameterScope,
    ParameterSpec,
)
from mergekit_unconstrained.config.fusion_parameters import (
    CHAT_TEMPLATE,
    FUSION_PARAMETERS,
    per_model,
)
from mergekit_unconstrained.numerics.settings import OperatorName

Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

unconstrained = ModelMethod(
    MergeMethodSpec(
        name="unconstrained",
        parameters=(
            per_model("weight", Finite | None, None, "within its group; 1 / group size if not set"),
            per_model("density", Fraction, 1.0, "within its group, as in `layerwise`"),
            per_model("base", str, "", "the model it was trained from, unless the base_model is"),
            per_model("coefficients", str, "", "a coefficient table for its group"),
            CHAT_TEMPLATE,
            ParameterSpec(
                "operator",
                OperatorName,
                ParameterScope.SHARED,
                "task_arithmetic",
                "how a group is merged, as in `layerwise`",
            ),
            *FUSION_PARAMETERS,
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        pretty_name="Unconstrained merging",
        reference_url=CATALOG["unconstrained"].url,
    )
)
