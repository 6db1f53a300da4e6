"""Every model of a fusion in a folder here: fetched where it is on the Hub, its adapter applied."""

from __future__ import annotations

from pathlib import Path

from mergekit_unconstrained import compat, present
from mergekit_unconstrained.compat import MergeOptions, ModelReference
from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.models import LocalModel, identity_of
from mergekit_unconstrained.fusion.plan import FusionPlan, Member
from mergekit_unconstrained.fusion.stages import Run
from mergekit_unconstrained.fusion.workdir import WorkDir
from mergekit_unconstrained.jobs.weights import apply_adapters
from mergekit_unconstrained.present import bars

READING = ("*.jinja", "additional_chat_templates/*.jinja", "*.json", "*.model", "*.txt")
"""What a model reads text with. mergekit's own download leaves out chat templates that are files of
their own, and without them a model would be read as plain text."""


def located(plan: FusionPlan, options: MergeOptions, work: WorkDir) -> Run:
    """A plan whose models lie here."""
    models = [local_model(m, plan, options) for m in plan.members]
    return Run(
        plan=plan,
        pivot=models[0],
        sources=tuple(models[1:]),
        work=work,
        progress=bars.quiet if options.quiet else bars.progress,
        quiet=options.quiet,
    )


def local_model(member: Member, plan: FusionPlan, options: MergeOptions) -> LocalModel:
    """A member whose files are here."""
    reference = member.parent.reference
    with present.status(f"fetching {member.parent.name}", options.quiet):
        folder = fetch(reference, options.transformers_cache)
    weights = folder
    if reference.lora is not None:
        adapted = apply_adapters([member.parent], options)
        assert adapted.lora_merge_cache is not None
        weights = compat.merge_adapter(reference, Path(adapted.lora_merge_cache), adapted)
    files = [f for f in weights.iterdir() if f.suffix in (".safetensors", ".bin", ".json")]
    return LocalModel(
        name=member.name,
        weights=weights,
        tokenizer_folder=folder,
        identity=identity_of(files),
        max_length=plan.settings.max_length,
        chat_template=member.chat_template,
        weight=member.weight,
    )


def fetch(reference: ModelReference, cache: str | None) -> Path:
    """The folder of a model without its adapter; ModelError when the Hub does not give it."""
    import huggingface_hub

    plain = ModelReference(model=reference.model)
    path = reference.model.path
    try:
        folder = Path(plain.local_path(cache))
        if Path(path).exists():
            return folder
        # the same commit for both: a branch may have moved in between
        commit = folder.name if folder.parent.name == "snapshots" else reference.model.revision
        huggingface_hub.snapshot_download(
            path, revision=commit, cache_dir=cache, allow_patterns=list(READING)
        )
    except Exception as error:
        raise ModelError(
            f"{plain} cannot be fetched from the Hub ({' '.join(str(error).split())[:200]}): run "
            "the same command again when it can be reached, what is here is kept"
        ) from error
    return folder
