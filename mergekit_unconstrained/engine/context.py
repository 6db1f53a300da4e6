"""What the kernels of our methods know about the merge they run in, and how they hand back.

mergekit gives a kernel one tensor's inputs and the output tensor's name. The layer and kind of that
tensor, and the job options, come from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mergekit_unconstrained.compat import ModelArchitecture, TensorGroup, TensorMetadata, WeightInfo
from mergekit_unconstrained.errors import NonFiniteError, RecipeError
from mergekit_unconstrained.numerics.quantiles import Summary
from mergekit_unconstrained.numerics.roles import Role, role_from_name


@dataclasses.dataclass(frozen=True)
class MergeContext:
    """The facts of the running merge.

    roles: output tensor name -> role; empty outside a job, where names are read by convention.
    allow_nan: whether NaN and infinity are let through. out_dtype: what mergekit will cast results
    to after the kernel, None for no cast. statistics: what the pre-pass found (engine/prepass.py):
    name of a measure -> label -> numbers; None where there was none. quiet: whether bars are off.
    """

    roles: Mapping[str, Role] = dataclasses.field(default_factory=dict)
    allow_nan: bool = False
    out_dtype: torch.dtype | None = None
    statistics: Mapping[str, Mapping[str, Summary]] | None = None
    quiet: bool = False


_context = MergeContext()


@contextmanager
def using(context: MergeContext) -> Iterator[None]:
    """Set the context for one merge: for the whole process, since executors may use threads."""
    global _context
    previous, _context = _context, context
    try:
        yield
    finally:
        _context = previous


def is_quiet() -> bool:
    """Whether the running merge is to draw no bars."""
    return _context.quiet


def role_of(metadata: TensorMetadata) -> Role:
    """The role of the tensor a kernel is asked for."""
    name = metadata.name or ""
    return _context.roles.get(name) or role_from_name(name, metadata.vocabulary_axis)


def depth_of(role: Role) -> int:
    """The number of layers of the model that a tensor belongs to; RecipeError without a job."""
    if not role.depth:
        raise RecipeError(
            "how deep a tensor lies is known to whole recipes only: run them with mergekit-yaml, "
            "mergekit-multi or mergekit-unconstrained yaml"
        )
    return role.depth


def measured(name: str) -> Mapping[str, Summary]:
    """What the pre-pass found for one of the method's measures: label -> numbers.

    RecipeError where a kernel is called without a job, and has seen one tensor only.
    """
    if _context.statistics is None:
        raise RecipeError(
            "`scope: model` needs the numbers of the whole model, which are taken before a merge: "
            "run the recipe with mergekit-yaml, mergekit-multi or mergekit-unconstrained yaml, or "
            "set `scope: tensor`"
        )
    return _context.statistics[name]


def was_measured(name: str) -> bool:
    """Whether there was such a measure."""
    return _context.statistics is not None and name in _context.statistics


def tensor_roles(architecture: ModelArchitecture, config: Any) -> dict[str, Role]:
    """The role of every tensor of a model, from the architecture's own division into layers.

    config: of the output model, whose layer indices these are.
    """
    roles: dict[str, Role] = {}
    for module in architecture.modules.values():
        prefix = module.weight_prefix or ""
        arch = module.architecture
        depth = arch.num_layers(config)
        positions: list[tuple[int | None, list[WeightInfo]]] = [
            (None, arch.pre_weights(config)),
            *((layer, arch.layer_weights(layer, config) or []) for layer in range(depth)),
            (None, arch.post_weights(config)),
        ]
        for layer, weights in positions:
            for weight in weights:
                role = role_from_name(weight.name, weight.vocabulary_axis, layer is not None)
                role = dataclasses.replace(role, layer=layer, depth=depth)
                for name in (weight.name, *(weight.aliases or ())):
                    roles[prefix + name] = role
    return roles


def finish(group: TensorGroup, result: torch.Tensor) -> torch.Tensor:
    """Check a merged tensor for NaN and infinity, and say which parent they came from.

    Every operator multiplies rather than selects, so a bad entry of any input that is used reaches
    the result; one sum over the result is enough to see it.
    """
    if _context.allow_nan or not result.is_floating_point():
        return result
    written = result if _context.out_dtype is None else result.to(_context.out_dtype)
    if bool(torch.isfinite(written.sum())):
        return result
    name = group.metadata.name or "an unnamed tensor"
    remedy = "mend or replace that model, or set `allow_nan: true` in the recipe's parameters"
    for entry in group.entries:
        bad = int((~torch.isfinite(entry.tensor)).sum())
        if bad:
            raise NonFiniteError(
                f"{name} of {entry.id} holds NaN or infinity in {bad:,} of "
                f"{entry.tensor.numel():,} entries; {remedy}"
            )
    if not bool(torch.isfinite(written).all()):
        raise NonFiniteError(
            f"{name} overflows {str(written.dtype).removeprefix('torch.')} although every parent "
            "is finite: the coefficients are too large, or choose a wider dtype in the recipe"
        )
    return result
