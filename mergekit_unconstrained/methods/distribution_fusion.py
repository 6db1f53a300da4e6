"""Fusion of models of any architecture and tokenizer into one pivot.

Reference: Zhang et al., "Unconstrained Model Merging for Enhanced LLM Reasoning",
https://arxiv.org/abs/2410.13699, the part on models of different architectures; the same family as
FuseLLM (https://arxiv.org/abs/2401.10491) and FuseChat (https://arxiv.org/abs/2408.07990).

    for every source s:
        P_m   the top-k distributions of m in {pivot, s} over the responses of the data        (1)
        P*    P_pivot or P_s in the pivot's vocabulary, whichever reads the response better     (2)
        L     lambda CE(gold, Q) + (1 - lambda) H(P*, Q), Q the pivot being trained             (3)
    the targets that result, one per source, are merged in weight space                         (4)

The base_model is the pivot. Stages, in fusion/: data/, distributions/ (1), alignment/ and
targets.py (2), training/ (3), and a recipe of `layerwise` (4); jobs/fusing.py runs them.
Alignment by bytes, the comparison in bits per byte and per-token winners are ours.
"""

from __future__ import annotations

from mergekit_unconstrained.catalog import CATALOG
from mergekit_unconstrained.compat import BasePolicy, InputContract, MergeMethodSpec, ModelMethod
from mergekit_unconstrained.config.fusion_parameters import (
    CHAT_TEMPLATE,
    FUSION_PARAMETERS,
    Weight,
    per_model,
)

distribution_fusion = ModelMethod(
    MergeMethodSpec(
        name="distribution_fusion",
        parameters=(
            per_model("weight", Weight, 1.0, "of a source, in `weighted` targets and the merge"),
            CHAT_TEMPLATE,
            *FUSION_PARAMETERS,
        ),
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        pretty_name="Distribution fusion",
        reference_url=CATALOG["distribution_fusion"].url,
    )
)
