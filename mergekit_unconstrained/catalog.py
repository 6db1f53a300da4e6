"""The list of our merge methods: one entry a method, strings only, nothing imported.

A new method is one file in methods/ and one entry here; a test holds the entries against the
entry points of pyproject.toml and the table in the README.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ALIAS_PREFIX = "mku_"
"""`mku_NAME` always means our method NAME, whatever a later mergekit calls its own."""


@dataclass(frozen=True)
class CatalogEntry:
    """One method: where it lives, what it is and where it comes from."""

    name: str
    target: str  # "module:object", imported on first use
    level: Literal["tensor", "model"]  # a kernel called once per tensor, or one call per merge
    summary: str
    paper: str
    url: str
    needs: str = (
        ""  # "module:function" of what it wants to know of whole models (engine/prepass.py)
    )
    relation: str = "mergekit has no such method"  # to mergekit's variant of the idea
    cost: Literal["entries", "matrices"] = "entries"  # grows with m n, or m n min(m, n)
    weighs: bool = True  # whether a recipe's weights say what an expert counts for in each tensor


CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="layerwise",
            target="mergekit_unconstrained.methods.layerwise:layerwise",
            level="tensor",
            summary=(
                "weights and densities for every layer and kind of tensor of every expert, "
                "combined by one of ten operators"
            ),
            paper="Unconstrained Model Merging for Enhanced LLM Reasoning, section on "
            "fine-grained layer-wise merging (arXiv 2410.13699)",
            url="https://arxiv.org/abs/2410.13699",
            needs="mergekit_unconstrained.methods.layerwise:needs",
            relation="eight of its operators with one weight for everything are mergekit's methods",
        ),
        CatalogEntry(
            name="ties_global",
            target="mergekit_unconstrained.methods.ties_global:ties_global",
            level="tensor",
            summary="TIES as published: trims by one threshold over the whole model",
            paper="TIES-Merging: Resolving Interference When Merging Models (arXiv 2306.01708)",
            url="https://arxiv.org/abs/2306.01708",
            relation=(
                "`ties` trims tensor by tensor, and lets sums of zero elect +; with scope: tensor "
                "only the latter differs, and which of equal magnitudes are kept"
            ),
            needs="mergekit_unconstrained.methods.ties_global:needs",
        ),
        CatalogEntry(
            name="dare_exact",
            target="mergekit_unconstrained.methods.dare_exact:dare_exact",
            level="tensor",
            summary=(
                "DARE as published: drops entries at random, divides the others by exactly 1 - p"
            ),
            paper=(
                "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a "
                "Free Lunch (arXiv 2311.03099)"
            ),
            url="https://arxiv.org/abs/2311.03099",
            relation="`dare_linear` and `dare_ties` keep the L1 norm instead of dividing by 1 - p",
        ),
        CatalogEntry(
            name="varm",
            target="mergekit_unconstrained.methods.varm:varm",
            level="tensor",
            summary="weighs every expert by its share in the squared change of a tensor or entry",
            paper=(
                "Knowledge Fusion of Chat LLMs: A Preliminary Technical Report (arXiv 2402.16107)"
            ),
            url="https://arxiv.org/abs/2402.16107",
        ),
        CatalogEntry(
            name="sce_dense",
            target="mergekit_unconstrained.methods.sce_dense:sce_dense",
            level="tensor",
            summary="SCE as its authors' code has it: varying entries decide the shares, all are "
            "merged",
            paper="FuseChat: Knowledge Fusion of Chat Models (arXiv 2408.07990)",
            url="https://arxiv.org/abs/2408.07990",
            relation="`sce` merges the selected entries alone",
        ),
        CatalogEntry(
            name="lines",
            weighs=False,
            target="mergekit_unconstrained.methods.lines:lines",
            level="tensor",
            summary="task arithmetic whose scale rises linearly with depth",
            paper=(
                "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging "
                "(arXiv 2410.17146)"
            ),
            url="https://arxiv.org/abs/2410.17146",
            relation="with beta 0 `task_arithmetic`; its gradients start anew with every slice",
            needs="mergekit_unconstrained.methods.lines:needs",
        ),
        CatalogEntry(
            name="layer_swap",
            target="mergekit_unconstrained.methods.layer_swap:layer_swap",
            level="tensor",
            summary="the outer layers of a language expert around the inner ones of a task expert",
            paper="Layer Swapping for Zero-Shot Cross-Lingual Transfer in Large Language Models "
            "(arXiv 2410.01335)",
            url="https://arxiv.org/abs/2410.01335",
            relation="`passthrough` over slices swaps, but does not average",
        ),
        CatalogEntry(
            name="opcm",
            weighs=False,
            target="mergekit_unconstrained.methods.opcm:opcm",
            level="tensor",
            summary=(
                "merges the experts one after the other, each projected away from those before, at "
                "the experts' mean distance from the base"
            ),
            paper=(
                "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable "
                "Continual Model Merging (arXiv 2501.09522)"
            ),
            url="https://arxiv.org/abs/2501.09522",
            needs="mergekit_unconstrained.methods.opcm:needs",
            cost="matrices",
        ),
        CatalogEntry(
            name="distribution_fusion",
            target="mergekit_unconstrained.methods.distribution_fusion:distribution_fusion",
            level="model",
            summary=(
                "fuses the token distributions of sources of any architecture and tokenizer into a "
                "pivot by fine-tuning it on instruction-response data"
            ),
            paper="Unconstrained Model Merging for Enhanced LLM Reasoning, section on "
            "distribution-based fusion (arXiv 2410.13699)",
            url="https://arxiv.org/abs/2410.13699",
        ),
        CatalogEntry(
            name="unconstrained",
            target="mergekit_unconstrained.methods.unconstrained:unconstrained",
            level="model",
            summary=(
                "any list of models: those of one architecture are merged by `layerwise`, the "
                "results are fused into the pivot by `distribution_fusion`"
            ),
            paper="Unconstrained Model Merging for Enhanced LLM Reasoning (arXiv 2410.13699)",
            url="https://arxiv.org/abs/2410.13699",
        ),
        CatalogEntry(
            name="consensus",
            target="mergekit_unconstrained.methods.consensus:consensus",
            level="tensor",
            summary=(
                "adds up the task vectors and keeps the entries that matter to several experts"
            ),
            paper=(
                "Localizing Task Information for Improved Model Merging and Compression "
                "(arXiv 2405.07813)"
            ),
            url="https://arxiv.org/abs/2405.07813",
            relation=("mergekit's consensus is by sign (ties, sce), never by who needs an entry"),
        ),
        CatalogEntry(
            name="tsvm",
            weighs=False,
            target="mergekit_unconstrained.methods.tsvm:tsvm",
            level="tensor",
            summary=(
                "joins the leading singular vectors of every expert's matrices and makes them "
                "orthogonal"
            ),
            paper=(
                "Task Singular Vectors: Reducing Task Interference in Model Merging (arXiv "
                "2412.00081)"
            ),
            url="https://arxiv.org/abs/2412.00081",
            cost="matrices",
        ),
        CatalogEntry(
            name="pcb",
            target="mergekit_unconstrained.methods.pcb:pcb",
            level="tensor",
            summary=(
                "lets the experts compete for every entry, by magnitude and by agreement with "
                "the others; as published with scope: model"
            ),
            paper=("Parameter Competition Balancing for Model Merging (arXiv 2410.02396)"),
            url="https://arxiv.org/abs/2410.02396",
            needs="mergekit_unconstrained.methods.pcb:needs",
        ),
        CatalogEntry(
            name="widen",
            target="mergekit_unconstrained.methods.widen:widen",
            level="tensor",
            summary=("weighs columns by how far an expert moved their length and their direction"),
            paper=(
                "Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models "
                "via Weight Disentanglement (arXiv 2408.03092)"
            ),
            url="https://arxiv.org/abs/2408.03092",
        ),
        CatalogEntry(
            name="wudi",
            weighs=False,
            target="mergekit_unconstrained.methods.wudi:wudi",
            level="tensor",
            summary=(
                "descends from the sum of the task vectors to what disturbs no expert's own inputs"
            ),
            paper=(
                "Whoever Started the Interference Should End It: Guiding Data-Free Model "
                "Merging via Task Vectors (arXiv 2503.08099)"
            ),
            url="https://arxiv.org/abs/2503.08099",
            cost="matrices",
        ),
        CatalogEntry(
            name="optmerge",
            weighs=False,
            target="mergekit_unconstrained.methods.optmerge:optmerge",
            level="tensor",
            summary=("as wudi, with denoised task vectors and in their leading subspaces"),
            paper=(
                "Unifying Multimodal Large Language Model Capabilities and Modalities via "
                "Model Merging (arXiv 2505.19892)"
            ),
            url="https://arxiv.org/abs/2505.19892",
            cost="matrices",
        ),
        CatalogEntry(
            name="doge",
            weighs=False,
            target="mergekit_unconstrained.methods.doge:doge",
            level="tensor",
            summary=(
                "moves the task vectors by projected gradient descent, keeps their largest "
                "entries, adds them up"
            ),
            paper=(
                "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent "
                "(arXiv 2501.01230)"
            ),
            url="https://arxiv.org/abs/2501.01230",
            needs="mergekit_unconstrained.methods.doge:needs",
            cost="matrices",
        ),
    )
}


def entry_for(method_name: str) -> CatalogEntry | None:
    """The entry a recipe's `merge_method` names (plain or with the alias prefix), else None."""
    return CATALOG.get(method_name.removeprefix(ALIAS_PREFIX))
