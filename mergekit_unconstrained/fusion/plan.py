"""From a recipe of `distribution_fusion` to what will be done, before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeConfiguration, MergeMethod, MergeOptions
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.parents import Parent, read_parent
from mergekit_unconstrained.config.recipe import JobOptions, check_recipe
from mergekit_unconstrained.engine.checks import has_tokenizer
from mergekit_unconstrained.errors import DataError, ModelError, RecipeError
from mergekit_unconstrained.fusion.settings import (
    FusionSettings,
    load_settings,
    settings_document,
)
from mergekit_unconstrained.fusion.training.arguments import (
    batch_shape,
    check_training_block,
    check_training_values,
)

UNUSED_KEYS = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "out_dtype")
"""Keys of a recipe that mean nothing where whole models are fused."""


@dataclass(frozen=True)
class Member:
    """The pivot or a source. name: short and unique. chat_template: as Encoder takes it."""

    name: str
    parent: Parent
    weight: float = 1.0
    chat_template: str | None = None


@dataclass(frozen=True)
class MergedGroup:
    """What a member of the plan was merged from. base: None for a single model."""

    name: str
    base: Parent | None
    models: tuple[Parent, ...]

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The base and the models."""
        return (*((self.base,) if self.base is not None else ()), *self.models)


@dataclass(frozen=True)
class FusionPlan:
    """A checked fusion.

    dataset: as the recipe says it. groups: of each member, where members were merged from several
    models beforehand.
    """

    document: Document
    config: MergeConfiguration
    method: MergeMethod
    job: JobOptions
    pivot: Member
    sources: tuple[Member, ...]
    dataset: str
    settings: FusionSettings
    max_steps: int
    epochs: float
    learning_rate: float
    lora_rank: int
    settings_path: str | None = None
    groups: tuple[MergedGroup, ...] = ()

    @property
    def members(self) -> tuple[Member, ...]:
        """The pivot and the sources."""
        return (self.pivot, *self.sources)

    @property
    def parents(self) -> tuple[tuple[str, Parent], ...]:
        """Every model that went in, with its role, whatever it was merged into beforehand."""
        if not self.groups:
            return tuple(("pivot" if m is self.pivot else "source", m.parent) for m in self.members)
        found = []
        for index, group in enumerate(self.groups):
            role = "pivot" if index == 0 else "source"
            for parent in group.parents:
                base = f"base of {group.name}" if parent is group.base else None
                found.append((base or role, parent))
        return tuple(found)

    @property
    def summary(self) -> str:
        """A few words for `check`."""
        names = ", ".join(s.name for s in self.sources)
        return f"{self.method.spec.name}, {names} into the pivot {self.pivot.name}"

    def work_dir(self, out: Path) -> Path:
        """Where the stages keep their results."""
        return Path(self.settings.work_dir or f"{out}.fusion")


def plan_fusion(
    document: Document, config: MergeConfiguration, method: MergeMethod, options: MergeOptions
) -> FusionPlan:
    """Check a recipe, its settings, models and data; RecipeError, ModelError or DataError."""
    job = check_recipe(document, method)
    if config.dtype:
        document.fail(("dtype",), "the result keeps the pivot's dtype: remove it")
    if job.allow_nan:
        document.fail(("parameters", "allow_nan"), "a model with NaN cannot be fused: remove it")
    pivot_reference, references = models_of(document, config, method)
    pivot, *sources = [
        read_parent(r, trust_remote_code=options.trust_remote_code)
        for r in (pivot_reference, *references)
    ]
    parameters = parameters_by_model(document)
    names = unique_names([pivot.name, *(s.name for s in sources)])
    members = []
    for parent, name in zip((pivot, *sources), names, strict=True):
        own = parameters.get(parent.name, {})
        template = read_template(str(own.get("chat_template") or ""), document)
        members.append(Member(name, parent, float(own.get("weight", 1.0)), template))
    return complete_plan(document, config, method, job, members)


def complete_plan(
    document: Document,
    config: MergeConfiguration,
    method: MergeMethod,
    job: JobOptions,
    members: list[Member],
) -> FusionPlan:
    """The plan for a pivot (first) and sources that are known; reads the settings and checks."""
    shared = shared_parameters(document, method)
    given = document.data.get("parameters") or {}
    if shared["max_steps"] and given.get("epochs") is not None:
        document.fail(("parameters", "epochs"), "is given beside `max_steps`: name one of them")
    settings_path = str(shared["settings"]) or None
    settings = load_settings(settings_path)
    places = settings_document(settings_path)
    check_training_block(settings, places)
    check_training_values(settings, places)
    batch_shape(settings, settings.processes)
    check_members(members)
    check_dataset(str(shared["dataset"]), document)
    if settings.target == "teacher" and settings.pairing == "joint" and len(members) > 2:
        raise RecipeError(
            "`target: teacher` takes one source at a time: use `pairing: pairwise`, or another "
            "target"
        )
    return FusionPlan(
        document=document,
        config=config,
        method=method,
        job=job,
        pivot=members[0],
        sources=tuple(members[1:]),
        dataset=str(shared["dataset"]),
        settings=settings,
        max_steps=int(shared["max_steps"]),
        epochs=float(shared["epochs"]),
        learning_rate=float(shared["learning_rate"]),
        lora_rank=int(shared["lora_rank"]),
        settings_path=settings_path,
    )


def models_of(
    document: Document, config: MergeConfiguration, method: MergeMethod
) -> tuple[compat.ModelReference, list[compat.ModelReference]]:
    """The base model and the others, in the recipe's order."""
    for key in UNUSED_KEYS:
        if getattr(config, key, None):
            document.fail((key,), f"means nothing to {method.spec.name!r}: remove it")
    if config.base_model is None:
        document.fail((), f"{method.spec.name!r} needs a `base_model`: the pivot")
    if not config.models:
        document.fail((), "names no `models`: list the sources")
    base = config.base_model
    others = [m.model for m in config.models if m.model != base]
    if not others:
        document.fail(("models",), "names no source beside the pivot")
    return base, others


def parameters_by_model(document: Document) -> dict[str, Mapping[str, Any]]:
    """What the recipe sets for each model, by the model as written."""
    return {str(m["model"]): m.get("parameters") or {} for m in document.data.get("models") or []}


def shared_parameters(document: Document, method: MergeMethod) -> dict[str, Any]:
    """The recipe's own parameters with their defaults; values that differ by layer are refused."""
    given = document.data.get("parameters") or {}
    values = {}
    for spec in method.spec.shared_parameters:
        value = given.get(spec.name, spec.default)
        if isinstance(value, list | dict):
            document.fail(("parameters", spec.name), "takes one value for the whole fusion")
        values[spec.name] = spec.validate(value)
    return values


def unique_names(models: list[str]) -> list[str]:
    """Short names: the last part of each path, numbered where two are the same."""
    names: list[str] = []
    for model in models:
        plain = model.split("+")[-1].split("@")[0].rstrip("/").rsplit("/", 1)[-1] or "model"
        name, number = plain, 2
        while name in names:
            name, number = f"{plain}-{number}", number + 1
        names.append(name)
    return names


def read_template(value: str, document: Document) -> str | None:
    """A recipe's chat_template for an Encoder: the model's own, "none", or a file's text."""
    if value in ("", "none"):
        return value or None
    try:
        return Path(value).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"{document.name}: the chat template {value!r} cannot be read ({error.strerror}); "
            "`chat_template` is a file, or `none` for plain text"
        ) from None


def check_members(members: list[Member]) -> None:
    """Every model needs a tokenizer of its own: alignment compares them."""
    for index, member in enumerate(members):
        folder = member.parent.folder
        if folder is not None and not has_tokenizer(folder):
            role = "pivot" if index == 0 else "source"
            raise ModelError(
                f"the {role} {member.parent.name} has no tokenizer in its folder: copy "
                "tokenizer.json and tokenizer_config.json of the model there"
            )


def check_dataset(dataset: str, document: Document) -> None:
    """DataError when the data is named nowhere, or is a path that is not there."""
    if not dataset:
        raise RecipeError(
            f"{document.name}: `parameters` names no `dataset`: the instruction-response data on "
            "which distributions are compared (a .jsonl file, a folder, a Hub id)"
        )
    looks_local = dataset.startswith((".", "/", "~")) or dataset.count("/") > 1
    looks_local = looks_local or Path(dataset).suffix in (".jsonl", ".json", ".parquet", ".csv")
    if looks_local and not Path(dataset).expanduser().exists():
        raise DataError(
            f"the dataset {dataset} does not exist (paths are relative to the current directory)"
        )
