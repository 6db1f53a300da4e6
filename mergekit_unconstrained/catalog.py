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
    )
}


def entry_for(method_name: str) -> CatalogEntry | None:
    """The entry a recipe's `merge_method` names (plain or with the alias prefix), else None."""
    return CATALOG.get(method_name.removeprefix(ALIAS_PREFIX))
