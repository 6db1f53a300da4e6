"""Kernels of ours for mergekit's own methods, under their own names, for who asks for them.

`mergekit-unconstrained yaml --fast` or MERGEKIT_UNCONSTRAINED_FAST=1. FAST says for each method how
its result relates to mergekit's; the README's table is made from it, and a test holds every row
against mergekit's kernels. What a kernel does not cover (a row's `not_covered`) is computed by
mergekit's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import GroupMergeMethod, MergeMethod, TensorGroup
from mergekit_unconstrained.numerics import gram, stepwise
from mergekit_unconstrained.numerics.operators import merge
from mergekit_unconstrained.numerics.settings import Expert, Operator, Settings

Relation = Literal[
    "bit-identical", "identical but for ties", "statistically the same", "more accurate"
]
Kernel = Callable[[TensorGroup, Mapping[str, Any], int], torch.Tensor | None]
"""(inputs, resolved parameters, seed) -> the merged tensor, None for what is not covered."""
PREFIX = "mku_fast_"


@dataclasses.dataclass(frozen=True)
class FastKernel:
    """One row: a kernel, its relation to mergekit's, what that means, and what was measured of it.

    measured: on a bf16 matrix of 2048 x 2048 with experts a tenth as far from the base as that is
    from zero, by tests/bench/test_bench_engine.py -k relations. Errors are relative to mergekit's
    own kernel in float64; 1.7e-3 is what rounding that to bf16 costs.
    """

    relation: Relation
    measured: str
    note: str
    kernel: Kernel
    not_covered: str = ""
    entrywise: bool = False  # whether a tensor can be merged by parts
    by_pieces: bool = True  # whether it calls torch for a piece that fits a cache at a time


class FastMethod(GroupMergeMethod):
    """One of mergekit's methods with another kernel: same parameters, same contract."""

    in_processes = True

    def __init__(self, upstream: MergeMethod, fast: FastKernel, seed: int) -> None:
        self.spec = dataclasses.replace(upstream.spec, name=PREFIX + upstream.spec.name)
        self.seed = seed
        self._upstream = upstream
        self._kernel = fast.kernel
        self._entrywise = fast.entrywise
        self.by_pieces = fast.by_pieces

    def entrywise(self, _: Any) -> bool:
        """Whether a tensor can be merged by parts (engine/footprint.py)."""
        return self._entrywise

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """The merged tensor, by mergekit's own kernel where ours does not cover it."""
        found = self._kernel(group, parameters, self.seed)
        if found is None:
            (found,) = self._upstream._execute_resolved((group,), [parameters])
        return found


def fast_method(name: str, seed: int) -> FastMethod:
    """The fast variant of a method of FAST, registered with mergekit under a name of its own."""
    if name not in _MADE:  # not asked of mergekit, which would load every plugin to look for it
        _MADE[name] = FastMethod(compat.get(name), FAST[name], seed)
        compat.register(_MADE[name])
    _MADE[name].seed = seed
    return _MADE[name]


_MADE: dict[str, FastMethod] = {}


# -- averages and task arithmetic -----------------------------------------------------------------


def _linear(group: TensorGroup, p: Mapping[str, Any], seed: int) -> torch.Tensor:  # noqa: ARG001
    # The base first, as in mergekit's batches: sums depend on the order.
    entries = sorted(group.entries, key=lambda e: not e.is_base)
    experts = [Expert(e.tensor, p["weight"][e.id]) for e in entries]
    return merge(entries[0].tensor, experts, Settings("linear", normalize=p["normalize"]))


def _task_vectors(
    keep: Literal["all", "magnitude", "outliers", "random", "magprune"], *, elect: bool
) -> Kernel:
    rules = Operator(keep, combine="elect" if elect else "add")

    def kernel(group: TensorGroup, p: Mapping[str, Any], seed: int) -> torch.Tensor:
        assert group.base is not None
        base = group.base.tensor
        experts = [
            Expert(
                e.tensor,
                p["weight"][e.id],
                density=p["density"][e.id],
                model=str(e.id),
                **{k: p[k][e.id] for k in ("gamma", "epsilon") if k in p},
            )
            for e in group.non_base
        ]
        if not experts:
            return base
        exact = keep in ("all", "magnitude", "outliers") and (keep == "all" or not p["rescale"])
        if exact and base.dtype in stepwise.HALF and base.device.type == "cpu":
            return stepwise.merge(
                base,
                experts,
                keep=keep,  # type: ignore[arg-type]
                elect=elect,
                normalize=p["normalize"],
                lambda_=p["lambda"],
            )
        settings = Settings(
            lambda_=p["lambda"],
            normalize=p["normalize"],
            rescale="l1" if p["rescale"] and keep != "all" else "none",
            seed=seed,
            name=group.metadata.name or "",
            custom=rules,
        )
        return merge(base, experts, settings)

    return kernel


def _sce(group: TensorGroup, p: Mapping[str, Any], seed: int) -> torch.Tensor:  # noqa: ARG001
    assert group.base is not None
    experts = [Expert(e.tensor, 1.0) for e in group.non_base]
    return merge(group.base.tensor, experts, Settings("sce", select_topk=p["select_topk"]))


# -- the Gram family ------------------------------------------------------------------------------


def _slerp(group: TensorGroup, p: Mapping[str, Any], seed: int) -> torch.Tensor:  # noqa: ARG001
    assert group.base is not None
    tensors = [group.base.tensor, group.non_base[0].tensor]
    return gram.combine(gram.slerp(gram.gram(tensors), p["t"]), tensors)


def _nuslerp(
    group: TensorGroup,
    p: Mapping[str, Any],
    seed: int,  # noqa: ARG001
) -> torch.Tensor | None:
    if not p["nuslerp_flatten"]:
        return None
    entries = group.non_base
    weights = p["weight"].values_for(entries)
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    tensors, origin = [e.tensor for e in entries], _origin(group)
    return gram.combine(gram.nuslerp(gram.gram(tensors, origin), t), tensors, origin)


def _multislerp(group: TensorGroup, p: Mapping[str, Any], seed: int) -> torch.Tensor:  # noqa: ARG001
    entries = group.non_base
    tensors, origin = [e.tensor for e in entries], _origin(group)
    if len(tensors) == 1:
        return tensors[0]
    weights = p["weight"].values_for(entries)
    if p["normalize_weights"]:
        weights = [w / sum(weights) for w in weights]
    g = gram.gram(tensors, origin)
    return gram.combine(gram.multislerp(g, weights, p["eps"]), tensors, origin)


def _karcher(group: TensorGroup, p: Mapping[str, Any], seed: int) -> torch.Tensor:  # noqa: ARG001
    tensors = list(group.tensors)
    if len(tensors) == 1:
        return tensors[0]
    return gram.combine(gram.karcher(gram.gram(tensors), p["max_iter"], p["tol"]), tensors)


def _model_stock(
    group: TensorGroup,
    p: Mapping[str, Any],
    seed: int,  # noqa: ARG001
) -> torch.Tensor | None:
    if p["filter_wise"]:
        return None
    tensors, origin = [e.tensor for e in group.non_base], _origin(group)
    return gram.combine(gram.model_stock(gram.gram(tensors, origin)), tensors, origin)


def _origin(group: TensorGroup) -> torch.Tensor | None:
    return group.base.tensor if group.base is not None else None


# -- the table ------------------------------------------------------------------------------------

_EXACT = "the same bits up to four experts; with more, a sum may differ in its last bit"
_TIES = f"equal magnitudes: the first one is kept, where mergekit leaves it to chance; {_EXACT}"
_RANDOM = "the same distribution from other random numbers, which depend on --random-seed, model, "
_RANDOM += "tensor and entry alone; float32 arithmetic"
_ACCURATE = "inner products summed in float64 over pieces, and one rounding at the end, where "
_ACCURATE += "mergekit rounds at each step"
_RESCALED = "`rescale: true` is computed in float32"

FAST: dict[str, FastKernel] = {
    "linear": FastKernel(
        "bit-identical",
        "no entry differs",
        "weights that sum to zero are an error",
        _linear,
        entrywise=True,
    ),
    "task_arithmetic": FastKernel(
        "bit-identical",
        "no entry differs",
        _EXACT,
        _task_vectors("all", elect=False),
        entrywise=True,
    ),
    "ties": FastKernel(
        "identical but for ties",
        "1.3 % of the entries differ",
        f"{_TIES}; {_RESCALED}",
        _task_vectors("magnitude", elect=True),
    ),
    "breadcrumbs": FastKernel(
        "identical but for ties",
        "4.0 % of the entries differ",
        f"{_TIES}; {_RESCALED}",
        _task_vectors("outliers", elect=False),
    ),
    "breadcrumbs_ties": FastKernel(
        "identical but for ties",
        "2.5 % of the entries differ",
        f"{_TIES}; {_RESCALED}",
        _task_vectors("outliers", elect=True),
    ),
    "sce": FastKernel(
        "more accurate",
        "error 1.9e-3, mergekit's 3.0e-3",
        "float32 arithmetic, one rounding at the end",
        _sce,
    ),
    "slerp": FastKernel(
        "more accurate",
        "error 1.7e-3, mergekit's 1.7e-3",
        "the inner product summed in float64 over pieces",
        _slerp,
    ),
    "nuslerp": FastKernel(
        "more accurate",
        "error 1.7e-3, mergekit's 1.7e-3",
        _ACCURATE,
        _nuslerp,
        not_covered="`nuslerp_flatten: false`",
    ),
    "multislerp": FastKernel(
        "more accurate", "error 1.7e-3, mergekit's 1.7e-3", _ACCURATE, _multislerp
    ),
    "karcher": FastKernel("more accurate", "error 1.7e-3, mergekit's 1.7e-2", _ACCURATE, _karcher),
    "model_stock": FastKernel(
        "more accurate",
        "error 9.3e-5, mergekit's 1.2e-4",
        _ACCURATE,
        _model_stock,
        not_covered="`filter_wise: true`",
    ),
    "dare_linear": FastKernel(
        "statistically the same",
        "as far from the base to 0.2 %",
        _RANDOM,
        _task_vectors("random", elect=False),
    ),
    "dare_ties": FastKernel(
        "statistically the same",
        "as far from the base to 0.2 %",
        _RANDOM,
        _task_vectors("random", elect=True),
    ),
    "della": FastKernel(
        "statistically the same",
        "as far from the base to 0.1 %",
        f"{_RANDOM}; ranks are exact, mergekit rounds them to bf16",
        _task_vectors("magprune", elect=True),
        by_pieces=False,
    ),
    "della_linear": FastKernel(
        "statistically the same",
        "as far from the base to 0.4 %",
        f"{_RANDOM}; ranks are exact, mergekit rounds them to bf16",
        _task_vectors("magprune", elect=False),
        by_pieces=False,
    ),
}


def markdown_table() -> str:
    """The README's table."""
    lines = [
        "| method | relation to mergekit's result | measured | in detail |",
        "|---|---|---|---|",
    ]
    for name, row in FAST.items():
        rest = f"; {row.not_covered} is left to mergekit's kernel" if row.not_covered else ""
        lines.append(f"| `{name}` | {row.relation} | {row.measured} | {row.note}{rest} |")
    return "\n".join(lines)
