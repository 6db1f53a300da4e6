"""Any list of models in one recipe: groups by architecture are merged, then fused into the pivot.

A group is what can be merged tensor by tensor: one architecture, equal shapes, one tokenizer (ours:
the paper leaves the grouping to its reader).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeConfiguration, MergeMethod, MergeOptions
from mergekit_unconstrained.config.agreement import check_agreement
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.parents import Parent, read_parent
from mergekit_unconstrained.config.recipe import JobOptions, check_recipe
from mergekit_unconstrained.engine.plan import Plan, make_plan
from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion import plan as fusion_plan
from mergekit_unconstrained.fusion.models import identity_of
from mergekit_unconstrained.fusion.plan import FusionPlan, Member, MergedGroup
from mergekit_unconstrained.fusion.workdir import Stage, WorkDir, hashed, safe
from mergekit_unconstrained.jobs import fusing
from mergekit_unconstrained.jobs.fast import RunMerge
from mergekit_unconstrained.jobs.fused_targets import pivot_dtype
from mergekit_unconstrained.jobs.publishing import Publication, without_keys
from mergekit_unconstrained.jobs.weights import files_hash, merge_into, run_job
from mergekit_unconstrained.present import fusion as display


@dataclass(frozen=True)
class Group:
    """Models that are merged tensor by tensor; one alone is taken as it is.

    recipe: of job A, None for a single model.
    """

    name: str
    base: Parent | None
    members: tuple[Parent, ...]
    chat_template: str | None = None
    recipe: Document | None = None

    @property
    def representative(self) -> Parent:
        """Whose config and tokenizer the group has."""
        return self.base or self.members[0]


@dataclass(frozen=True)
class Mixture:
    """A checked recipe. groups[0] is the pivot's; fusion None when it is the only one."""

    document: Document
    config: MergeConfiguration
    method: MergeMethod
    job: JobOptions
    groups: tuple[Group, ...]
    fusion: FusionPlan | None

    @property
    def summary(self) -> str:
        """A few words for `check`."""
        sizes = ", ".join(f"{g.name} ({len(g.members)})" for g in self.groups)
        return f"{self.method.spec.name}, groups {sizes}"


def plan(
    document: Document, config: MergeConfiguration, method: MergeMethod, options: MergeOptions
) -> Mixture:
    """Group the models and check every part of what will be done."""
    job = check_recipe(document, method)
    base_reference, references = fusion_plan.models_of(document, config, method)
    base, *parents = [
        read_parent(r, trust_remote_code=options.trust_remote_code)
        for r in (base_reference, *references)
    ]
    parameters = fusion_plan.parameters_by_model(document)
    groups = _groups(document, method, base, parents, parameters)
    for group in groups:
        if group.recipe is not None:
            weight_plan(group, options)
    fusion = None
    if len(groups) > 1:
        members = [Member(g.name, g.representative, 1.0, g.chat_template) for g in groups]
        fusion = fusion_plan.complete_plan(document, config, method, job, members)
    return Mixture(document, config, method, job, groups, fusion)


def show(plan: Mixture, out: Path | None) -> None:
    """Print the tree: groups, stages, sizes, times, licences."""
    display.print_mixture(plan.groups, plan.fusion, plan.summary, out)
    if plan.fusion is not None:
        fusing.warn_of_licences(_with_groups(plan, plan.fusion))


def examine(plan: Mixture) -> None:
    """What `check` does beside planning, as in fusing.py."""
    if plan.fusion is not None:
        fusing.examine(_with_groups(plan, plan.fusion))


def run(
    run_merge: RunMerge,
    method: MergeMethod,
    config: MergeConfiguration,
    out: Path,
    options: MergeOptions,
    document: Document,
) -> None:
    """Carry out a recipe of `unconstrained`."""
    found = plan(document, config, method, options)
    if found.job.dry_run:
        display.print_mixture(found.groups, found.fusion, found.summary, out)
        _warn(found, options)
        return
    if found.fusion is None:
        (group,) = found.groups
        assert group.recipe is not None
        text = group.recipe.text or ""
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
        parents = _parents(group)
        asked = [without_keys(document).data, group.recipe.data, files_hash(parents)]
        publication = Publication(found.job, hashed({"job": asked}), parents, quiet=options.quiet)
        publication.check(card=options.write_model_card)
        run_job(
            run_merge, compat.get("layerwise"), config, out, options, group.recipe,
            publication=publication,
        )  # fmt: skip
        return
    publication = _of_fusion(found, found.fusion, options)
    publication.check(card=options.write_model_card)
    if publication.goes_on(out):
        publication.push(out)
        return
    fused = merged_groups(found, found.fusion, out, options, run_merge)
    fusing.fuse(fused, out, options, run_merge, publication=publication)


def _parents(group: Any) -> tuple[Parent, ...]:
    return (*((group.base,) if group.base is not None else ()), *group.members)


def _of_fusion(found: Mixture, fusion: FusionPlan, options: MergeOptions) -> Publication:
    return fusing.publication_of(_with_groups(found, fusion), options)


def _with_groups(found: Mixture, fusion: FusionPlan) -> FusionPlan:
    """The fusion's plan, which knows what its members will be merged from."""
    groups = tuple(MergedGroup(g.name, g.base, g.members) for g in found.groups)
    return dataclasses.replace(fusion, groups=groups)


def _warn(found: Mixture, options: MergeOptions) -> None:
    """What of a plan may not be given away."""
    if found.fusion is not None:
        publication = _of_fusion(found, found.fusion, options)
        publication.warn()
        fusing.warn_of_licences(_with_groups(found, found.fusion), publication.warning)
    else:
        Publication(found.job, "", _parents(found.groups[0])).warn()


def merged_groups(
    mixture: Mixture, fusion: FusionPlan, out: Path, options: MergeOptions, run_merge: RunMerge
) -> FusionPlan:
    """The fusion's plan with every group merged into one model in the work folder."""
    work = WorkDir(fusion.work_dir(out))
    members = []
    with work.locked(fusion.settings.resume):
        for group, member in zip(mixture.groups, fusion.members, strict=True):
            if group.recipe is None:
                members.append(member)
                continue
            stage = merge_group(group, work, options, run_merge)
            folder = compat.ModelReference.parse(str(_merged_in(stage, group).absolute()))
            members.append(dataclasses.replace(member, parent=read_parent(folder)))
    groups = tuple(MergedGroup(g.name, g.base, g.members) for g in mixture.groups)
    return dataclasses.replace(fusion, pivot=members[0], sources=tuple(members[1:]), groups=groups)


def merge_group(group: Group, work: WorkDir, options: MergeOptions, run_merge: RunMerge) -> Stage:
    """Job A for one group, into WORK/groups/NAME."""
    assert group.base is not None
    assert group.recipe is not None
    parents = (group.base, *group.members)
    files = [f for p in parents for f in (*p.weight_files, *p.adapter_files)]
    inputs = {"recipe": group.recipe.data, "files": identity_of(files)}
    stage = work.stage(f"groups/{safe(group.name)}", inputs)
    if not stage.finished:
        with stage.running() as results:
            (stage.folder / "merge.yml").write_text(group.recipe.text or "", encoding="utf-8")
            merge_into(_merged_in(stage, group), run_merge, weight_plan(group, options), options)
            results["models"] = [p.name for p in group.members]
    return stage


def _merged_in(stage: Stage, group: Group) -> Path:
    """The merged model's folder, by whose name cards call it."""
    return stage.folder / safe(group.name)


def weight_plan(group: Group, options: MergeOptions) -> Plan:
    """The plan of a group's merge; raises what is wrong with it."""
    assert group.recipe is not None
    config = MergeConfiguration.model_validate(group.recipe.data)
    return make_plan(group.recipe, config, compat.get("layerwise"), options)


# -- grouping -------------------------------------------------------------------------------------


def _groups(
    document: Document,
    method: MergeMethod,
    base: Parent,
    parents: list[Parent],
    parameters: Mapping[str, Mapping[str, Any]],
) -> tuple[Group, ...]:
    """The pivot's group first, the others in the order of their first model."""
    heads, found = grouped(base, parents)
    names = fusion_plan.unique_names([_group_name(h, m) for h, m in zip(heads, found, strict=True)])
    groups = []
    for index, (name, members) in enumerate(zip(names, found, strict=True)):
        own = _named_base(document, members, parameters)
        if index == 0:
            _check_pivots_base(document, base, own)
            own = base
        if index == 0 and not members:
            groups.append(Group(name, None, (base,), _template(document, base, parameters)))
            continue
        template = _template(document, members[0], parameters)
        single = len(members) == 1 and not _weighted(members[0], parameters)
        if single:
            if index and own is not None and (why := obstacle(own, members[0])) is not None:
                document.fail(
                    ("models",),
                    f"{members[0].name} names a base that it was not trained from: {why}",
                )
            groups.append(Group(name, None, tuple(members), template))
            continue
        if own is None:
            listed = ", ".join(m.name for m in members)
            document.fail(
                ("models",),
                f"{listed} are of one architecture and are merged first, which needs the model "
                "they were trained from: give each of them `parameters: {base: MODEL}`",
            )
        recipe = _recipe(document, method, name, own, members, parameters)
        groups.append(Group(name, own, tuple(members), template, recipe))
    return tuple(groups)


def grouped(base: Parent, parents: Sequence[Parent]) -> tuple[list[Parent], list[list[Parent]]]:
    """The rule for groups: a model joins the first group whose head it can be merged with.

    Returns every group's head and its members. The base is the head of the first group and no
    member of it; any other head is the first member of its own.
    """
    heads, found = [base], [list[Parent]()]
    for parent in parents:
        for head, members in zip(heads, found, strict=True):
            if mergeable(head, parent):
                members.append(parent)
                break
        else:
            heads.append(parent)
            found.append([parent])
    return heads, found


def mergeable(one: Parent, two: Parent) -> bool:
    """Whether two models can be merged tensor by tensor."""
    return obstacle(one, two) is None


def obstacle(one: Parent, two: Parent) -> str | None:
    """Why two models cannot be merged tensor by tensor, None where they can.

    Architecture, shapes and tokenizer decide.
    """
    try:
        check_agreement(one, two, tokenizer_given=False)
    except ModelError as error:
        return str(error)
    if one.tensors is None or two.tensors is None:
        return None
    common = one.tensors.keys() & two.tensors.keys()
    if not common:
        return f"{two.name} and {one.name} have no tensor in common"
    for name in (n for n in one.tensors if n in common):
        mine, theirs = list(one.tensors[name].shape), list(two.tensors[name].shape)
        if mine != theirs:
            return f"{name} is {theirs} in {two.name} but {mine} in {one.name}"
    return None


def _weighted(parent: Parent, parameters: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a model that is alone in its group is to be mixed with its base all the same."""
    own = parameters.get(parent.name, {})
    return own.get("weight") not in (None, 1, 1.0) or bool(own.get("coefficients"))


def _named_base(
    document: Document, members: list[Parent], parameters: Mapping[str, Mapping[str, Any]]
) -> Parent | None:
    """The base that the models of a group name, which must be one."""
    named = {str(parameters.get(m.name, {}).get("base") or "") for m in members} - {""}
    if len(named) > 1:
        document.fail(
            ("models",),
            f"{', '.join(m.name for m in members)} are of one architecture but name different "
            f"bases ({', '.join(sorted(named))}): task vectors need one",
        )
    return read_parent(compat.ModelReference.parse(named.pop())) if named else None


def _check_pivots_base(document: Document, base: Parent, named: Parent | None) -> None:
    """Models of the pivot's group are merged from `base_model`, and may name no other base."""
    if named is None or named.reference == base.reference:
        return
    if named.folder is None or base.folder is None or not named.folder.samefile(base.folder):
        document.fail(
            ("models",),
            f"a model of the pivot's group names the base {named.name}, but that group is merged "
            f"from `base_model: {base.name}`: leave `base` out, or change base_model",
        )


def _recipe(
    document: Document,
    method: MergeMethod,
    name: str,
    base: Parent,
    members: list[Parent],
    parameters: Mapping[str, Mapping[str, Any]],
) -> Document:
    """The recipe of job A for a group."""
    shared = fusion_plan.shared_parameters(document, method)
    experts = []
    tables = set()
    for member in members:
        own = parameters.get(member.name, {})
        values = {"weight": own.get("weight", 1.0 / len(members))}
        if "density" in own:
            values["density"] = own["density"]
        tables.add(str(own.get("coefficients") or ""))
        experts.append({"model": member.name, "parameters": values})
    if len(tables - {""}) > 1:
        document.fail(("models",), f"the models of group {name} name different coefficient tables")
    settings: dict[str, Any] = {"operator": shared["operator"]}
    if tables - {""}:
        settings["coefficients"] = (tables - {""}).pop()
    data: dict[str, Any] = {
        "merge_method": "layerwise",
        "base_model": base.name,
        "models": experts,
        "parameters": settings,
    }
    data["dtype"] = document.data.get("dtype") or pivot_dtype(base)
    return Document.parse(yaml.safe_dump(data, sort_keys=False), f"{document.name}, group {name}")


def _template(
    document: Document, parent: Parent, parameters: Mapping[str, Mapping[str, Any]]
) -> str | None:
    own = parameters.get(parent.name, {})
    return fusion_plan.read_template(str(own.get("chat_template") or ""), document)


def _group_name(head: Parent, members: list[Parent]) -> str:
    if len(members) == 1:
        return members[0].name
    return str(getattr(head.config, "model_type", "group")) if members else head.name
