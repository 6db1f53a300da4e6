"""From the fusion's settings to transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from mergekit_unconstrained.config.words import suggest
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.fusion.settings import FusionSettings

_OWNED = {
    "output_dir": "the folder is chosen by the run",
    "per_device_train_batch_size": "use the setting `device_batch_size`",
    "per_device_eval_batch_size": "use the setting `device_batch_size`",
    "gradient_accumulation_steps": "use the settings `batch_size` and `device_batch_size`",
    "auto_find_batch_size": "it would change `batch_size`: set `device_batch_size`",
    "max_steps": "use the recipe's parameter `max_steps`",
    "num_train_epochs": "use the recipe's parameter `epochs`",
    "learning_rate": "use the recipe's parameter `learning_rate`",
    "lr_scheduler_type": "use the setting `schedule`",
    "warmup_steps": "use the setting `warmup_ratio`",
    "warmup_ratio": "use the setting `warmup_ratio`",
    "weight_decay": "use the setting `weight_decay`",
    "label_smoothing_factor": "use the setting `label_smoothing`",
    "save_steps": "use the setting `save_steps`",
    "save_strategy": "use the setting `save_steps`",
    "save_total_limit": "two checkpoints are kept, so that a killed run always has a whole one",
    "save_only_model": "without the optimiser's state a run cannot be resumed",
    "resume_from_checkpoint": "use the setting `resume`",
    "seed": "use the setting `seed`",
    "data_seed": "use the setting `seed`",
    "average_tokens_across_devices": "the loss is always averaged over all tokens of a step",
    "logging_nan_inf_filter": "a loss that is not finite always ends the run",
    "remove_unused_columns": "the batch's targets would be lost",
    "label_names": "the batch's names are fixed",
    "prediction_loss_only": "bits per byte need more than the loss",
    "batch_eval_metrics": "bits per byte are summed over all batches",
    "include_for_metrics": "bits per byte need nothing more",
    "disable_tqdm": "the run draws its own progress bar",
    "do_train": "that is what a fusion does",
    "do_eval": "use the setting `eval_share`",
    "do_predict": "use the setting `eval_share`",
    "train_sampling_strategy": "the conversations of each step are sorted by length already",
    "length_column_name": "the conversations of each step are sorted by length already",
    "hub_token": "a token does not belong into a file: set HF_TOKEN, or run `hf auth login`",
    "push_to_hub_token": "a token does not belong into a file: set HF_TOKEN",
    "local_rank": "use the setting `processes`",
    "parallelism_config": "it would cut conversations apart: FSDP and DeepSpeed share out weights",
}
"""TrainingArguments that follow from the settings: what to say where `training` names them."""


def check_training_block(settings: FusionSettings) -> None:
    """RecipeError for a key under `training` that does not exist or is another setting's work."""
    known = {f.name: f for f in dataclasses.fields(transformers.TrainingArguments) if f.init}
    for key in settings.training:
        if key in _OWNED:
            raise RecipeError(f"settings: training.{key} cannot be set: {_OWNED[key]}")
        if key not in known:
            raise RecipeError(
                f"settings: training.{key} is no argument of transformers' TrainingArguments. "
                f"{suggest(key, known.keys() - _OWNED.keys())}"
            )
    _check_pushes(settings.training)


def _check_pushes(block: Mapping[str, Any]) -> None:
    """Checkpoints on the Hub: transformers' own way, with a name of the user's."""
    if not block.get("push_to_hub"):
        return
    if not isinstance(block.get("hub_model_id"), str):
        raise RecipeError(
            "settings: training.push_to_hub needs `hub_model_id: org/name` beside it: where the "
            "checkpoints go while the model is trained"
        )
    if block.get("hub_strategy") == "end":
        raise RecipeError(
            "settings: training.hub_strategy cannot be `end`: the finished model is published by "
            "the recipe's parameter `push_to_hub`; use every_save, checkpoint or all_checkpoints"
        )


def batch_shape(settings: FusionSettings, world: int) -> tuple[int, int]:
    """Conversations per forward pass of one process, and passes per step.

    The product with `world` (the number of processes) is always batch_size: device_batch_size is an
    upper limit, lowered to the next divisor (ours). RecipeError when world does not divide it.
    """
    share, over = divmod(settings.batch_size, world)
    if over or not share:
        raise RecipeError(
            f"settings: batch_size {settings.batch_size} cannot be shared out evenly to {world} "
            f"processes: choose a multiple of {world}"
        )
    device = next(d for d in range(min(share, settings.device_batch_size), 0, -1) if share % d == 0)
    return device, share // device


def training_arguments(
    settings: FusionSettings,
    folder: Path,
    *,
    max_steps: int,
    epochs: float,
    learning_rate: float,
    evaluate: bool,
) -> Any:
    """The TrainingArguments of one training run; checkpoints go to `folder`.

    max_steps 0: as many as `epochs` take. Every step is logged, so that a resumed run logs what an
    uninterrupted one does (a mean over several steps would forget those before the checkpoint).
    RecipeError for settings that transformers refuses, in its words.
    """
    check_training_block(settings)
    if (max_steps > 0) == (epochs > 0):
        raise RecipeError(
            f"training needs either max_steps or epochs, not max_steps {max_steps} and epochs "
            f"{epochs:g}"
        )
    if not (0 < learning_rate < math.inf):
        raise RecipeError(f"learning_rate {learning_rate:g} cannot train anything: try 5e-6")
    block = _numbers(settings.training)
    use_cpu = bool(block.pop("use_cpu", not torch.accelerator.is_available()))
    lowered = settings.dtype == "auto" and not use_cpu and not block.get("fp16")
    chosen = {
        "bf16": lowered,
        "logging_steps": 1,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": settings.save_steps if evaluate else None,
        "report_to": "none",
        "dataloader_pin_memory": not use_cpu,
        "hub_private_repo": True if block.get("push_to_hub") else None,
    } | block
    if not evaluate:
        chosen["eval_strategy"] = "no"
    with settings_refused():
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=use_cpu,
            max_steps=max_steps if max_steps > 0 else -1,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type=settings.schedule,
            # below 1 it is a share of the steps, from 1 on a number of steps
            warmup_steps=min(settings.warmup_ratio, math.nextafter(1.0, 0.0)),
            weight_decay=settings.weight_decay,
            save_strategy="steps",
            save_steps=settings.save_steps,
            save_total_limit=2,
            seed=settings.seed,
            data_seed=settings.seed,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            **chosen,
        )
    device, accumulation = batch_shape(settings, arguments.world_size)
    arguments.per_device_train_batch_size = device
    arguments.per_device_eval_batch_size = device
    arguments.gradient_accumulation_steps = accumulation
    if arguments.n_gpu > 1:
        # torch.nn.DataParallel cannot share out sparse targets; several devices are `processes`.
        arguments._n_gpu = 1
    return arguments


@contextmanager
def settings_refused() -> Iterator[None]:
    """Turn what transformers says of a value under `training` into a RecipeError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, NotImplementedError, OSError, ImportError) as error:
        raise RecipeError(f"settings: transformers refuses them: {_one_line(error)}") from error
    except RuntimeError as error:
        if "install" not in str(error):
            raise
        raise RecipeError(f"settings: transformers refuses them: {_one_line(error)}") from error


def _numbers(block: dict[str, Any]) -> dict[str, Any]:
    """YAML reads 1e-4 as a word: turn words into numbers where a number is meant."""
    kinds = typing.get_type_hints(transformers.TrainingArguments)
    found = dict(block)
    for key, value in block.items():
        allowed = set(typing.get_args(kinds[key]) or (kinds[key],)) - {type(None)}
        if isinstance(value, str) and allowed <= {int, float}:
            try:
                found[key] = float(value)
            except ValueError:
                raise RecipeError(f"settings: training.{key} is a number, not {value!r}") from None
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
