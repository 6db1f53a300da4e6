"""The last step of a fusion: several targets become one model, by a generated recipe of job A."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeConfiguration, MergeOptions
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.parents import Parent
from mergekit_unconstrained.engine.plan import make_plan
from mergekit_unconstrained.fusion.stages import Run
from mergekit_unconstrained.jobs.fast import RunMerge
from mergekit_unconstrained.jobs.weights import merge_into

SHARING = frozenset({"sce", "sce_dense", "varm"})
"""Operators that share out among the experts themselves, and so are published with weights of 1."""


def merge_targets(
    run: Run,
    models: dict[str, Path],
    folder: Path,
    options: MergeOptions,
    run_merge: RunMerge,
) -> None:
    """Merge several targets by the recipe of job A that is written to WORK/merge.yml."""
    text = targets_recipe(run, models, options)
    path = run.work.root / "merge.yml"
    path.write_text(text, encoding="utf-8")
    document = Document.parse(text, str(path))
    config = MergeConfiguration.model_validate(document.data)
    method = compat.get(config.merge_method)
    merge_into(folder, run_merge, make_plan(document, config, method, options), options)


def targets_recipe(run: Run, models: dict[str, Path], options: MergeOptions) -> str:
    """The recipe: the pivot as base, the targets as experts.

    The sources' weights become the targets', with a mean of 1 for the operators that share out by
    themselves, a sum of 1 for the others: equal targets give that target in either case.
    """
    kind = run.settings.post_merge
    weights = {m.name: m.weight for m in run.sources}
    total = sum(weights.get(name, 1.0) for name in models) or 1.0
    scale = (len(models) if kind in SHARING else 1) / total
    experts = [
        {
            "model": str(folder.absolute()),
            "parameters": {"weight": weights.get(name, 1.0) * scale},
        }
        for name, folder in models.items()
    ]
    parameters: dict[str, Any] = {"operator": "task_arithmetic" if kind == "layerwise" else kind}
    if kind in ("sce", "sce_dense"):
        parameters["select_topk"] = run.settings.post_merge_topk
    if kind == "ties":
        for expert in experts:
            density = {"density": run.settings.post_merge_density}
            expert["parameters"] = {**expert["parameters"], **density}  # type: ignore[dict-item]
    if kind == "layerwise":
        table = energy_table(run, list(models.values()), options)
        parameters["coefficients"] = str(table.absolute())
    recipe = {
        "merge_method": "layerwise",
        "base_model": str(run.pivot.weights.absolute()),
        "models": experts,
        "parameters": parameters,
        "dtype": pivot_dtype(run.plan.pivot.parent),
    }
    return yaml.safe_dump(recipe, sort_keys=False)


def energy_table(run: Run, targets: Sequence[Path], options: MergeOptions) -> Path:
    """`post_merge: layerwise`: weights by the energy of each task vector, layer by kind (ours)."""
    from mergekit_unconstrained.jobs.tables import starting_table as table_text

    base = str(run.pivot.weights.absolute())
    models = [base, *(str(t.absolute()) for t in targets)]
    path = run.work.root / "coefficients.yml"
    path.write_text(table_text(models, "energy", options.lora_merge_cache), encoding="utf-8")
    return path


def pivot_dtype(pivot: Parent) -> str:
    """The dtype most of the pivot's weights are stored in."""
    names = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    stored = [h.dtype for h in (pivot.tensors or {}).values() if h.dtype in names]
    return names[max(set(stored), key=stored.count)] if stored else "bfloat16"
