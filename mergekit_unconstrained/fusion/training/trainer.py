"""A transformers Trainer whose loss compares response tokens with fused targets.

Everything else is transformers' and accelerate's: processes, FSDP, DeepSpeed, mixed precision,
activation checkpointing, peft, schedules, reporting, pushing along the way.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset, Sampler

from mergekit_unconstrained.errors import NonFiniteError, RecipeError
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.fusion.training import losses
from mergekit_unconstrained.fusion.training.checkpoints import is_complete, mark_complete
from mergekit_unconstrained.fusion.training.collate import Item, collate
from mergekit_unconstrained.fusion.training.ordering import StepSampler, lengths_of

Batch = dict[str, torch.Tensor]
_log = logging.getLogger("mergekit_unconstrained")


@dataclass(frozen=True, eq=False)
class _Responses:
    """The N response tokens of a batch. logits [M, V], of which rows [N] count (None: all of them).

    item [N]: the conversation of each; the rest as losses.combined takes it.
    """

    logits: torch.Tensor
    rows: torch.Tensor | None
    item: torch.Tensor
    gold: torch.Tensor
    ids: torch.Tensor
    probs: torch.Tensor
    rest: torch.Tensor
    used: torch.Tensor

    def of(self, mask: torch.Tensor) -> _Responses:
        """Those of one conversation."""
        rows = torch.arange(len(mask), device=mask.device) if self.rows is None else self.rows
        return _Responses(
            self.logits,
            rows[mask],
            *(t[mask] for t in (self.item, self.gold, self.ids, self.probs, self.rest, self.used)),
        )


class FusionTrainer(transformers.Trainer):
    """Trainer over items of collate.py. lm_loss_weight: lambda, 1 for plain fine-tuning.

    The loss of a step is Eq. (1) of losses.py divided by the response tokens of the whole step,
    over all its forward passes and processes, as the stock Trainer divides (num_items_in_batch).
    At lambda = 1 it is the stock Trainer's with labels outside responses masked.
    """

    # The loss is divided by the tokens of the accumulated step already.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: Any,
        train_set: Dataset[Item],
        eval_set: Dataset[Item] | None,
        settings: FusionSettings,
        lm_loss_weight: float,
        callbacks: Sequence[transformers.TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_set,
            eval_dataset=eval_set,
            compute_metrics=_metrics,
            callbacks=list(callbacks),
        )
        self.remove_callback(transformers.PrinterCallback)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of a step
        self._settings = settings
        self._lm_loss_weight = lm_loss_weight
        self._rows: tuple[torch.Size, torch.Tensor] | None = None
        head = model.get_output_embeddings()
        if head is not None and not args.torch_compile:  # another size at every call
            head.register_forward_pre_hook(self._only_rows)
        self._sums = np.zeros(4)  # gold, fusion, response tokens, all tokens since the last log
        self._last_sums = torch.zeros(4)
        self._clock = time.perf_counter()
        self._told: list[Any] = []  # background pushes that were looked at

    # -- loss ---------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The share that this forward pass has in the loss of its step."""
        parts = self._loss(self._responses(model, inputs), self._lm_loss_weight)
        tokens = inputs["attention_mask"].sum()
        self._last_sums = torch.stack([parts.gold, parts.fusion, parts.count, tokens])
        items = parts.count if num_items_in_batch is None else num_items_in_batch
        # A step may have no response token at all: 0, not 0 / 0.
        loss = parts.loss / torch.as_tensor(items, device=parts.loss.device).clamp(min=1)
        if num_items_in_batch is not None:
            # The items are those of all processes, whose gradients are averaged afterwards.
            loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _responses(self, model: Any, inputs: Batch) -> _Responses:
        """The model's logits where they predict response tokens, and what belongs beside them."""
        ids, positions = inputs["input_ids"], inputs["positions"]
        item, slot = (positions >= 0).nonzero(as_tuple=True)
        at = positions[item, slot]
        rows = item * ids.shape[1] + at - 1
        self._rows = ids.shape, rows
        try:
            logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits
        finally:
            self._rows = None
        return _Responses(
            logits=logits.flatten(0, -2),
            rows=None if logits.ndim == 2 else rows,
            item=item,
            gold=ids[item, at],
            ids=inputs["target_ids"][item, slot],
            probs=inputs["target_probs"][item, slot],
            rest=inputs["rest"][item, slot],
            used=inputs["used"][item, slot],
        )

    def _loss(self, found: _Responses, lm_loss_weight: float) -> losses.LossParts:
        return losses.combined(
            found.logits,
            found.gold,
            found.ids,
            found.probs,
            found.rest,
            found.used,
            loss=self._settings.loss,
            lm_loss_weight=lm_loss_weight,
            label_smoothing=self._settings.label_smoothing,
            temperature=self._settings.temperature,
            groups=found.item,
            rows=found.rows,
        )

    def _only_rows(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Let the output head see what predicts response tokens: [B, n, hidden] -> [N, hidden].

        Prompts then cost no logits. Of a model that calls its head otherwise all logits come, and
        the loss picks the rows.
        """
        if self._rows is None or not args or args[0].shape[:-1] != self._rows[0]:
            return None
        return (args[0].flatten(0, 1)[self._rows[1]], *args[1:])

    # -- a step -------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer's; NonFiniteError when the loss is NaN or infinite."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        sums = self._last_sums.cpu().double().numpy()  # the one wait for the device, as stock has
        if not np.isfinite(sums).all():
            raise NonFiniteError(self._not_finite("loss"))
        self._sums += sums
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # With float16 the gradient scaler skips such a step and goes on.
        if self.args.mixed_precision != "fp16" and not math.isfinite(norm):
            raise NonFiniteError(self._not_finite("gradient"))
        return norm

    def _not_finite(self, what: str) -> str:
        step = self.state.global_step + 1
        if step == 1:
            cause = "the pivot's weights hold NaN, or its values overflow"
        else:
            cause = f"learning_rate {self.args.learning_rate:g} is too high"
        low = self.args.mixed_precision != "no" or self._settings.dtype == "bfloat16"
        doubt = ", else try `dtype: float32`" if low else ""
        return (
            f"the {what} became NaN or infinite in training step {step}: most likely {cause}{doubt}"
        )

    # -- data ---------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return StepSampler(
            lengths_of(dataset),
            step=self._settings.batch_size,
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    # -- evaluation ---------------------------------------------------------------------------

    def prediction_step(
        self, model: Any, inputs: Batch, *_: Any, **__: Any
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Sums of each conversation: gold, fusion, tokens, those with a target [B, 4]; bytes."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            found = self._responses(model, inputs)
            weight = self._lm_loss_weight if bool(found.used.any()) else 1.0
            parts = [
                self._loss(found.of(found.item == i), weight) for i in range(len(inputs["bytes"]))
            ]
        sums = [torch.stack([p.gold, p.fusion, p.count, p.used]) for p in parts]
        return None, torch.stack(sums), inputs["bytes"]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; eval_bits_per_byte, eval_gold_loss and so on are of the whole set."""
        # Opening a data loader draws a random number: dropout must not depend on evaluations.
        with self._stopped_clock(), torch.random.fork_rng(devices=[]):
            return dict(super().evaluate(*args, **kwargs))

    # -- logs and checkpoints -----------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the loss: its two halves per response token, in nats, and tokens per second."""
        if "loss" in logs:
            sums = torch.tensor(self._sums, dtype=torch.float32, device=self.args.device)
            gold, fusion, responses, tokens = self.accelerator.reduce(sums, "sum").tolist()
            logs["gold_loss"] = gold / max(responses, 1)
            if self._lm_loss_weight < 1:
                logs["fusion_loss"] = fusion / max(responses, 1)
            now = time.perf_counter()
            logs["tokens_per_second"] = round(tokens / max(now - self._clock, 1e-9), 1)
            self._sums[:] = 0
            self._clock = now
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._stopped_clock():
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save and not is_complete(checkpoint):
                mark_complete(checkpoint)

    # -- the Hub ------------------------------------------------------------------------------

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with one sentence where the Hub refuses."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            raise RecipeError(
                f"settings: training.push_to_hub: {self.args.hub_model_id} cannot be made on the "
                f"Hub ({type(error).__name__}); `hf auth whoami` tells whether the token is right"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._tell_failed_pushes()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:  # its last file: nothing changes while the rest is uploaded
            mark_complete(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._tell_failed_pushes()

    def _tell_failed_pushes(self) -> None:
        """The Trainer drops what its background pushes raise: a warning, and training goes on."""
        current = getattr(self, "push_in_progress", None)
        for job in current.jobs if current is not None else ():
            if job.done() and not job.cancelled() and job not in self._told:
                self._told.append(job)
                if (error := job.exception()) is not None:
                    _log.warning(
                        "a checkpoint was not pushed to %s (%s); training goes on, and the next "
                        "checkpoint is pushed again",
                        self.args.hub_model_id,
                        type(error).__name__,
                    )

    @contextmanager
    def _stopped_clock(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._clock += time.perf_counter() - started


def _metrics(found: transformers.EvalPrediction) -> dict[str, float]:
    """Of the whole development set, whatever the batches and processes were."""
    gold, fusion, tokens, used = found.predictions.astype(np.float64).sum(axis=0)
    size = float(found.label_ids.astype(np.float64).sum())
    metrics = {"loss": gold / max(tokens, 1), "gold_loss": gold / max(tokens, 1)}
    if used:
        metrics["fusion_loss"] = fusion / max(tokens, 1)
    if size:
        metrics["bits_per_byte"] = gold / np.log(2) / size
    return {key: float(value) for key, value in metrics.items()}
