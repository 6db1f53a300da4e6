"""Numbers of whole models, for methods that look at more than one tensor: thresholds, norms, signs.

A method says what it wants as measures (`needs` in its catalogue entry). They are taken one after
the other by streaming over the parents, one tensor at a time, and a later one may use what earlier
ones found. Quantiles are exact (numerics/quantiles.py): two passes over the files for each measure,
one where only sums are wanted. Memory does not grow with the model. What was found is kept by the
content of the files.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mergekit_unconstrained.catalog import entry_for
from mergekit_unconstrained.engine.files import replacing
from mergekit_unconstrained.engine.plan import Plan, PlannedTensor
from mergekit_unconstrained.engine.task_vectors import offsets
from mergekit_unconstrained.errors import ModelError, NonFiniteError, RecipeError
from mergekit_unconstrained.numerics.quantiles import Selection, Summary

PIECE = 1 << 20
"""Entries measured at a time."""

Load = Callable[[str, PlannedTensor], torch.Tensor]
"""(model, output tensor) -> the model's tensor, as the kernel will get it."""
Rows = Mapping[str, torch.Tensor]
Statistics = Mapping[str, Mapping[str, Summary]]
"""Name of a measure -> label of a row -> what it comes to."""


@dataclass(frozen=True)
class Chunk:
    """Some entries of the task vectors of one tensor, or all of them.

    d: [N, n], d_i = T_i - T0, float32 or wider, for the measure to overwrite. models: the N experts
    that have the tensor. shape: of the whole tensor. earlier: what the measures before found.
    """

    d: torch.Tensor
    models: tuple[str, ...]
    tensor: PlannedTensor
    shape: tuple[int, ...]
    earlier: Statistics

    def per_model(self, parameter: str) -> torch.Tensor:
        """[N, 1], the values of a parameter in this tensor."""
        values = [float(self.tensor.input_parameters[m][parameter]) for m in self.models]
        return torch.tensor(values, dtype=self.d.dtype)[:, None]


def magnitudes(chunk: Chunk) -> Rows:
    """|d_i| of every expert, by its name."""
    return dict(zip(chunk.models, chunk.d.abs_(), strict=True))


def everything(_: PlannedTensor) -> bool:
    """Every tensor."""
    return True


def nothing(_: PlannedTensor) -> bool:
    """No tensor."""
    return False


@dataclass(frozen=True)
class Measure:
    """One look at the whole model.

    name: what is measured, with everything that changes it; what is found is kept under it.
    numbers: the rows of numbers of a chunk, by label. ranks: label, count -> which of a row's
    numbers are wanted by rank, 0 the smallest; None: sums and extremes are enough. covers: the
    tensors that take part. dtype: torch.float32 or float64, of the arithmetic. whole: those that
    `numbers` must see in one piece.
    """

    name: str
    numbers: Callable[[Chunk], Rows] = magnitudes
    ranks: Callable[[str, int], Iterable[int]] | None = None
    covers: Callable[[PlannedTensor], bool] = everything
    dtype: torch.dtype = torch.float32
    whole: Callable[[PlannedTensor], bool] = nothing

    @property
    def passes(self) -> int:
        """How often the files are read for it."""
        return 1 if self.ranks is None else Selection.passes(self.dtype)


Needs = Callable[[Sequence[PlannedTensor]], tuple[Measure, ...]]
"""What a method wants to know of the whole model, () for nothing."""


def needs_of(method: str) -> Needs | None:
    """What a method asks for, by its catalogue entry; None for nothing."""
    entry = entry_for(method)
    if entry is None or not entry.needs:
        return None
    module, _, name = entry.needs.partition(":")
    needs: Needs = getattr(importlib.import_module(module), name)
    return needs


def of_model(tensors: Sequence[PlannedTensor]) -> bool:
    """Whether a recipe says `scope: model`; RecipeError where it says so of a part only."""
    scopes = {t.parameters["scope"] for t in tensors}
    if len(scopes) > 1:
        raise RecipeError("`scope` must be one for the whole merge, without `filter`")
    return scopes == {"model"}


def one_value(tensors: Sequence[PlannedTensor], parameter: str) -> Any:
    """A parameter that `scope: model` needs once for all; RecipeError where it varies."""
    values = {t.parameters[parameter] for t in tensors}
    if len(values) > 1:
        raise RecipeError(
            f"`{parameter}` must be one for the whole merge with `scope: model`: no gradient, no "
            "`filter`"
        )
    return values.pop()


def measure(
    measures: Sequence[Measure],
    tensors: Sequence[PlannedTensor],
    base: str,
    load: Load,
    *,
    allow_nan: bool = False,
    advance: Callable[[int], Any] = lambda _: None,
) -> Statistics:
    """Take measures, in their order.

    base: its name among the tensors' inputs. advance: told of the bytes of every tensor read.
    NonFiniteError for a bad entry unless allow_nan.
    """
    found: dict[str, Mapping[str, Summary]] = {}
    for one in measures:
        found[one.name] = _taken(one, _covered(one, tensors, base), base, load, found,
                                 allow_nan, advance)  # fmt: skip
    return found


def kept(
    folder: Path,
    identity: Sequence[Any],
    measures: Sequence[Measure],
    tensors: Sequence[PlannedTensor],
    base: str,
    take: Callable[[], Statistics],
) -> Statistics:
    """What `take` gives, from `folder` where an equal request was answered before.

    identity: of the parents' files, and of everything else that decides what `load` gives.
    """
    request = [
        [m.name, m.passes, str(m.dtype), [(t.name, *sorted(t.inputs.items(), key=str))
         for t in _covered(m, tensors, base)]] for m in measures
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps([identity, request]).encode()).hexdigest()
    file = folder / f"{key[:32]}.json"
    try:
        return _read(file)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: measured again
    found = take()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        rows = {name: {k: asdict(s) for k, s in rows.items()} for name, rows in found.items()}
        stream.write(json.dumps(rows).encode())
    return found


def widest(plan: Plan) -> torch.dtype:
    """The dtype in which differences of a plan's parents are formed: float32 or float64."""
    names = {plan.config.dtype} if plan.config.dtype else {
        header.dtype for p in (plan.base, *plan.experts) for header in (p.tensors or {}).values()
    }  # fmt: skip
    return torch.float64 if names & {"F64", "float64", "torch.float64"} else torch.float32


def widened(measures: Sequence[Measure], dtype: torch.dtype) -> tuple[Measure, ...]:
    """The measures for parents of a dtype: in float64 where the files are."""
    return tuple(replace(m, dtype=torch.promote_types(m.dtype, dtype)) for m in measures)


def bytes_read(measures: Sequence[Measure], tensors: Sequence[PlannedTensor], base: str) -> int:
    """What `measure` will read, as far as it is known."""
    return sum(
        m.passes * sum(t.bytes * (1 + len(_experts(t, base))) for t in _covered(m, tensors, base))
        for m in measures
    )


def _read(file: Path) -> Statistics:
    rows = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: {
            label: Summary(
                **{**row, "entries": {int(rank): x for rank, x in row["entries"].items()}}
            )
            for label, row in found.items()
        }
        for name, found in rows.items()
    }


def _covered(measure: Measure, tensors: Sequence[PlannedTensor], base: str) -> list[PlannedTensor]:
    """The tensors that take part: those that the base and some expert have."""
    return [
        t for t in tensors
        if t.inputs.get(base) is not None and _experts(t, base) and measure.covers(t)
    ]  # fmt: skip


def _experts(tensor: PlannedTensor, base: str) -> tuple[str, ...]:
    return tuple(m for m, stored in tensor.inputs.items() if m != base and stored is not None)


def _taken(
    measure: Measure,
    tensors: Sequence[PlannedTensor],
    base: str,
    load: Load,
    earlier: Statistics,
    allow_nan: bool,
    advance: Callable[[int], Any],
) -> dict[str, Summary]:
    for tensor in tensors:
        if tensor.converted:
            raise RecipeError(
                f"{tensor.name} of {tensor.converted[0]} is put together from other tensors on "
                "loading, which `scope: model` cannot do yet: set `scope: tensor`"
            )
    sums: dict[str, Summary] = {}
    selections: dict[str, Selection] = {}
    again = True
    for index in range(measure.passes):
        for chunk in _chunks(measure, tensors, base, load, earlier, allow_nan, advance):
            for label, row in measure.numbers(chunk).items():
                if index == 0:
                    sums[label] = _added(sums.get(label), row)
                if measure.ranks is not None:
                    selections.setdefault(label, Selection(measure.dtype)).add(row)
                del row
            del chunk  # before the next one takes as much
        for label, selection in selections.items():
            assert measure.ranks is not None
            wanted = measure.ranks(label, sums[label].count) if index == 0 else ()
            again = selection.next_pass(wanted)
    assert not (selections and again)
    return {
        label: Summary(
            **{**vars(s), "entries": selections[label].entries if label in selections else {}}
        )
        for label, s in sums.items()
    }


def _added(before: Summary | None, row: torch.Tensor) -> Summary:
    """The sums of a row so far, with some more of its numbers."""
    if row.numel() == 0:
        return before or Summary()
    if row.numel() > PIECE:
        for part in row.split(PIECE):
            before = _added(before, part)
        assert before is not None
        return before
    wide = row.double()
    least, greatest = (float(x) for x in row.aminmax())
    total, squares = float(wide.sum()), float(torch.dot(wide, wide))
    more = Summary(row.numel(), total, float(wide.abs_().sum()), squares, least, greatest)
    if before is None or not before.count:
        return more
    return Summary(
        before.count + more.count,
        before.total + more.total,
        before.absolute + more.absolute,
        before.squares + more.squares,
        min(before.least, least),
        max(before.greatest, greatest),
    )


def _chunks(
    measure: Measure,
    tensors: Sequence[PlannedTensor],
    base: str,
    load: Load,
    earlier: Statistics,
    allow_nan: bool,
    advance: Callable[[int], Any],
) -> Iterator[Chunk]:
    for tensor in tensors:
        t0 = load(base, tensor)
        if not t0.is_floating_point():
            continue
        models = _experts(tensor, base)
        experts = [load(model, tensor) for model in models]
        for model, ti in zip(models, experts, strict=True):
            if ti.shape != t0.shape:
                raise ModelError(
                    f"{tensor.name} is {list(ti.shape)} in {model} but {list(t0.shape)} in {base}: "
                    "`scope: model` needs equal shapes; set `scope: tensor`"
                )
        flat = [t.reshape(-1).cpu() for t in (t0, *experts)]
        step = max(1, t0.numel()) if measure.whole(tensor) else PIECE
        for start in range(0, t0.numel(), step):
            base_part, *parts = (t[start : start + step] for t in flat)
            d = offsets(base_part, parts, measure.dtype)
            if not allow_nan and not bool(d.sum().isfinite()) and not bool(d.isfinite().all()):
                raise _not_finite(tensor, base, t0, models, experts)
            chunk = Chunk(d, models, tensor, tuple(t0.shape), earlier)
            del d
            yield chunk
            del chunk
        advance(sum(t.nbytes for t in (t0, *experts)))


def _not_finite(
    tensor: PlannedTensor,
    base: str,
    t0: torch.Tensor,
    models: Sequence[str],
    experts: Sequence[torch.Tensor],
) -> NonFiniteError:
    for model, t in zip((base, *models), (t0, *experts), strict=True):
        bad = int((~torch.isfinite(t)).sum())
        if bad:
            return NonFiniteError(
                f"{tensor.name} of {model} holds NaN or infinity in {bad:,} of {t.numel():,} "
                "entries; mend or replace that model, or set `allow_nan: true` in the recipe's "
                "parameters"
            )
    return NonFiniteError(f"{tensor.name}: the difference of two models overflows float32")
