"""Everything we use of mergekit, in one place: when a release moves something, mend it here.

Only this module and `_activate` import mergekit.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import warnings
from collections.abc import Mapping
from typing import Any

with warnings.catch_warnings():
    # torch 2.13 deprecates a decorator that some of mergekit's dependencies still use.
    warnings.simplefilter("ignore")
    from mergekit.architecture import (
        ModelArchitecture,
        WeightInfo,
        arch_info_for_config,
        get_architecture_info,
    )
    from mergekit.architecture.conversion import can_convert_checkpoint_keys
    from mergekit.common import ModelPath, ModelReference, dtype_from_name
    from mergekit.config import (
        InputModelDefinition,
        InputSliceDefinition,
        MergeConfiguration,
        OutputModuleDefinition,
        OutputSliceDefinition,
    )
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import (
        BasePolicy,
        GroupMergeMethod,
        InputContract,
        MergeMethod,
        MergeMethodSpec,
        OptionalTensorPolicy,
        ParameterScope,
        ParameterSpec,
        PerInput,
        PerInputValues,
        PerNonBase,
        TensorEntry,
        TensorGroup,
        TensorMetadata,
    )
    from mergekit.merge_methods.easy_define import merge_method as _merge_method
    from mergekit.options import MergeOptions, add_merge_options

__all__ = [
    "BasePolicy",
    "GroupMergeMethod",
    "InputContract",
    "InputModelDefinition",
    "InputSliceDefinition",
    "LazyTensorLoader",
    "LoaderCache",
    "MergeConfiguration",
    "MergeMethod",
    "MergeMethodSpec",
    "MergeOptions",
    "ModelArchitecture",
    "ModelPath",
    "ModelReference",
    "OptionalTensorPolicy",
    "OutputModuleDefinition",
    "OutputSliceDefinition",
    "ParameterScope",
    "ParameterSpec",
    "PerInput",
    "PerInputValues",
    "PerNonBase",
    "ShardedTensorIndex",
    "TensorEntry",
    "TensorGroup",
    "TensorMetadata",
    "WeightInfo",
    "add_merge_options",
    "architecture_of",
    "can_convert",
    "dtype_from_name",
    "get",
    "get_architecture_info",
    "is_ours",
    "merge_method",
    "mergekit_version",
    "register",
    "registered",
    "renamed",
]


# -- the registry ---------------------------------------------------------------------------------


def get(name: str) -> MergeMethod:
    """A registered method by name, plugins included where the hook is active."""
    return registry.get(name)


def register(method: MergeMethod) -> None:
    """Add a method to mergekit's registry; ValueError when the name is taken."""
    registry.register(method)


def registered() -> tuple[MergeMethod, ...]:
    """Every method that a recipe may name."""
    return tuple(registry.registered_methods())


def merge_method(**spec: Any) -> Any:
    """mergekit's decorator, plus one thing: an argument `lambda_` is the parameter `lambda`.

    `lambda` is a Python keyword, so a kernel cannot have an argument of that name; recipes of
    upstream's methods use it all the same, and ours must read alike.
    """

    def decorate(kernel: Any) -> MergeMethod:
        method = _merge_method(kernel, **spec)
        names = [p.name for p in method.spec.parameters]
        if "lambda_" not in names:
            return method
        parameters = tuple(
            dataclasses.replace(p, name="lambda") if p.name == "lambda_" else p
            for p in method.spec.parameters
        )
        method.spec = dataclasses.replace(method.spec, parameters=parameters)

        def implementation(group: TensorGroup, /, **values: Any) -> Any:
            values["lambda_"] = values.pop("lambda")
            return kernel(group, **values)

        implementation.__module__ = kernel.__module__
        implementation.__doc__ = kernel.__doc__
        method.implementation = implementation
        return method

    return decorate


def renamed(method: MergeMethod, name: str) -> MergeMethod:
    """The same method under another registry name."""
    twin = copy.copy(method)
    twin.spec = dataclasses.replace(method.spec, name=name)
    return twin


def is_ours(method: MergeMethod) -> bool:
    """Whether a registered method is one of this package."""
    owner = getattr(method, "implementation", type(method))
    return str(owner.__module__).startswith("mergekit_unconstrained.")


def mergekit_version() -> str:
    """The installed release of mergekit."""
    return importlib.metadata.version("mergekit")


# -- architectures --------------------------------------------------------------------------------


def architecture_of(config: Any) -> ModelArchitecture | None:
    """mergekit's definition of a model's architecture, None when it has none by that name."""
    return arch_info_for_config(config)


def can_convert(model_type: str, available: Mapping[str, Any], target: str) -> bool:
    """Whether mergekit can assemble `target` (a fused expert tensor) from a checkpoint's keys."""
    return bool(can_convert_checkpoint_keys(model_type, list(available), target))
