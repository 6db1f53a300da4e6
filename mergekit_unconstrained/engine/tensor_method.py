"""How a function of one tensor becomes a method of the catalogue."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mergekit_unconstrained.catalog import CATALOG
from mergekit_unconstrained.compat import (
    BasePolicy,
    InputContract,
    OptionalTensorPolicy,
    TensorGroup,
    merge_method,
)


def tensor_method(
    name: str, pretty_name: str, *, experts: int | None = None
) -> Callable[[Callable[..., torch.Tensor]], Any]:
    """mergekit's decorator with what all our methods ask for: a base, and experts of it.

    experts: exactly so many; None: one at least. The function's signature is the method's: what
    follows the group are its parameters. A tensor that the base or the experts lack is handed on
    as the one there is, without a call, so the function may count on both.
    """
    least = experts or 1

    def decorate(kernel: Callable[..., torch.Tensor]) -> Any:
        @functools.wraps(kernel)
        def merged(group: TensorGroup, **parameters: Any) -> torch.Tensor:
            if group.base is None or len(group.non_base) < least:
                return group.tensors[0]
            return kernel(group, **parameters)

        method = merge_method(
            name=name,
            pretty_name=pretty_name,
            reference_url=CATALOG[name].url,
            contract=InputContract(
                base=BasePolicy.REQUIRED, min_non_base=least, max_non_base=experts
            ),
            optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
        )(merged)
        method.by_pieces = method.in_processes = CATALOG[name].cost == "entries"
        return method

    return decorate


def base_of(group: TensorGroup) -> torch.Tensor:
    """T0, which the function of a `tensor_method` can count on."""
    assert group.base is not None
    return group.base.tensor
