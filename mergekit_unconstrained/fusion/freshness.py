"""Which stages of a work folder a recipe would still use, told from their manifests alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mergekit_unconstrained.fusion.data.prepared import dataset_identity
from mergekit_unconstrained.fusion.plan import FusionPlan
from mergekit_unconstrained.fusion.workdir import WorkDir, safe

_NAMED = ("distributions", "alignment")  # stages that are called after one model
_FILTERED = frozenset({"training"})  # what of it decides is not the whole of it


def outdated(work: WorkDir, plan: FusionPlan) -> dict[Path, str]:
    """Folder -> why its stage is of other data, models or settings than the recipe's.

    A model's own files are not read: changed weights under the same name are seen when it runs.
    """
    asked = plan.settings.model_dump(mode="json") | {
        "dataset": dataset_identity(plan.dataset),
        "max_steps": plan.max_steps,
        "epochs": 0.0 if plan.max_steps else plan.epochs,
        "learning_rate": plan.learning_rate,
        "lora_rank": plan.lora_rank,
    }
    names = {safe(member.name) for member in plan.members}
    found: dict[Path, str] = {}
    manifests = dict(work.stages())
    for folder, manifest in manifests.items():
        kind, _, model = str(manifest["stage"]).partition("/")
        inputs = manifest["inputs"]
        different = [
            name
            for name in (inputs.keys() & asked.keys()) - _FILTERED
            if inputs[name] != asked[name] and not (model == "sft" and name == "lm_loss_weight")
        ]
        if kind in _NAMED and model not in names:
            found[folder] = f"{model} is not in the recipe"
        elif different:
            found[folder] = f"other {', '.join(sorted(different))}"
    left = [folder for folder in manifests if folder not in found]
    for stale in _growing(found):  # what was made from a stale stage is stale as well
        name = stale.relative_to(work.root).as_posix()
        key = str(manifests[stale]["key"])
        for folder in [f for f in left if key in json.dumps(manifests[f]["inputs"])]:
            found[folder] = f"follows {name}"
            left.remove(folder)
    return found


def _growing(found: dict[Path, str]) -> Iterator[Path]:
    """The keys of a mapping, those too that are added meanwhile."""
    seen = 0
    while seen < len(found):
        yield list(found)[seen]
        seen += 1
