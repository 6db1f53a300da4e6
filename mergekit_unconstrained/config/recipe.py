"""Strict reading of recipes that name one of our methods.

mergekit ignores keys and parameters it does not know. Here every word of a recipe is held against
mergekit's own models of a recipe and the method's own specification, so there is no list to keep;
what needs the parents themselves is checked in engine/plan.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StrictBool,
    StrictStr,
    ValidationError,
)

from mergekit_unconstrained import compat
from mergekit_unconstrained.compat import MergeMethod, ParameterScope, ParameterSpec
from mergekit_unconstrained.config.document import Document, Place
from mergekit_unconstrained.config.words import suggest

DTYPES = ("bfloat16", "float16", "float32", "float64")


_UNITS = {
    "": 1,
    **{unit: 1000**n for n, unit in enumerate(("KB", "MB", "GB", "TB"), start=1)},
    **{unit: 1024**n for n, unit in enumerate(("KIB", "MIB", "GIB", "TIB"), start=1)},
}


def read_bytes(value: Any) -> Any:
    """A number of bytes from a number or from text such as `8GiB`; ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", str(value), re.IGNORECASE)
    if value is None:
        return None
    if found is None or isinstance(value, bool) or (size := float(found[1])) == 0:
        raise ValueError("must be a size such as 8GiB")
    return int(size * _UNITS[(found[2] or "").upper()])


class JobOptions(BaseModel):
    """What a recipe's top-level `parameters` may say to the job itself, for all our methods."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow_nan: StrictBool = False
    """Let NaN and infinity in the parents' weights through instead of stopping."""
    dry_run: StrictBool = False
    """Check everything, print the plan and stop before any weight is read."""
    engine: Literal["streaming", "mergekit"] = "streaming"
    """Who runs the merge: the engine of this package, or mergekit's own executor."""
    memory_budget: Annotated[int | None, BeforeValidator(read_bytes)] = None
    """Bytes (`8GiB`, `500MB`) that tensors under way may take; half of the memory by default."""
    verify: StrictBool = False
    """Read the output again when it is written, and compare."""
    push_to_hub: StrictStr | None = None
    """Publish the result as this repository of the Hub, `org/name`."""
    hub_private: StrictBool = True
    """Whether it is private there; `false` makes it public, if the licences allow it."""
    hub_tag: StrictStr | None = None
    """A tag for what is published, such as `v1`."""


class JobOptionError(ValueError):
    """A job option with a value it cannot have."""

    def __init__(self, name: str, wanted: str, value: object) -> None:
        super().__init__(f"must be {wanted}, not {value!r}")
        self.name = name


def job_options(given: Mapping[str, Any]) -> JobOptions:
    """Job options from a recipe's values; JobOptionError names the first wrong one."""
    try:
        return JobOptions(**given)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        wanted = {
            "engine": "`streaming` or `mergekit`",
            "memory_budget": "a size such as `8GiB`",
        }.get(name, "true or false")
        if name in ("push_to_hub", "hub_tag"):
            wanted = "a name, as in `push_to_hub: org/name` and `hub_tag: v1`"
        raise JobOptionError(name, wanted, given[name]) from None


HUB_KEYS = ("push_to_hub", "hub_private", "hub_tag")
"""Job options that change nothing in the result: they are not published with the recipe."""


def check_recipe(document: Document, method: MergeMethod) -> JobOptions:
    """Check every key and value of a recipe; the first wrong one raises RecipeError.

    A document without text comes from a front end that parsed the recipe itself: then settings that
    such front ends add of their own accord (`normalize`, a weight for the base) are let pass.
    """
    return _Checker(document, method).recipe()


class _Checker:
    def __init__(self, document: Document, method: MergeMethod) -> None:
        self.document = document
        self.method = method
        self.lenient = document.text is None
        self.specs = {p.name: p for p in method.spec.parameters}
        self.base = (document.data or {}).get("base_model") if self._is_map(document.data) else None

    def recipe(self) -> JobOptions:
        data = self.document.data
        if not self._is_map(data):
            self.document.fail((), "a recipe is a mapping with `merge_method` and `models`")
        self._keys((), data, compat.MergeConfiguration)
        self._models((), data)
        for key in ("dtype", "out_dtype"):
            if data.get(key) is not None and str(data[key]).removeprefix("torch.") not in DTYPES:
                self.document.fail(
                    (key,), f"{data[key]!r} will not do. {suggest(data[key], DTYPES)}"
                )
        for index, definition in enumerate(self._list((), data, "slices")):
            self._slice(("slices", index), definition)
        modules = data.get("modules")
        for name, module in modules.items() if isinstance(modules, Mapping) else ():
            place = ("modules", name)
            self._keys(place, module, compat.OutputModuleDefinition)
            self._models(place, module)
            for index, definition in enumerate(self._list(place, module, "slices")):
                self._slice((*place, "slices", index), definition)
            self._parameters((*place, "parameters"), module.get("parameters"), self.specs)
        if self._is_map(tokenizer := data.get("tokenizer")):
            self._keys(("tokenizer",), tokenizer, compat.TokenizerConfig)
            for token, setting in (tokenizer.get("tokens") or {}).items():
                self._keys(("tokenizer", "tokens", token), setting, compat.TokenEmbeddingConfig)
        return self._job_options(data.get("parameters"))

    # -- the parts of a recipe ---------------------------------------------------------------------

    def _models(self, place: Place, data: Mapping[str, Any]) -> None:
        seen = []
        for index, definition in enumerate(self._list(place, data, "models")):
            here = (*place, "models", index)
            self._keys(here, definition, compat.InputModelDefinition)
            self._input(here, definition)
            if definition["model"] in seen:
                self.document.fail((*here, "model"), f"{definition['model']} is named twice")
            seen.append(definition["model"])

    def _slice(self, place: Place, definition: Any) -> None:
        self._keys(place, definition, compat.OutputSliceDefinition)
        for index, source in enumerate(self._list(place, definition, "sources")):
            here = (*place, "sources", index)
            self._keys(here, source, compat.InputSliceDefinition)
            self._input(here, source)
        self._parameters((*place, "parameters"), definition.get("parameters"), self.specs)

    def _input(self, place: Place, definition: Mapping[str, Any]) -> None:
        """One model: its parameters are those that differ from model to model."""
        if "model" not in definition:
            self.document.fail(place, "names no `model`")
        allowed = {n: p for n, p in self.specs.items() if p.scope != ParameterScope.SHARED}
        parameters = definition.get("parameters")
        is_base = definition["model"] == self.base and not self.lenient
        if is_base and isinstance(parameters, Mapping):
            allowed = {n: p for n, p in allowed.items() if p.scope == ParameterScope.INPUT}
            for name in parameters:
                if name in self.specs and name not in allowed:
                    self.document.fail(
                        (*place, "parameters", name),
                        f"this model is the base, which takes no {name!r}; remove it",
                    )
        self._parameters((*place, "parameters"), parameters, allowed)

    def _job_options(self, parameters: Any) -> JobOptions:
        place: Place = ("parameters",)
        if not self._is_map(parameters):
            self._parameters(place, parameters, self.specs)
            return JobOptions()
        options = {k: v for k, v in parameters.items() if k in JobOptions.model_fields}
        rest = {k: v for k, v in parameters.items() if k not in options}
        if self.lenient:
            rest = {k: v for k, v in rest.items() if k in self.specs or k != "normalize"}
        self._parameters(place, rest, self.specs, also=tuple(JobOptions.model_fields))
        try:
            return job_options(options)
        except JobOptionError as error:
            self.document.fail((*place, error.name), str(error))

    # -- keys and values ---------------------------------------------------------------------------

    def _keys(self, place: Place, data: Any, model: type[BaseModel]) -> None:
        if not self._is_map(data):
            self.document.fail(place, f"must be a mapping, not {data!r}")
        for key in data:
            if key not in model.model_fields:
                self.document.fail(
                    (*place, key), f"no such key. {suggest(key, model.model_fields)}"
                )

    def _parameters(
        self,
        place: Place,
        data: Any,
        allowed: Mapping[str, ParameterSpec],
        also: tuple[str, ...] = (),
    ) -> None:
        if data is None:
            return
        if not self._is_map(data):
            self.document.fail(place, f"must map parameters to values, not {data!r}")
        for name, setting in data.items():
            here = (*place, name)
            if name not in allowed:
                if name in self.specs or name in JobOptions.model_fields:
                    self.document.fail(
                        here,
                        f"{name!r} concerns the whole merge: put it in the recipe's own "
                        "`parameters`, not a model's or slice's",
                    )
                hint = suggest(name, (*allowed, *also))
                self.document.fail(here, f"no such parameter of {self.method.spec.name!r}. {hint}")
            self._setting(here, allowed[name], setting)

    def _setting(self, place: Place, spec: ParameterSpec, setting: Any) -> None:
        """A value, a gradient over the layers, or conditions by tensor name."""
        if self._is_map(setting):
            self._condition(place, spec, setting)
        elif isinstance(setting, list):
            if not setting:
                self.document.fail(place, "is an empty list")
            conditions = [self._is_map(e) for e in setting]
            if any(conditions) and not all(conditions):
                self.document.fail(place, "mixes plain values and `filter:` conditions")
            if not any(conditions) and not _takes_fractions(spec):
                self.document.fail(place, f"{spec.name!r} takes one value, not one for each layer")
            for index, element in enumerate(setting):
                here = (*place, index)
                if self._is_map(element):
                    self._condition(here, spec, element)
                else:
                    self._value(here, spec, element)
        else:
            self._value(place, spec, setting)

    def _condition(self, place: Place, spec: ParameterSpec, condition: Mapping[str, Any]) -> None:
        for key in condition:
            if key not in ("filter", "value"):
                self.document.fail(
                    (*place, key), f"no such key. {suggest(key, ('filter', 'value'))}"
                )
        if "value" not in condition:
            self.document.fail(place, "has a `filter` but no `value`")
        value = condition["value"]
        for index, element in enumerate(value if isinstance(value, list) else [value]):
            here = (*place, "value", index) if isinstance(value, list) else (*place, "value")
            self._value(here, spec, element)

    def _value(self, place: Place, spec: ParameterSpec, value: Any) -> None:
        if value is None:
            self.document.fail(place, f"{spec.name!r} has no value")
        try:
            number = spec.validate(value)
            if isinstance(value, bool) and type(number) in (int, float):
                self.document.fail(place, f"{spec.name!r} must be a number, not {value!r}")
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            choices = [
                e["ctx"]["expected"] for e in error.errors() if "expected" in e.get("ctx", {})
            ]
            if choices and isinstance(value, str):
                words = [w.strip(" '") for w in choices[0].replace(" or ", ",").split(",")]
                reason = f"{reason}. {suggest(value, words)}"
            self.document.fail(place, f"{value!r} does not do for {spec.name!r}: {reason}")

    def _list(self, place: Place, data: Mapping[str, Any], key: str) -> list[Any]:
        value = data.get(key)
        if value is not None and not isinstance(value, list):
            self.document.fail((*place, key), f"must be a list, not {value!r}")
        return value or []

    @staticmethod
    def _is_map(value: Any) -> bool:
        return isinstance(value, Mapping)


def _takes_fractions(spec: ParameterSpec) -> bool:
    """Whether values between two given ones make sense, so that a list can be a gradient."""
    try:
        return isinstance(spec.validate(0.5), float)
    except ValidationError:
        return False
