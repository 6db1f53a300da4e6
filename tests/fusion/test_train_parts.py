"""Batches, their order, checkpoints that are whole, and transformers' arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from train_feed import RandomFeed, make_job

from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.errors import RecipeError
from mergekit_unconstrained.fusion.settings import (
    FusionSettings,
    load_settings,
    settings_document,
)
from mergekit_unconstrained.fusion.training import checkpoints
from mergekit_unconstrained.fusion.training.arguments import (
    batch_shape,
    check_training_block,
    check_training_values,
    training_arguments,
)
from mergekit_unconstrained.fusion.training.collate import IGNORED, collate
from mergekit_unconstrained.fusion.training.ordering import StepSampler
from mergekit_unconstrained.fusion.training.train import TrainJob

# -- collate --------------------------------------------------------------------------------------


def test_a_batch_holds_what_its_items_hold() -> None:
    items = RandomFeed(8).items
    batch = collate(items)
    assert all(len(tensor) == 8 for tensor in batch.values())
    for row, item in enumerate(items):
        n, r, k = len(item["input_ids"]), len(item["positions"]), item["target_ids"].shape[1]
        assert batch["input_ids"][row, :n].tolist() == item["input_ids"].tolist()
        assert batch["attention_mask"][row].nonzero().reshape(-1).tolist() == list(range(n))
        labelled = (batch["labels"][row] != IGNORED).nonzero().reshape(-1)
        assert labelled.tolist() == item["positions"].tolist()
        assert torch.equal(batch["labels"][row, labelled], batch["input_ids"][row, labelled])
        assert batch["positions"][row, :r].tolist() == item["positions"].tolist()
        assert bool((batch["positions"][row, r:] == -1).all())
        for key, empty in (("target_ids", -1), ("target_probs", 0)):
            assert np.array_equal(batch[key][row, :r, :k].numpy(), item[key])
            assert bool((batch[key][row, r:] == empty).all())
            assert bool((batch[key][row, :, k:] == empty).all())
        assert batch["used"][row, :r].tolist() == item["used"].tolist()
        assert not bool(batch["used"][row, r:].any())
        assert int(batch["bytes"][row]) == int(item["bytes"])


def test_a_response_token_that_nothing_predicts_is_left_out() -> None:
    item = next(i for i in RandomFeed(8).items if len(i["positions"]) > 1)
    first = {**item, "positions": np.r_[0, item["positions"][1:]].astype(np.int32)}
    batch = collate([first])
    assert batch["positions"][0].tolist() == item["positions"][1:].tolist()
    assert int(batch["labels"][0, 0]) == IGNORED
    assert np.array_equal(batch["target_probs"][0].numpy(), item["target_probs"][1:])


def test_a_batch_without_responses_has_empty_targets() -> None:
    silent = RandomFeed(8).items[3]
    batch = collate([silent, {**silent, "target_ids": np.zeros((0, 0), np.int32)}][:1])
    assert batch["positions"].shape == (1, 0)
    assert batch["target_ids"].shape[:2] == (1, 0)
    assert batch["target_ids"].shape[2] >= 1


# -- order ----------------------------------------------------------------------------------------


def test_without_lengths_the_order_is_that_of_accelerate() -> None:
    for epoch in (0, 3):
        expected = SeedableRandomSampler(range(50), data_seed=7)
        expected.set_epoch(epoch)
        found = StepSampler([0] * 50, step=8, seed=7, epoch=lambda epoch=epoch: epoch)
        assert list(found) == list(expected)


def test_each_step_keeps_its_conversations_and_is_sorted_by_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 50).tolist()
    plain = list(StepSampler([0] * 50, step=8, seed=7, epoch=lambda: 1))
    found = list(StepSampler(lengths, step=8, seed=7, epoch=lambda: 1))
    for start in range(0, 50, 8):
        step = found[start : start + 8]
        assert set(step) == set(plain[start : start + 8])
        assert [lengths[i] for i in step] == sorted((lengths[i] for i in step), reverse=True)


# -- checkpoints ----------------------------------------------------------------------------------


def make_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "shards").mkdir(parents=True)
    for name in ("model.safetensors", "shards/rank0.bin"):
        (checkpoint / name).write_bytes(b"x" * 100)
    checkpoints.mark_complete(checkpoint)
    return checkpoint


def test_the_latest_whole_checkpoint_wins_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        make_checkpoint(tmp_path, step)
    assert checkpoints.keep_complete(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("harm", ["shorter", "gone", "unlisted", "garbled"])
def test_whatever_is_not_whole_is_removed(tmp_path: Path, harm: str) -> None:
    make_checkpoint(tmp_path, 1)
    broken = make_checkpoint(tmp_path, 2)
    if harm == "shorter":
        (broken / "shards/rank0.bin").write_bytes(b"x")
    elif harm == "gone":
        (broken / "model.safetensors").unlink()
    elif harm == "unlisted":
        (broken / checkpoints.LIST).unlink()
    else:
        (broken / checkpoints.LIST).write_text('{"model', encoding="utf-8")
    assert checkpoints.keep_complete(tmp_path) == tmp_path / "checkpoint-1"
    assert not broken.exists()


def test_without_checkpoints_there_is_nothing_to_continue(tmp_path: Path) -> None:
    assert checkpoints.keep_complete(tmp_path / "nowhere") is None


# -- transformers' arguments ----------------------------------------------------------------------


def arguments(tmp_path: Path, steps: int = 5, **settings: Any) -> Any:
    return training_arguments(
        FusionSettings(**settings),
        tmp_path,
        max_steps=steps,
        epochs=0,
        learning_rate=1e-4,
        evaluate=False,
    )


@pytest.mark.parametrize(
    ("batch", "device", "world", "expected"),
    [
        (128, 4, 1, (4, 32)),
        (128, 4, 8, (4, 4)),
        (6, 4, 1, (3, 2)),
        (2, 4, 1, (2, 1)),
        (7, 4, 1, (1, 7)),
        (12, 5, 3, (4, 1)),
    ],
)
def test_batches_multiply_to_the_batch_size(
    batch: int, device: int, world: int, expected: tuple[int, int]
) -> None:
    settings = FusionSettings(batch_size=batch, device_batch_size=device)
    assert batch_shape(settings, world) == expected
    assert expected[0] * expected[1] * world == batch


@pytest.mark.parametrize(("batch", "world"), [(10, 4), (2, 3)])
def test_a_batch_that_cannot_be_shared_out_is_refused(batch: int, world: int) -> None:
    with pytest.raises(RecipeError, match=rf"choose a multiple of {world}"):
        batch_shape(FusionSettings(batch_size=batch), world)


def test_the_training_block_reaches_transformers(tmp_path: Path) -> None:
    block = {"adam_beta2": 0.95, "adam_epsilon": "1e-6", "activation_checkpointing": True}
    found = arguments(tmp_path, training=block)
    assert (found.adam_beta2, found.adam_epsilon) == (0.95, 1e-6)
    assert found.activation_checkpointing


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("adam_beta3", r"training.adam_beta3: is no argument .* Did you mean 'adam_beta"),
        ("learning_rate", r"training.learning_rate: cannot be set: use the recipe's parameter"),
        ("warmup_steps", r"use the setting `warmup_ratio`"),
        ("warmup_ratio", r"use the setting `warmup_ratio`"),
        ("gradient_accumulation_steps", r"use the settings `batch_size` and `device_batch_size`"),
        ("seed", r"use the setting `seed`"),
        ("report_too", r"Did you mean 'report_to'"),
        ("lerning_rate", r"Did you mean 'learning_rate'\? Then use the recipe's parameter"),
    ],
)
def test_keys_of_the_training_block_are_checked(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        arguments(tmp_path, training={key: 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, r"transformers refuses them: cosin is not a valid SchedulerType"),
        ({"training": {"adam_epsilon": "small"}}, r"adam_epsilon: is a number, not 'small'"),
        ({"training": {"optim": "adamm"}}, r"adamm is not a valid OptimizerNames"),
    ],
)
def test_values_transformers_refuses_are_one_sentence(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule: cosin", r"s.yml:1: schedule: 'cosin' is no schedule .* Did you mean 'cosine'"),
        ("schedule: cosine_with_min_lr", r"s.yml:1: schedule: .*lr_scheduler_kwargs"),
        ("seed: 1\ntraining:\n  report_to: wandbb", r"s.yml:3: training.report_to: .*mean 'wandb'"),
        ("training: {report_to: [clearml]}", r"report_to: .* pip install clearml"),
        (
            "training: {deepspeed: no.json}",
            r"s.yml:1: training.deepspeed: 'no.json' cannot be read",
        ),
        ("training: {optim: adamm}", r"s.yml:1: training.optim: .*'adamm'"),
        ("training: {deepspeed: {a: 1}}", r"deepspeed: .*pip install deepspeed"),
        ("training: {lerning_rate: 1}", r"s.yml:1: training.lerning_rate: .*'learning_rate'"),
        ("training: {adam_beta1: x}", r"s.yml:1: training.adam_beta1: is a number"),
        ("device_map: gpu", r"s.yml:1: device_map: 'gpu' will not do: it is no device of torch"),
    ],
)
def test_what_training_would_refuse_is_seen_in_the_settings(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "s.yml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        check_training(load_settings(file), settings_document(file))


def check_training(settings: FusionSettings, document: Document) -> None:
    check_training_block(settings, document)
    check_training_values(settings, document)


def test_training_settings_that_can_be_pass_whatever_this_machine_is() -> None:
    block = {"bf16": True, "tf32": True, "fsdp": "full_shard", "torch_compile": True}
    usual = {"optim": "adafactor", "max_grad_norm": 0.5, "load_best_model_at_end": True}
    check_training(FusionSettings(training=block | usual), Document("settings", None))
    for device in ("auto", "cuda:1", None):
        assert FusionSettings(device_map=device).device_map == device


@pytest.mark.parametrize(("steps", "epochs"), [(0, 0.0), (5, 1.0)])
def test_steps_or_epochs(tmp_path: Path, steps: int, epochs: float) -> None:
    with pytest.raises(RecipeError, match="either max_steps or epochs"):
        training_arguments(
            FusionSettings(),
            tmp_path,
            max_steps=steps,
            epochs=epochs,
            learning_rate=1e-4,
            evaluate=False,
        )


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_is_positive(tmp_path: Path, rate: float) -> None:
    with pytest.raises(RecipeError, match=r"learning_rate .* cannot train"):
        training_arguments(
            FusionSettings(), tmp_path, max_steps=5, epochs=0, learning_rate=rate, evaluate=False
        )


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 0), (0.03, 2), (0.5, 25), (1.0, 50)])
def test_the_rate_rises_for_a_share_of_the_steps(tmp_path: Path, ratio: float, steps: int) -> None:
    assert arguments(tmp_path, steps=50, warmup_ratio=ratio).get_warmup_steps(50) == steps


def test_a_job_survives_json(tmp_path: Path) -> None:
    job = make_job(tmp_path, tmp_path / "out", training={"adam_beta2": 0.9}, feed={"count": 3})
    assert TrainJob.from_json(job.to_json()) == job
