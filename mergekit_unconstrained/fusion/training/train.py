"""The training stage: the pivot, trained on gold tokens and fused targets, as a model folder.

While it runs, OUT.checkpoints holds at most two whole checkpoints; a run that was killed continues
from the newer one and gives the weights of an uninterrupted one. OUT itself appears complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from mergekit_unconstrained.engine import staging
from mergekit_unconstrained.errors import (
    DataError,
    OutputError,
    RecipeError,
    UnconstrainedError,
)
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.fusion.training import checkpoints
from mergekit_unconstrained.fusion.training.arguments import settings_refused, training_arguments
from mergekit_unconstrained.fusion.training.bar import TrainingBar, only_bar
from mergekit_unconstrained.fusion.training.collate import Item
from mergekit_unconstrained.fusion.training.pivot import load_trainable, write_target
from mergekit_unconstrained.fusion.training.trainer import FusionTrainer

HISTORY = "history.json"


@dataclass(frozen=True)
class TrainJob:
    """One training run, in a form that another process can read (launch.py).

    pivot: folder of the weights that are trained. tokenizer: folder whose tokenizer files the
    result gets. out: the result, which must not exist. max_steps 0: as many as epochs take.
    lora_rank 0: every weight is trained. lm_loss_weight None: as settings say; 1 is plain
    fine-tuning on the same data in the same order. feed: what `open_feed` of fusion/feed.py takes.
    name: for messages.
    """

    pivot: Path
    tokenizer: Path
    out: Path
    settings: FusionSettings
    max_steps: int
    epochs: float
    learning_rate: float
    lora_rank: int = 0
    lm_loss_weight: float | None = None
    feed: Mapping[str, Any] = field(default_factory=dict)
    name: str = "the pivot"
    quiet: bool = False

    @property
    def weight(self) -> float:
        """lambda of losses.py, Eq. (1)."""
        chosen = self.lm_loss_weight
        return self.settings.lm_loss_weight if chosen is None else chosen

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept until OUT is complete."""
        return self.out.with_name(f"{self.out.name}.checkpoints")

    def to_json(self) -> str:
        """Text from which `from_json` makes an equal job; paths become absolute."""
        paths = {key: str(getattr(self, key).absolute()) for key in ("pivot", "tokenizer", "out")}
        settings = self.settings.model_dump(mode="json")
        rest = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps({**rest, **paths, "settings": settings})

    @classmethod
    def from_json(cls, text: str) -> TrainJob:
        """The reverse of `to_json`."""
        found = json.loads(text)
        paths = {key: Path(found[key]) for key in ("pivot", "tokenizer", "out")}
        settings = FusionSettings.model_validate(found["settings"])
        return cls(**{**found, **paths, "settings": settings})


@dataclass(frozen=True)
class Trained:
    """A finished run. bits_per_byte: of the development set before and after; None without one."""

    folder: Path
    steps: int
    bits_per_byte: tuple[float, float] | None

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """What `folder`/history.json tells."""
        history = json.loads((folder / HISTORY).read_text(encoding="utf-8"))
        measured = [e["bits_per_byte"] for e in history["development"] if "bits_per_byte" in e]
        ends = (measured[0], measured[-1]) if measured else None
        return cls(folder, history["steps"], ends)


def train(
    job: TrainJob,
    train_set: Dataset[Item],
    eval_set: Dataset[Item] | None,
    *,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> Trained:
    """Train in this process (one of several, under accelerate's launcher) and write job.out.

    train_set, eval_set: items as collate.py tells; `lengths`, if there is such an attribute, saves
    padding (ordering.py). Where job.out is complete nothing is done. RecipeError for settings that
    cannot be, and when memory runs out; NonFiniteError for a loss of NaN; OutputError for a full
    disk; MissingExtraError for lora_rank without peft; ModelError for a pivot that cannot be read.
    """
    if (job.out / HISTORY).is_file():
        shutil.rmtree(job.checkpoints, ignore_errors=True)
        return Trained.read(job.out)
    staging.check_out(job.out)
    if not len(train_set):  # type: ignore[arg-type]
        raise DataError(f"there is nothing to train {job.name} on: the training set is empty")
    measured = eval_set is not None and len(eval_set) > 0  # type: ignore[arg-type]
    bar = TrainingBar(job.name, job.quiet)
    with _explained(job), only_bar():
        arguments = training_arguments(
            job.settings,
            job.checkpoints,
            max_steps=job.max_steps,
            epochs=job.epochs,
            learning_rate=job.learning_rate,
            evaluate=measured,
        )
        with arguments.main_process_first(local=False):
            last = checkpoints.keep_complete(job.checkpoints)
        arguments.eval_on_start = measured and last is None
        model = load_trainable(job.pivot, job.settings, job.lora_rank)
        with settings_refused():
            trainer = FusionTrainer(
                model,
                arguments,
                train_set,
                eval_set if measured else None,
                job.settings,
                job.weight,
                callbacks=[bar, *callbacks],
            )
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
            _write(job, trainer)
        finally:
            bar.close()
            trainer.accelerator.free_memory()
    return Trained.read(job.out)


def _write(job: TrainJob, trainer: FusionTrainer) -> None:
    """Make job.out of the trained weights, in the main process; the others wait for it."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.should_save:
        with staging.staged(job.out, "training") as partial:
            write_target(
                state,
                pivot=job.pivot,
                tokenizer=job.tokenizer,
                out=partial,
                lora_rank=job.lora_rank,
                lora_alpha=job.settings.lora_alpha,
            )
            text = json.dumps(_history(job, trainer), indent=1)
            (partial / HISTORY).write_text(text, encoding="utf-8")
        shutil.rmtree(job.checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _history(job: TrainJob, trainer: FusionTrainer) -> dict[str, Any]:
    """The logged series: one entry a step, and one for every look at the development set."""
    state, args = trainer.state, trainer.args
    development = [
        {k.removeprefix("eval_"): v for k, v in entry.items()}
        for entry in state.log_history
        if "eval_loss" in entry
    ]
    unwanted = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {
        "steps": state.global_step,
        "epochs": state.epoch,
        "lm_loss_weight": job.weight,
        "learning_rate": job.learning_rate,
        "lora_rank": job.lora_rank,
        "batch_size": job.settings.batch_size,
        "batch_shape": {
            "processes": args.world_size,
            "passes": args.gradient_accumulation_steps,
            "conversations": args.per_device_train_batch_size,
        },
        "log": [entry for entry in state.log_history if "loss" in entry],
        "development": [
            {k: v for k, v in entry.items() if k not in unwanted} for entry in development
        ],
    }


@contextmanager
def _explained(job: TrainJob) -> Iterator[None]:
    """Turn a full disk and exhausted memory into one sentence."""
    try:
        yield
    except UnconstrainedError:
        raise
    except Exception as error:
        if staging.disk_full(error):
            checkpoints.keep_complete(job.checkpoints)  # what is half-written takes room as well
            raise OutputError(
                f"the disk is full while training {job.name}: make room for {job.checkpoints} and "
                "run the same command again; it continues from the last checkpoint"
            ) from error
        if isinstance(error, ImportError):
            raise RecipeError(f"settings: `training` needs a package: {error}") from error
        if _out_of_memory(error):
            raise RecipeError(_no_memory(job.settings)) from error
        raise


def _out_of_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _no_memory(settings: FusionSettings) -> str:
    size = settings.device_batch_size
    if size > 1:
        return (
            f"training ran out of memory at device_batch_size {size}: set `device_batch_size: "
            f"{size // 2}` in the settings; batch_size and the result stay what they are"
        )
    return (
        "training ran out of memory at device_batch_size 1: set a smaller max_length, a lora_rank, "
        "`dtype: bfloat16`, or `training: {activation_checkpointing: true}`"
    )
