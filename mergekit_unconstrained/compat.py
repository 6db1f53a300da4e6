"""Everything we use of mergekit, in one place: when a release moves something, mend it here.

Only this module, `_activate` and `quick_start` import mergekit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import logging
import tempfile
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch

with warnings.catch_warnings():
    # torch 2.13 deprecates a decorator that some of mergekit's dependencies still use.
    warnings.simplefilter("ignore")
    from mergekit.architecture import (
        ModelArchitecture,
        WeightInfo,
        arch_info_for_config,
        get_architecture_info,
    )
    from mergekit.common import ModelPath, ModelReference, dtype_from_name
    from mergekit.config import (
        InputModelDefinition,
        InputSliceDefinition,
        MergeConfiguration,
        OutputModuleDefinition,
        OutputSliceDefinition,
    )
    from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
    from mergekit.io.tasks import LoaderCache, LoadTensor
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
    from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options
    from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
    from mergekit.tokenizer.config import TokenEmbeddingConfig, TokenizerConfig

from mergekit_unconstrained.errors import UnconstrainedError

__all__ = [
    "BasePolicy",
    "GroupMergeMethod",
    "InputContract",
    "InputModelDefinition",
    "InputSliceDefinition",
    "LazyTensorLoader",
    "LoadTensor",
    "LoaderCache",
    "MergeConfiguration",
    "MergeMethod",
    "MergeMethodSpec",
    "MergeOptions",
    "ModelArchitecture",
    "ModelMethod",
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
    "PlannedTask",
    "ShardedTensorIndex",
    "TensorEntry",
    "TensorGroup",
    "TensorMetadata",
    "TokenEmbeddingConfig",
    "TokenizerConfig",
    "WeightInfo",
    "build_tokenizer",
    "can_convert",
    "check_chat_template",
    "configs_read_once",
    "convert",
    "dtype_from_name",
    "finish_merge",
    "forget_loaders",
    "get",
    "get_architecture_info",
    "is_builtin",
    "is_ours",
    "merge_adapter",
    "merge_method",
    "mergekit_version",
    "output_config",
    "parse_options",
    "plan_tasks",
    "register",
    "registered",
    "renamed",
    "replace_loader",
    "run_merge",
    "set_loader_options",
    "stored_name",
    "stored_tensors",
    "tensor_loader",
    "write_card",
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


class ModelMethod(GroupMergeMethod):
    """A method that takes whole models: a specification for recipes, no arithmetic per tensor.

    jobs/ carries it out; mergekit's own executor never sees it.
    """

    def __init__(self, spec: MergeMethodSpec) -> None:
        self.spec = spec

    def merge_group(self, _: TensorGroup, /, **__: Any) -> torch.Tensor:
        """Always UnconstrainedError: some front ends merge tensor by tensor only."""
        raise UnconstrainedError(
            f"{self.spec.name} takes whole models, not tensors: run its recipe with mergekit-yaml, "
            "mergekit-multi or mergekit-unconstrained yaml"
        )


def renamed(method: MergeMethod, name: str) -> MergeMethod:
    """The same method under another registry name."""
    twin = copy.copy(method)
    twin.spec = dataclasses.replace(method.spec, name=name)
    return twin


def is_ours(method: MergeMethod) -> bool:
    """Whether a registered method is one of this package."""
    owner = getattr(method, "implementation", type(method))
    return str(owner.__module__).startswith("mergekit_unconstrained.")


def is_builtin(method: MergeMethod) -> bool:
    """Whether a registered method is mergekit's own."""
    owner = getattr(method, "implementation", type(method))
    return str(owner.__module__).partition(".")[0] == "mergekit"


def mergekit_version() -> str:
    """The installed release of mergekit."""
    return importlib.metadata.version("mergekit")


# -- options --------------------------------------------------------------------------------------


def parse_options(arguments: list[str], usage: str) -> MergeOptions:
    """MergeOptions from mergekit-yaml's command-line options; `--help` prints them and exits."""

    @click.command(usage, cls=PrettyPrintHelp)
    @add_merge_options
    def options(merge_options: MergeOptions) -> MergeOptions:
        return merge_options

    parsed = options.main(arguments, standalone_mode=False)
    if not isinstance(parsed, MergeOptions):  # --help returns an exit status
        raise click.exceptions.Exit(int(parsed or 0))
    if parsed.num_threads is not None and parsed.num_threads < 1:
        raise click.UsageError("--num-threads: one at least")
    parsed.apply_global_options()
    return parsed


def run_merge(
    config: MergeConfiguration, out: str, options: MergeOptions, source: str | None = None
) -> None:
    """mergekit's own run_merge, without what the hook puts in front of it."""
    from mergekit import merge

    getattr(merge.run_merge, "__wrapped__", merge.run_merge)(config, out, options, source)


# -- architectures --------------------------------------------------------------------------------


def stored_name(weight: WeightInfo, available: Container[str]) -> str | None:
    """The name under which a checkpoint holds a weight: its own, an alias, or a tied one."""
    names = (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
    return next((n for n in names if n in available), None)


def can_convert(model_type: str, available: Iterable[str], weight: WeightInfo) -> bool:
    """Whether mergekit can assemble a weight (fused MoE experts) from a checkpoint's keys."""
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    keys = list(available)
    targets = (weight.name, *(weight.aliases or ()))
    return any(can_convert_checkpoint_keys(model_type, keys, target) for target in targets)


def output_config(
    config: MergeConfiguration, architecture: ModelArchitecture, trust_remote_code: bool
) -> Any:
    """The config of the model that a recipe makes, as mergekit will write it."""
    from mergekit.merge import _model_out_config

    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)  # mergekit sets `torch_dtype`, which transformers calls outdated
    try:
        return _model_out_config(config, architecture, trust_remote_code=trust_remote_code)
    finally:
        log.setLevel(level)


def check_chat_template(config: MergeConfiguration) -> None:
    """RuntimeError when mergekit would not accept a recipe's chat template."""
    from mergekit.merge import _set_chat_template

    _set_chat_template(SimpleNamespace(chat_template=None), config)


# -- the planner ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PlannedTask:
    """What mergekit's planner decided for one output tensor.

    inputs and input_parameters are keyed by the model as the recipe writes it. execute: merges the
    inputs' tensors, keyed likewise, as mergekit's executor would. The rest is for running it
    without that executor: loads, mergekit's tasks that read one input each; merge, its task that
    merges them; dtype, what the result is saved in (None: as it comes).
    """

    output: WeightInfo
    inputs: Mapping[str, WeightInfo]
    parameters: Mapping[str, Any]
    input_parameters: Mapping[str, Mapping[str, Any]]
    execute: Callable[[Mapping[str, torch.Tensor]], torch.Tensor | None]
    merge: Any = None
    dtype: str | None = None

    @property
    def loads(self) -> dict[ModelReference, LoadTensor]:
        """The tasks that read the inputs, by model."""
        gather = _gather(self.merge)
        return dict(zip(gather.weight_info, gather.arguments().values(), strict=True))

    @property
    def tokenizer(self) -> BuildTokenizer | None:
        """The task that builds the tokenizer to which the vocabulary axis is permuted, if any."""
        return getattr(self.merge.gather_tensors, "tokenizer_task", None)

    @property
    def truncates(self) -> bool:
        """Whether the vocabulary axis is cut to the shortest."""
        inputs = self.merge.gather_tensors
        return inputs is not _gather(self.merge) and not isinstance(inputs, PermutedVocabulary)

    @property
    def pad_to_multiple_of(self) -> int | None:
        """What a permuted vocabulary is padded to."""
        return getattr(self.merge.gather_tensors, "pad_to_multiple_of", None)

    @property
    def method(self) -> MergeMethod:
        """The method that merges it."""
        return get(self.merge.method_name)

    def compute(
        self, tensors: Mapping[ModelReference, torch.Tensor], tokenizer: Any = None
    ) -> torch.Tensor | None:
        """The merged tensor, in the dtype it is saved in.

        tensors: what the loads gave, without those that gave None. tokenizer: what
        `build_tokenizer` gave, where there is one.
        """
        found: Any = dict(tensors)
        if tokenizer is not None and self.tokenizer is not None:
            found = self.merge.gather_tensors.execute(tokenizer_info=tokenizer, tensors=found)
        elif self.truncates:
            found = self.merge.gather_tensors.execute(tensors=found)
        result = self.merge.execute(found)
        if result is None or self.dtype is None:
            return result
        return result.to(dtype_from_name(self.dtype))

    def is_skipped(self, present: Container[ModelReference]) -> bool:
        """Whether mergekit leaves the tensor out, since too few models have it."""
        if not self.output.optional:
            return False
        models = [m for m in self.merge.model_order if m in present]
        method = get(self.merge.method_name)
        return (
            len(models) < len(self.merge.model_order)
            and method.spec.optional_tensor_policy == OptionalTensorPolicy.BASE_OR_SKIP
            and len(models) < method.spec.contract.min_inputs
            and models != [self.merge.base_model]
        )


def plan_tasks(
    config: MergeConfiguration,
    architecture: ModelArchitecture,
    options: MergeOptions,
    out_config: Any,
    headers: Mapping[ModelReference, Iterable[str]],
) -> list[PlannedTask]:
    """Run mergekit's planner on a copy of a recipe, on tensor names alone.

    headers: the stored tensor names of each model; where they are given, nothing is opened.
    """
    from mergekit.plan import MergePlanner

    stand_ins = {
        reference: SimpleNamespace(
            index=SimpleNamespace(tensor_paths=dict.fromkeys(names, "")), flush=lambda: None
        )
        for reference, names in headers.items()
    }
    loaders = LoaderCache.loaders
    LoaderCache.loaders = {**loaders, **stand_ins}
    try:
        planner = MergePlanner(config.model_copy(deep=True), architecture, options, out_config)
        # Not plan_in_memory: in 0.1.5 pydantic cannot build its ReturnTensor tasks.
        tasks = planner.plan_to_disk(out_path="")
    finally:
        LoaderCache.loaders = loaders
    return [
        _planned(task.tensor_task, task.dtype) for task in tasks if hasattr(task, "tensor_task")
    ]


def _gather(merge: Any) -> Any:
    return getattr(merge.gather_tensors, "gather_tensors", merge.gather_tensors)


def _planned(merge: Any, dtype: str | None) -> PlannedTask:
    gather = _gather(merge)
    return PlannedTask(
        output=merge.output_weight,
        inputs={str(model): info for model, info in gather.weight_info.items()},
        parameters=dict(merge.parameters.items()),
        input_parameters={
            str(model): dict(values.items()) for model, values in merge.input_parameters.items()
        },
        execute=lambda tensors: merge.execute(
            {m: tensors[str(m)] for m in gather.weight_info if str(m) in tensors}
        ),
        merge=merge,
        dtype=dtype,
    )


def tensor_loader(options: MergeOptions) -> Callable[[str, str], torch.Tensor | None]:
    """A function (model as in a recipe, output tensor name) -> tensor, through the lazy loader.

    None where the model has no such tensor. Adapters must have been applied into
    options.lora_merge_cache.
    """
    cache = LoaderCache()
    cache.setup(options)

    def load(model: str, name: str) -> torch.Tensor | None:
        reference = ModelReference.parse(model)
        loader = cache.get(reference)
        config = reference.config(trust_remote_code=options.trust_remote_code)
        architecture = arch_info_for_config(config)
        weights = architecture.all_weights(config) if architecture is not None else []
        weight = next((w for w in weights if w.name == name), None)
        stored = stored_name(weight, loader.index.tensor_paths) if weight is not None else None
        return loader.get_tensor(stored or name, raise_on_missing=False)

    return load


def stored_tensors(options: MergeOptions) -> Callable[[str, str], torch.Tensor]:
    """A function (model as in a recipe, name in its file) -> tensor, through the lazy loader.

    Adapters must have been applied into options.lora_merge_cache.
    """
    cache = LoaderCache()
    cache.setup(options)
    return lambda model, stored: cache.get(ModelReference.parse(model)).get_tensor(stored)


def set_loader_options(options: MergeOptions) -> LoaderCache:
    """mergekit's cache of loaders; they are shared, but each thread has options of its own."""
    cache = LoaderCache()
    cache.setup(options)
    return cache


def replace_loader(reference: ModelReference, loader: LazyTensorLoader) -> None:
    """Let every read of a model go through another loader of the same interface."""
    LoaderCache.loaders[reference] = loader


def convert(
    model_type: str, sources: Mapping[str, Callable[[], torch.Tensor]], target: str
) -> torch.Tensor | None:
    """A weight that a checkpoint holds in another form (fused experts), None where it cannot be."""
    from mergekit.architecture.conversion import convert_checkpoint_tensors

    return convert_checkpoint_tensors(model_type, sources, target)


def build_tokenizer(task: BuildTokenizer) -> Any:
    """The output's tokenizer with the permutation of every parent's vocabulary."""
    return task.execute()


def finish_merge(
    config: MergeConfiguration,
    architecture: ModelArchitecture,
    out_config: Any,
    folder: Path,
    options: MergeOptions,
    tokenizer: Any = None,
) -> None:
    """Everything of mergekit's run_merge after the weights, but for its card.

    tokenizer: what `build_tokenizer` gave, None to copy the base's.
    """
    from mergekit import merge

    built = tokenizer.tokenizer if tokenizer is not None else None
    if built is not None:
        padded = config.tokenizer.pad_to_multiple_of if config.tokenizer else None
        merge._update_config_vocab(out_config, architecture, built, pad_to_multiple_of=padded)
    out_config.save_pretrained(str(folder))
    if built is not None:
        merge._set_chat_template(built, config)
        built.save_pretrained(str(folder), safe_serialization=True)
    elif options.copy_tokenizer:
        try:
            merge._copy_tokenizer(config, str(folder), options=options)
        except Exception as error:
            logging.getLogger("mergekit").error(
                "the tokenizer could not be copied; the weights are complete: %s", error
            )
    files = architecture.tagalong_files or []
    merge._copy_tagalong_files(config, str(folder), files=files, options=options)


def write_card(config: MergeConfiguration, source: str, folder: Path, name: str) -> None:
    """mergekit's card and copy of the recipe. name: the model's.

    mergekit asks the Hub about folders such as models/a, and where it cannot be reached the merge
    would end there: a folder that is here is no repository of the Hub.
    """
    from mergekit import card as mergekit_card

    asks = mergekit_card.is_hf
    mergekit_card.is_hf = lambda path: not Path(path).exists() and asks(path)
    try:
        card = mergekit_card.generate_card(config=config, config_yaml=source, name=name)
    finally:
        mergekit_card.is_hf = asks
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "mergekit_config.yml").write_text(source, encoding="utf-8")


@contextlib.contextmanager
def configs_read_once() -> Iterator[None]:
    """Within, the config of each model is read once; mergekit asks for it a dozen times a merge."""
    read = ModelReference.config
    held: dict[tuple[ModelReference, bool], Any] = {}

    def config(reference: ModelReference, trust_remote_code: bool = False) -> Any:
        key = (reference, trust_remote_code)
        if key not in held:
            held[key] = read(reference, trust_remote_code)
        return copy.deepcopy(held[key])  # the output's config is one of them, changed

    ModelReference.config = config
    try:
        yield
    finally:
        ModelReference.config = read


def forget_loaders() -> None:
    """Close mergekit's cached files: it never notices that a folder was rewritten."""
    LoaderCache.loaders.clear()


def merge_adapter(reference: ModelReference, cache: Path, options: MergeOptions) -> Path:
    """Apply a PEFT adapter to its model, once; the folder appears under its name when complete.

    mergekit itself writes into the final folder, and takes a half-written one for finished.
    """
    assert reference.lora is not None
    name = f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
    target = cache / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as partial:
            reference.merged(
                cache_dir=partial,
                trust_remote_code=options.trust_remote_code,
                lora_merge_dtype=options.lora_merge_dtype,
            )
            (Path(partial) / name).rename(target)
    return target
