"""From the fusion's settings to transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import typing
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from mergekit_unconstrained.config.document import Document
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


NO_PLACE = Document("settings", None)
"""Where a setting stands when its file is not at hand."""
ELSEWHERE = ("deepspeed", "fsdp", "use_cpu", "bf16", "fp16", "tf32", "torch_compile", "accelerator")
"""Beginnings of arguments that are no matter of right or wrong alone: transformers looks at this
machine for them, which need not be what trains, or sets the environment."""


def check_training_block(settings: FusionSettings, document: Document = NO_PLACE) -> None:
    """RecipeError for a key under `training` that does not exist or is another setting's work.

    document: the settings file, for the place in messages.
    """
    known = {f.name for f in dataclasses.fields(transformers.TrainingArguments) if f.init}
    for key in settings.training:
        place = ("training", key)
        if key in _OWNED:
            document.fail(place, f"cannot be set: {_OWNED[key]}")
        if key not in known:
            message = "is no argument of transformers' TrainingArguments"
            near = next(iter(difflib.get_close_matches(key, known)), "")
            if near in _OWNED:
                document.fail(place, f"{message}. Did you mean {near!r}? Then {_OWNED[near]}")
            document.fail(place, f"{message}. {suggest(key, known - _OWNED.keys())}")
    _check_pushes(settings.training, document)


def _check_pushes(block: Mapping[str, Any], document: Document) -> None:
    """Checkpoints on the Hub: transformers' own way, with a name of the user's."""
    if not block.get("push_to_hub"):
        return
    if not isinstance(block.get("hub_model_id"), str):
        document.fail(
            ("training", "push_to_hub"),
            "needs `hub_model_id: org/name` beside it: where the checkpoints go while the model "
            "is trained",
        )
    if block.get("hub_strategy") == "end":
        document.fail(
            ("training", "hub_strategy"),
            "cannot be `end`: the finished model is published by the recipe's parameter "
            "`push_to_hub`; use every_save, checkpoint or all_checkpoints",
        )


def check_training_values(settings: FusionSettings, document: Document = NO_PLACE) -> None:
    """RecipeError for what transformers would refuse only when training begins.

    The schedule, where figures are reported to, DeepSpeed's file, and any value of `training` that
    means the same on every machine.
    """
    _check_schedule(settings, document)
    block = settings.training
    if block.get("deepspeed"):
        _check_deepspeed(block["deepspeed"], document)
    if block.get("report_to") not in (None, "none", "all"):
        _check_reports(block["report_to"], document)
    values = {k: v for k, v in _numbers(block, document).items() if not k.startswith(ELSEWHERE)}
    if not values or _refusal(values) is None:
        return
    for key, value in values.items():
        if (told := _refusal({key: value})) is not None:
            document.fail(("training", key), f"transformers refuses {value!r}: {told}")
    document.fail(("training",), f"transformers refuses the values together: {_refusal(values)}")


def _refusal(values: dict[str, Any]) -> str | None:
    """What transformers says against some arguments, None where it takes them."""
    from mergekit_unconstrained.fusion.training.bar import only_bar

    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    given = {"report_to": "none", "save_steps": 1, **evaluated, **values}
    try:
        with warnings.catch_warnings(), only_bar():
            warnings.simplefilter("ignore")
            transformers.TrainingArguments(output_dir="unused", use_cpu=True, **given)
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        return _one_line(error)
    return None


def _check_schedule(settings: FusionSettings, document: Document) -> None:
    """A schedule of transformers', with the parameters that it needs."""
    known = [schedule.value for schedule in transformers.SchedulerType]
    if settings.schedule not in known:
        document.fail(
            ("schedule",),
            f"{settings.schedule!r} is no schedule of transformers. "
            f"{suggest(settings.schedule, known)}",
        )
    given = settings.training.get("lr_scheduler_kwargs")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        transformers.get_scheduler(settings.schedule, optimizer, 1, 10, given)
    except (ValueError, TypeError) as error:
        document.fail(
            ("schedule",),
            f"{settings.schedule!r} needs other parameters (`training: {{lr_scheduler_kwargs: "
            f"...}}`): {_one_line(error)}",
        )


def _check_deepspeed(given: Any, document: Document) -> None:
    place = ("training", "deepspeed")
    if isinstance(given, str):
        try:
            json.loads(Path(given).read_text(encoding="utf-8"))
        except OSError as error:
            document.fail(
                place,
                f"{given!r} cannot be read ({error.strerror}): it is a file of DeepSpeed's "
                "settings in JSON, relative to the current directory",
            )
        except ValueError as error:
            document.fail(place, f"{given!r} is not JSON: {error}")
    if importlib.util.find_spec("deepspeed") is None:
        document.fail(place, "DeepSpeed is not installed here: pip install deepspeed")


def _check_reports(given: Any, document: Document) -> None:
    from transformers.integrations import integration_utils

    place, known = ("training", "report_to"), integration_utils.INTEGRATION_TO_CALLBACK
    for name in given if isinstance(given, list) else [given]:
        if name not in known:
            document.fail(place, f"{name!r} is not known. {suggest(name, [*known, 'none', 'all'])}")
        if name not in integration_utils.get_available_reporting_integrations():
            document.fail(place, f"the package behind {name!r} is missing: pip install {name}")


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


def _numbers(block: dict[str, Any], document: Document = NO_PLACE) -> dict[str, Any]:
    """YAML reads 1e-4 as a word: turn words into numbers where a number is meant."""
    kinds = typing.get_type_hints(transformers.TrainingArguments)
    found = dict(block)
    for key, value in block.items():
        allowed = set(typing.get_args(kinds[key]) or (kinds[key],)) - {type(None)}
        if isinstance(value, str) and allowed <= {int, float}:
            try:
                found[key] = float(value)
            except ValueError:
                document.fail(("training", key), f"is a number, not {value!r}")
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
