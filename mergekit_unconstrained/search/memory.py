"""Candidates merged straight into a live model: nothing touches the disk.

The parents are read once, as far as memory allows; tensors in which no expert differs from the base
are written once; magnitudes are ranked once, so that every density is one comparison. What arrives
in the model is, bit for bit, what job A would have written for the same recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from mergekit_unconstrained import compat
from mergekit_unconstrained.catalog import ALIAS_PREFIX
from mergekit_unconstrained.compat import MergeConfiguration, PlannedTask
from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.table import Table, parse_table
from mergekit_unconstrained.engine import prepass
from mergekit_unconstrained.engine.context import MergeContext, using
from mergekit_unconstrained.engine.plan import Plan, PlannedTensor, coefficients_of
from mergekit_unconstrained.errors import ModelError, NonFiniteError
from mergekit_unconstrained.numerics.operators import merge
from mergekit_unconstrained.numerics.ranking import Ranking, kept, ranking
from mergekit_unconstrained.numerics.settings import Expert, Settings
from mergekit_unconstrained.search.space import Candidate

NOTHING = torch.empty(0)
Load = Callable[[str, str], torch.Tensor]
"""(model as in the recipe, name in its file) -> tensor."""
Compute = Callable[[dict[str, torch.Tensor]], torch.Tensor | None]
"""Parents' tensors, by model -> the merged one."""
Planner = Callable[[MergeConfiguration], list[PlannedTask]]
"""mergekit's planner, on names alone."""


@dataclass
class Held:
    """One output tensor: its parents, None while they are read anew for every candidate.

    changed: the models whose tensor differs from the base's. exact: whether `parents` are what the
    files hold, to the last bit.
    """

    planned: PlannedTensor
    target: torch.Tensor
    parents: dict[str, torch.Tensor] | None
    changed: frozenset[str]
    rankings: dict[str, Ranking]
    exact: bool = True


class LiveMerge:
    """Writes candidates of one recipe into one model.

    model: of the merge's architecture and shapes, whose weights will be overwritten. budget: bytes
    that parents and rankings may take. advance: told of every tensor that was read.
    """

    def __init__(
        self,
        plan: Plan,
        model: Any,
        load: Load,
        planner: Planner,
        budget: int,
        advance: Callable[[int], Any] = lambda _: None,
    ) -> None:
        self.plan = plan
        self._load = load
        self._planner = planner
        self._budget = budget
        of_model = plan.shared.get("scope") == "model"
        name = plan.method.spec.name.removeprefix(ALIAS_PREFIX)
        self._layerwise = name == "layerwise" and not of_model
        self._needs = prepass.needs_of(name)
        self._dtype = compat.dtype_from_name(plan.config.dtype)
        self._out_dtype = compat.dtype_from_name(plan.config.out_dtype)
        self._tasks = {t.output.name: t for t in planner(plan.config)}
        self._written: dict[str, object] = {}
        targets = _targets(model, plan)
        self.fixed = 0
        self.held: list[Held] = []
        for planned in plan.tensors:
            if planned.name in targets:
                self._hold(planned, targets[planned.name])
            advance(1)
        self.read_anew = sum(one.parents is None for one in self.held)

    def _hold(self, planned: PlannedTensor, target: torch.Tensor) -> None:
        parents = self._read(planned)
        if not parents:
            raise ModelError(
                f"{planned.name} is put together of several tensors of {self.plan.base.name}'s "
                "files when they are loaded, as the experts of a mixture are: a search cannot "
                "merge it in memory; choose such a model's coefficients by hand"
            )
        base = parents.get(self.plan.base.name)
        changed = frozenset(
            model
            for model, tensor in parents.items()
            if base is None or (tensor is not base and not torch.equal(tensor, base))
        )
        settings = Settings.of(planned.name, self.plan.shared) if self._layerwise else None
        # An average of equal tensors is rounded on its way; every other operator gives the base.
        averaged = settings is None or settings.operator == "linear"
        if base is not None and not changed and not averaged and self._kept_by_casts(base):
            self._copy(target, base)
            self.fixed += 1
            return
        rankings = {}
        stored = {t.dtype for t in parents.values()}
        parents = self._cast(parents)
        exact = all(_widens(one, t.dtype) for one in stored for t in parents.values())
        base = parents.get(self.plan.base.name)
        size = sum(t.nbytes for t in parents.values())
        if base is not None and settings is not None and size <= self._budget:
            for model in sorted(changed):
                needed = 4 * base.numel()
                if size + needed <= self._budget:
                    found = ranking(base, parents[model], settings)
                    if found is not None:
                        rankings[model] = found
                        size += needed
        fits = size <= self._budget
        self._budget -= size if fits else 0
        held = parents if fits else None
        self.held.append(Held(planned, target, held, changed, rankings, exact))

    def _read(self, planned: PlannedTensor) -> dict[str, torch.Tensor]:
        found = {}
        for model, stored in planned.inputs.items():
            if stored is not None:
                found[model] = self._load(model, stored)
        return found

    def _cast(self, parents: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parents as mergekit's loader hands them on: in the recipe's dtype."""
        if self._dtype is None:
            return parents
        return {model: t.to(self._dtype) for model, t in parents.items()}

    def _kept_by_casts(self, tensor: torch.Tensor) -> bool:
        """Whether the recipe's dtypes leave a tensor as it is."""
        cast = tensor
        for dtype in (self._dtype, self._out_dtype):
            cast = cast if dtype is None else cast.to(dtype)
        return torch.equal(cast.to(tensor.dtype), tensor)

    # -- candidates -------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, candidate: Candidate) -> int:
        """Merge a candidate into the model; gives the number of tensors that were computed.

        Tensors whose coefficients are those of the candidate before are left as they are.
        NonFiniteError when the result holds NaN or infinity.
        """
        computed = 0
        context, work = self._work(candidate)
        with using(context):
            for one, key, compute in work:
                if self._written.get(one.planned.name) == key:
                    continue
                self._written.pop(one.planned.name, None)
                parents = one.parents
                if parents is None:
                    parents = self._cast(self._read(one.planned))
                result = compute(parents)
                if result is None:
                    continue
                self._copy(one.target, result)
                if not self.plan.job.allow_nan and not _finite(one.target):
                    raise NonFiniteError(f"{one.planned.name} of this candidate is not finite")
                self._written[one.planned.name] = key
                computed += 1
        return computed

    @torch.no_grad()
    def differ(self, one: Candidate, other: Candidate) -> bool:
        """Whether two candidates are different models; the live one stays as it is."""
        (context, work), (other_context, other_work) = self._work(one), self._work(other)
        pairs = list(zip(work, other_work, strict=True))
        # Smallest first: the answer is mostly had from the first tensor that is computed.
        pairs.sort(key=lambda pair: pair[0][0].target.numel())
        for (held, key, compute), (_, changed, again) in pairs:
            if key == changed:
                continue
            parents = held.parents or self._cast(self._read(held.planned))
            with using(dataclasses.replace(context, allow_nan=True)):
                before = compute(parents)
            with using(dataclasses.replace(other_context, allow_nan=True)):
                after = again(parents)
            if before is None or after is None or not torch.equal(before, after):
                return True
        return False

    @torch.no_grad()
    def write_parent(self, name: str) -> None:
        """Put one of the parents, as it is, into the model."""
        self._written.clear()
        for one in self.held:
            parents = one.parents
            if parents is None or not one.exact:
                parents = self._read(one.planned)
            found = parents.get(name)
            if found is None:  # an optional tensor: what the base has
                found = parents[self.plan.base.name]
            one.target.copy_(found)

    def _copy(self, target: torch.Tensor, result: torch.Tensor) -> None:
        with torch.no_grad():
            target.copy_(result if self._out_dtype is None else result.to(self._out_dtype))

    def _work(
        self, candidate: Candidate
    ) -> tuple[MergeContext, Iterator[tuple[Held, object, Compute]]]:
        """Every tensor with what its result depends on, and how it is computed, in what context."""
        context = MergeContext(self.plan.roles, self.plan.job.allow_nan, self._out_dtype)
        if self._layerwise:
            return context, self._layerwise_work(candidate)
        recipe = MergeConfiguration.model_validate(yaml.safe_load(candidate.in_one()))
        tasks = {t.output.name: t for t in self._planner(recipe)}
        statistics = self._statistics(candidate, tasks)
        work = self._planned_work(tasks, repr(statistics))
        return dataclasses.replace(context, statistics=statistics), work

    def _planned_work(
        self, tasks: Mapping[str, PlannedTask], statistics: str
    ) -> Iterator[tuple[Held, object, Compute]]:
        for one in self.held:
            task = tasks[one.planned.name]
            key = (repr((task.parameters, task.input_parameters)), statistics)
            yield one, key, task.execute

    def _statistics(
        self, candidate: Candidate, tasks: Mapping[str, PlannedTask]
    ) -> prepass.Statistics | None:
        """What the method wants to know of the whole model, measured on the parents held here."""
        if self._needs is None:
            return None
        table = None
        if candidate.table is not None:
            table = parse_table(Document.parse(candidate.table, "the candidate's table"))
        base = self.plan.base.name
        tensors = []
        for planned in self.plan.tensors:
            task = tasks[planned.name]
            tensors.append(
                dataclasses.replace(
                    planned,
                    parameters=task.parameters,
                    input_parameters=task.input_parameters,
                    coefficients=coefficients_of(task, planned.role, table, base),
                )
            )
        measures = prepass.widened(self._needs(tensors), prepass.widest(self.plan))
        if not measures:
            return None
        held = {one.planned.name: one.parents for one in self.held}

        def load(model: str, tensor: PlannedTensor) -> torch.Tensor:
            parents = held.get(tensor.name) or self._cast(self._read(tensor))
            return parents[model]

        allow_nan = self.plan.job.allow_nan
        return prepass.measure(measures, tensors, base, load, allow_nan=allow_nan)

    # -- layerwise --------------------------------------------------------------------------------

    def _layerwise_work(self, candidate: Candidate) -> Iterator[tuple[Held, object, Compute]]:
        table = None
        if candidate.table is not None:
            table = parse_table(Document.parse(candidate.table, "the candidate's table"))
        shared = {**self.plan.shared, **numbers(candidate.recipe.get("parameters") or {})}
        own = {str(m["model"]): m.get("parameters") or {} for m in candidate.recipe["models"]}
        for one in self.held:
            settings = Settings.of(one.planned.name, shared)
            experts = {
                e.name: self._expert(e.name, one.planned, table, own.get(e.name, {}))
                for e in self.plan.experts
                if one.planned.inputs.get(e.name) is not None
            }
            key = (settings, tuple(experts.items()))

            def compute(
                parents: dict[str, torch.Tensor],
                one: Held = one,
                settings: Settings = settings,
                experts: Mapping[str, Expert] = experts,
            ) -> torch.Tensor:
                base = parents[self.plan.base.name]
                merged = [
                    self._with_tensor(one, settings, e, parents[name])
                    for name, e in experts.items()
                ]
                return merge(base, merged, settings)

            yield one, key, compute

    def _expert(
        self,
        name: str,
        planned: PlannedTensor,
        table: Table | None,
        given: Mapping[str, Any],
    ) -> Expert:
        """One expert's share in a tensor; the tensor itself comes later."""
        cell = table.lookup(name, planned.role) if table is not None else None
        values = {**self._tasks[planned.name].input_parameters[name], **numbers(given)}
        if cell is not None and cell.weight is not None:
            values["weight"] = cell.weight
        if cell is not None and cell.density is not None:
            values["density"] = cell.density
        return Expert(tensor=NOTHING, model=name, **values)

    def _with_tensor(
        self, one: Held, settings: Settings, expert: Expert, tensor: torch.Tensor
    ) -> Expert:
        found = one.rankings.get(expert.model)
        known = kept(found, expert, settings) if found is not None else None
        return dataclasses.replace(expert, tensor=tensor, kept=known)


def numbers(parameters: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers among a recipe's parameters: what a search may have written there."""
    return {
        k: v
        for k, v in parameters.items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }


def _widens(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of a dtype is one of the other too."""
    return torch.promote_types(dtype, other) == other


def _finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinity; their sum alone may overflow, in float16 easily."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _targets(model: Any, plan: Plan) -> dict[str, torch.Tensor]:
    """Output tensor -> the model's own of that name; ModelError when some are not covered."""
    own = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}."
    found: dict[str, torch.Tensor] = {}
    for planned in plan.tensors:
        for name in (planned.name, prefix + planned.name, planned.name.removeprefix(prefix)):
            if name in own:
                found[planned.name] = own[name].data
                break
    covered = {t.data_ptr() for t in found.values()}
    lost = [name for name, t in model.named_parameters() if t.data_ptr() not in covered]
    if lost:
        raise ModelError(
            f"{plan.base.name} cannot be merged in memory: no merged tensor belongs to "
            f"{lost[0]} (and {len(lost) - 1} more) of the live model"
        )
    return found
