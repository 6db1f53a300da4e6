"""The model that is trained: read from the pivot's folder, written as a folder of the same kind."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from mergekit_unconstrained.errors import MissingExtraError, ModelError, NonFiniteError
from mergekit_unconstrained.fusion.settings import FusionSettings

_TOKENIZER_FILES = re.compile(
    r".*token.*\.json|vocab\..*|merges\.txt|.*\.model|.*\.tiktoken|tekken\.json|chat_template\..*"
)
_ADAPTER = "default"


def load_pivot(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal language model in `folder`, on the CPU; dtype None: as it is stored.

    ModelError when it cannot be read or lacks weights (transformers would make them up).
    """
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise ModelError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weights, among them {missing[0]}")
    return model


def load_trainable(folder: Path, settings: FusionSettings, lora_rank: int) -> Any:
    """The pivot as it is trained: in the settings' dtype, with adapters if lora_rank is not 0."""
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    model = load_pivot(folder, dtype)
    # A pivot's generation settings may be ones that transformers refuses to write; nothing here
    # generates, and the file itself is copied into the result.
    model.generation_config = transformers.GenerationConfig()
    if not lora_rank:
        return model
    transformers.set_seed(settings.seed)  # the adapters begin at random
    return with_adapter(model, lora_rank, settings.lora_alpha)


def with_adapter(model: Any, rank: int, alpha: float | None) -> Any:
    """A LoRA adapter on every linear layer but the output head (QLoRA, arXiv 2305.14314).

    alpha None: twice the rank (ours). MissingExtraError without peft.
    """
    try:
        import peft
    except ImportError:
        raise MissingExtraError("lora_rank", "fusion") from None
    # said outright, as peft warns where it has to find out: GPT-2 keeps its weights transposed
    transposed = any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in model.modules())
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules="all-linear",
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers 5.23 by a name that is going away
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, config)


def write_target(
    state: Mapping[str, torch.Tensor],
    *,
    pivot: Path,
    tokenizer: Path,
    out: Path,
    lora_rank: int,
    lora_alpha: float | None,
) -> None:
    """Write the trained model to the folder `out`: weights, config, generation config, tokenizer.

    state: what the trained model's `state_dict` gave, of any dtype and on any device. The weights
    get the pivot's own dtype; an adapter is added to the pivot's stored weights in float32 before
    that, so that they are rounded once. NonFiniteError when a weight is not a number there.
    """
    model = load_pivot(pivot)
    if lora_rank:
        _merge(with_adapter(model, lora_rank, lora_alpha), state)
    else:
        # copies into the stored dtype
        model.load_state_dict({_plain(key): value for key, value in state.items()})
    _check_finite(model)
    settings = pivot / "generation_config.json"
    if settings.is_file():
        model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(out)
    if settings.is_file():
        shutil.copyfile(settings, out / settings.name)
    _copy_tokenizer(tokenizer, out)


def _merge(adapted: Any, state: Mapping[str, torch.Tensor]) -> None:
    """W + alpha / rank * B A of adapted weights, in float32 (LoRA, arXiv 2106.09685, Eq. 3)."""
    from peft.tuners.lora import LoraLayer

    adapter = {_plain(key): value for key, value in state.items() if "lora_" in key}
    result = adapted.load_state_dict(adapter, strict=False)
    strange = [*result.unexpected_keys, *(k for k in result.missing_keys if "lora_" in k)]
    if strange:
        raise RuntimeError(f"the adapter does not fit the pivot: {strange[0]}")
    with torch.no_grad():
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                weight.copy_(weight.float() + module.get_delta_weight(_ADAPTER).float())
    adapted.unload()  # leaves the model itself without adapters


def _plain(key: str) -> str:
    """The name of a weight without what compiling and wrapping put into it."""
    return key.replace("_orig_mod.", "").removeprefix("module.")


def _check_finite(model: Any) -> None:
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            limit = (
                f" in {str(weight.dtype).removeprefix('torch.')}, the pivot's dtype: a bfloat16 or "
                "float32 pivot has room for it, or"
                if weight.dtype == torch.float16
                else ":"
            )
            raise NonFiniteError(
                f"after training {name} holds NaN or infinity{limit} lower learning_rate"
            )


def _copy_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer's files, byte for byte; ModelError when there are none."""
    found = [f for f in source.iterdir() if f.is_file() and _TOKENIZER_FILES.fullmatch(f.name)]
    if not found:
        raise ModelError(f"{source} holds no tokenizer: the trained model could not be used")
    for file in found:
        shutil.copyfile(file, out / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, out / templates.name, dirs_exist_ok=True)
