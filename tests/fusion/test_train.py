"""The training stage, in one process: losses, results, what goes wrong."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from train_feed import MeasuredFeed, RandomFeed, make_job, make_pivot

from mergekit_unconstrained.errors import (
    DataError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from mergekit_unconstrained.fusion.training.bar import TrainingBar
from mergekit_unconstrained.fusion.training.collate import IGNORED
from mergekit_unconstrained.fusion.training.train import Trained, TrainJob, train
from mergekit_unconstrained.fusion.training.trainer import FusionTrainer


@pytest.fixture(scope="module")
def pivot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pivot(tmp_path_factory.mktemp("pivot"))


@pytest.fixture(scope="module", autouse=True)
def _light_garbage() -> Iterator[None]:
    """Every run collects garbage twice; what torch and transformers brought is not worth a look."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def history(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "history.json").read_text(encoding="utf-8")))


def log_probabilities(folder: Path, ids: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[n, V] in float64, straight from transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0]
    return torch.log_softmax(logits / temperature, dim=-1).numpy()


def sums(
    folder: Path, items: list[dict[str, Any]], temperature: float = 1.0, smoothing: float = 0.0
) -> dict[str, float]:
    """Gold and fused cross-entropy over some items, position by position, with dense targets."""
    out = {"gold": 0.0, "fused": 0.0, "tokens": 0, "bytes": 0}
    for item in items:
        q = log_probabilities(folder, item["input_ids"])
        warm = log_probabilities(folder, item["input_ids"], temperature)
        for t, position in enumerate(item["positions"]):
            dense = np.full(q.shape[1], smoothing / q.shape[1])
            dense[item["target_ids"][t]] += (1 - smoothing) * item["target_probs"][t]
            out["gold"] -= q[position - 1, item["input_ids"][position]]
            fused = -float(dense @ warm[position - 1]) * temperature**2
            out["fused"] += fused if item["used"][t] else 0.0
        out["tokens"] += len(item["positions"])
        out["bytes"] += int(item["bytes"])
    return out


# -- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (2.0, 0.25)])
def test_the_loss_is_gold_and_fused_cross_entropy_per_response_token(
    pivot: Path, tmp_path: Path, temperature: float, smoothing: float
) -> None:
    feed = RandomFeed(8)
    changes = {"temperature": temperature, "label_smoothing": smoothing}
    job = make_job(pivot, tmp_path / "out", max_steps=1, lm_loss_weight=0.3, **changes)
    train(job, feed, None)
    entry = history(job.out)["log"][0]
    found = sums(pivot, feed.items, temperature, smoothing)
    gold, fused = found["gold"] / found["tokens"], found["fused"] / found["tokens"]
    assert entry["gold_loss"] == pytest.approx(gold, rel=1e-5)
    assert entry["fusion_loss"] == pytest.approx(fused, rel=1e-5)
    assert entry["loss"] == pytest.approx(0.3 * gold + 0.7 * fused, rel=1e-5)


def test_development_bits_per_byte_are_those_of_the_whole_set(pivot: Path, tmp_path: Path) -> None:
    """Ten items in batches of four and two, some without a response."""
    held_out = RandomFeed(10, seed=1)
    job = make_job(pivot, tmp_path / "out", max_steps=2, lm_loss_weight=0.5)
    result = train(job, RandomFeed(16), held_out)
    before, after = sums(pivot, held_out.items), sums(job.out, held_out.items)
    assert result.bits_per_byte is not None
    for bits, found in zip(result.bits_per_byte, (before, after), strict=True):
        assert bits == pytest.approx(found["gold"] / math.log(2) / found["bytes"], rel=1e-5)
    first = history(job.out)["development"][0]
    assert first["step"] == 0
    assert first["fusion_loss"] == pytest.approx(before["fused"] / before["tokens"], rel=1e-5)


def stock_run(pivot: Path, folder: Path, items: list[dict[str, Any]], job: TrainJob) -> Any:
    """transformers' own Trainer on the same items, labels masked outside responses."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        n = max(len(item["input_ids"]) for item in batch)
        ids = torch.zeros(len(batch), n, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, item in enumerate(batch):
            for i, token in enumerate(item["input_ids"]):
                ids[row, i], mask[row, i] = int(token), 1
            for i in item["positions"]:
                labels[row, i] = ids[row, i]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    trainer = transformers.Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(pivot, dtype=torch.float32),
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=job.max_steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=job.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            seed=3,
            data_seed=3,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=items,
        data_collator=collate,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", [RandomFeed, MeasuredFeed])
def test_plain_fine_tuning_is_what_the_stock_trainer_does(
    pivot: Path, tmp_path: Path, kind: type[RandomFeed]
) -> None:
    """Over two epochs, the steps of which do not come out even; sorted by length or not."""
    feed = kind(21)
    job = make_job(pivot, tmp_path / "out", lm_loss_weight=1.0)
    train(job, feed, None)
    stock = stock_run(pivot, tmp_path / "stock", feed.items, job)
    ours = [entry["loss"] for entry in history(job.out)["log"]]
    theirs = [entry["loss"] for entry in stock.state.log_history if "loss" in entry]
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, abs=1e-6)
    expected = stock.model.state_dict()
    for name, weight in weights(job.out).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    assert "fusion_loss" not in history(job.out)["log"][0]


def test_sorting_by_length_changes_the_order_within_a_step_alone(
    pivot: Path, tmp_path: Path
) -> None:
    losses = []
    for kind in (RandomFeed, MeasuredFeed):
        job = make_job(pivot, tmp_path / kind.__name__)
        train(job, kind(30), None)
        losses.append([entry["loss"] for entry in history(job.out)["log"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("loss", ["fused_ce", "gld"])
def test_the_split_into_forward_passes_changes_nothing(
    pivot: Path, tmp_path: Path, loss: str
) -> None:
    """gld compares whole conversations: it must know which positions belong together."""
    runs = []
    for size in (1, 3, 8):
        changes = {"device_batch_size": size, "max_steps": 3, "loss": loss}
        job = make_job(pivot, tmp_path / f"out{size}", **changes)
        train(job, RandomFeed(21), None)
        runs.append([entry["loss"] for entry in history(job.out)["log"]])
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    assert runs[0] == pytest.approx(runs[2], abs=1e-5)


def test_a_model_that_hides_its_head_gives_the_same_loss(
    pivot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the hook on the output head all logits come, and the loss picks the rows."""
    usual = make_job(pivot, tmp_path / "usual", max_steps=2)
    train(usual, RandomFeed(16), RandomFeed(10, seed=1))
    monkeypatch.setattr(FusionTrainer, "_only_rows", lambda *_: None)
    hidden = make_job(pivot, tmp_path / "hidden", max_steps=2)
    train(hidden, RandomFeed(16), RandomFeed(10, seed=1))
    for key in ("loss", "gold_loss", "fusion_loss"):
        found = [[e[key] for e in history(job.out)["log"]] for job in (usual, hidden)]
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert Trained.read(usual.out).bits_per_byte == pytest.approx(
        Trained.read(hidden.out).bits_per_byte, rel=1e-5
    )


def test_a_step_without_any_response_is_no_accident(pivot: Path, tmp_path: Path) -> None:
    feed = RandomFeed(16)
    feed.items = [feed.items[3], feed.items[11]] * 8
    job = make_job(pivot, tmp_path / "out", max_steps=2)
    train(job, feed, None)
    assert [entry["loss"] for entry in history(job.out)["log"]] == [0.0, 0.0]
    before, after = weights(pivot), weights(job.out)
    assert all(torch.equal(after[name], before[name]) for name in before)


# -- results --------------------------------------------------------------------------------------


def test_the_result_is_a_folder_like_the_pivot(tmp_path: Path) -> None:
    """Its dtype, config, tokenizer and generation settings; nothing of the training beside it."""
    pivot = make_pivot(tmp_path / "pivot", dtype=torch.bfloat16, tie_word_embeddings=True)
    odd = '{"temperature": 0.3, "do_sample": false, "eos_token_id": [1, 2]}'
    (pivot / "generation_config.json").write_text(odd, encoding="utf-8")
    job = make_job(pivot, tmp_path / "out")
    result = train(job, RandomFeed(16), None)
    assert result == Trained(job.out, 6, None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (job.out / name).read_bytes() == (pivot / name).read_bytes()
    assert (job.out / "generation_config.json").read_text(encoding="utf-8") == odd
    configs = [json.loads((f / "config.json").read_text()) for f in (pivot, job.out)]
    assert configs[0] == configs[1]
    before, after = weights(pivot), weights(job.out)
    assert before.keys() == after.keys()
    assert {w.dtype for w in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "pivot"]


def test_a_finished_run_is_not_repeated(pivot: Path, tmp_path: Path) -> None:
    job = make_job(pivot, tmp_path / "out", max_steps=1)
    first = train(job, RandomFeed(8), RandomFeed(10, seed=1))
    job.checkpoints.mkdir()  # as after a kill between the last two actions of a run
    before = (job.out / "model.safetensors").stat()
    assert train(job, RandomFeed(8), None) == first
    assert (job.out / "model.safetensors").stat() == before
    assert not job.checkpoints.exists()


def test_history_tells_steps_and_figures(pivot: Path, tmp_path: Path) -> None:
    job = make_job(pivot, tmp_path / "out", max_steps=0, epochs=1.5, warmup_ratio=0.5)
    result = train(job, RandomFeed(32), RandomFeed(10, seed=1))
    found = history(job.out)
    assert (result.steps, found["steps"], found["epochs"]) == (6, 6, 1.5)
    assert [entry["step"] for entry in found["log"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in found["development"]] == [0, 2, 4, 6]
    rates = [entry["learning_rate"] for entry in found["log"]]
    assert rates[:4] == pytest.approx([0.0, 2e-3 / 3, 4e-3 / 3, 2e-3])
    assert rates[3] > rates[4] > rates[5]
    for entry in found["log"]:
        assert entry["tokens_per_second"] > 0
        halves = 0.9 * entry["gold_loss"] + 0.1 * entry["fusion_loss"]
        assert entry["loss"] == pytest.approx(halves, rel=1e-5)
    assert found["batch_shape"] == {"processes": 1, "passes": 2, "conversations": 4}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_is_merged_into_the_weights(tmp_path: Path, kind: str) -> None:
    """W + alpha / rank * B A of the last checkpoint, on all linear layers but the head."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if kind == "gpt2" else {}
    pivot = make_pivot(tmp_path / "pivot", kind, **sizes)
    job = make_job(pivot, tmp_path / "out", lora_rank=3, lora_alpha=12.0)
    kept: dict[str, torch.Tensor] = {}

    class Keep(transformers.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            file = job.checkpoints / f"checkpoint-{state.global_step}" / "adapter_model.safetensors"
            kept.update(safetensors.torch.load_file(file))

    train(job, RandomFeed(16), None, callbacks=[Keep()])
    before, after = weights(pivot), weights(job.out)
    adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in kept}
    assert len(adapted) == (14 if kind == "llama" else 8)
    for name in adapted:
        prefix = f"base_model.model.{name}.lora_"
        a, b = (kept[f"{prefix}{half}.weight"].double() for half in "AB")
        delta = 12 / 3 * (b @ a)
        if kind == "gpt2":
            delta = delta.T
        stored = next(key for key in before if f"{name}.weight".endswith(key))
        assert delta.abs().max() > 0
        torch.testing.assert_close(
            after.pop(stored).double(), before[stored].double() + delta, rtol=0, atol=1e-6
        )
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


def test_bfloat16_weights_are_trained_as_such_on_demand(tmp_path: Path, pivot: Path) -> None:
    job = make_job(pivot, tmp_path / "out", dtype="bfloat16", max_steps=2)
    train(job, RandomFeed(16), None)
    after = weights(job.out)["lm_head.weight"]
    assert after.dtype == torch.float32
    assert torch.equal(after, after.bfloat16().float())


def test_the_run_says_how_it_goes(
    pivot: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = make_job(pivot, tmp_path / "out", quiet=False, name="tiny", max_steps=3)
    train(job, RandomFeed(16), RandomFeed(10, seed=1))
    lines = capfd.readouterr().out.strip().splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("training tiny: step 3 of 3, loss ")
    assert lines[0].endswith(" left")
    for word in ("(gold ", "fusion ", "bits per byte", "tokens/s"):
        assert word in lines[-1]
    silent = make_job(pivot, tmp_path / "silent", max_steps=1)
    train(silent, RandomFeed(16), None)
    assert capfd.readouterr().out == ""


def test_a_held_out_figure_is_shown_with_the_step_it_was_measured_at() -> None:
    bar = TrainingBar("tiny", quiet=True)
    for step, logs in ((2, {"eval_bits_per_byte": 0.9}), (5, {"loss": 1.5})):
        state = SimpleNamespace(global_step=step, max_steps=9, is_world_process_zero=True)
        bar.on_log(None, state, None, logs=logs)
    assert bar.figures == "loss 1.500, held out 0.9000 bits per byte (step 2)"


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_learning_rate_that_explodes_is_named(pivot: Path, tmp_path: Path) -> None:
    job = make_job(pivot, tmp_path / "out", learning_rate=1e30, warmup_ratio=0.0)
    with pytest.raises(NonFiniteError, match=r"in training step 2: .* learning_rate 1e\+30 is too"):
        train(job, RandomFeed(16), None)
    assert not job.out.exists()


def test_nan_in_the_pivot_is_told_from_a_learning_rate(tmp_path: Path) -> None:
    pivot = make_pivot(tmp_path / "pivot")
    broken = weights(pivot)
    broken["model.norm.weight"][0] = math.nan
    safetensors.torch.save_file(broken, pivot / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"in training step 1: .* the pivot's weights"):
        train(make_job(pivot, tmp_path / "out"), RandomFeed(16), None)


def test_a_gradient_of_nan_does_not_reach_a_checkpoint(pivot: Path, tmp_path: Path) -> None:
    """The loss of step 4 is finite, and its weights would be saved."""

    class Harm(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, model: Any, **__: Any) -> None:
            if state.global_step == 3:
                model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)

    job = make_job(pivot, tmp_path / "out")
    with pytest.raises(NonFiniteError, match=r"the gradient became NaN or infinite in .* step 4"):
        train(job, RandomFeed(16), None, callbacks=[Harm()])
    assert [p.name for p in job.checkpoints.iterdir()] == ["checkpoint-2"]


def test_weights_beyond_the_pivots_dtype_are_not_written(tmp_path: Path) -> None:
    """Half precision ends at 65504."""
    pivot = make_pivot(tmp_path / "pivot", dtype=torch.float16)
    job = make_job(pivot, tmp_path / "out", learning_rate=1e6, max_steps=1, warmup_ratio=0.0)
    with pytest.raises(NonFiniteError, match="in float16, the pivot's dtype"):
        train(job, RandomFeed(16), None)
    assert not job.out.exists()


def test_exhausted_memory_names_the_setting(
    pivot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(FusionTrainer, "compute_loss", fail)
    with pytest.raises(RecipeError, match=r"at device_batch_size 4: set `device_batch_size: 2`"):
        train(make_job(pivot, tmp_path / "out"), RandomFeed(16), None)
    with pytest.raises(RecipeError, match=r"smaller max_length"):
        train(make_job(pivot, tmp_path / "out", device_batch_size=1), RandomFeed(16), None)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"report_to": "paper"}, "transformers refuses them: paper is not supported"),
        ({"fsdp": True}, "transformers refuses them: Using fsdp only works in distributed"),
        ({"use_liger_kernel": True}, "`training` needs a package: .* liger-kernel"),
    ],
)
def test_what_cannot_be_done_here_is_one_sentence(
    pivot: Path, tmp_path: Path, block: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(make_job(pivot, tmp_path / "out", training=block), RandomFeed(16), None)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_training_block_works_with_the_rest(pivot: Path, tmp_path: Path, rank: int) -> None:
    """Mixed precision, recomputed activations, the best checkpoint at the end."""
    block = {
        "bf16": True,
        "activation_checkpointing": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "bits_per_byte",
        "greater_is_better": False,
        "logging_steps": 3,
    }
    job = make_job(pivot, tmp_path / "out", training=block, lora_rank=rank)
    result = train(job, RandomFeed(16), RandomFeed(10, seed=1))
    assert result.bits_per_byte is not None
    plain = make_job(pivot, tmp_path / "plain", lora_rank=rank)
    exact = train(plain, RandomFeed(16), RandomFeed(10, seed=1))
    assert result.bits_per_byte == pytest.approx(exact.bits_per_byte, rel=1e-3)
    assert [entry["step"] for entry in history(job.out)["log"]] == [3, 6]


def test_a_full_disk_is_said_and_training_continues_later(
    pivot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own words for a full disk, while the second checkpoint is written."""
    save, count = torch.save, [0]

    def fail(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        count[0] += str(file).endswith("optimizer.pt")
        if count[0] == 2:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576")
        save(content, file, *args, **kwargs)

    job = make_job(pivot, tmp_path / "out")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OutputError, match=r"disk is full while training .*out.checkpoints"):
        train(job, RandomFeed(16), None)
    assert [p.name for p in job.checkpoints.iterdir()] == ["checkpoint-2"]
    monkeypatch.setattr(torch, "save", save)
    train(job, RandomFeed(16), None)
    assert len(history(job.out)["log"]) == 6


def test_a_full_disk_while_the_result_is_written(
    pivot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    job = make_job(pivot, tmp_path / "out", max_steps=2)
    monkeypatch.setattr("mergekit_unconstrained.fusion.training.train.write_target", fail)
    with pytest.raises(OutputError, match="the disk is full"):
        train(job, RandomFeed(16), None)
    assert not job.out.exists()
    monkeypatch.undo()
    train(job, RandomFeed(16), None)
    assert history(job.out)["steps"] == 2


def test_a_pivot_that_cannot_be_trained(pivot: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere cannot be loaded"):
        train(make_job(tmp_path / "nowhere", tmp_path / "out"), RandomFeed(16), None)
    lacking = make_pivot(tmp_path / "lacking")
    some = weights(lacking)
    del some["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(some, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, among them model.layers.1.mlp.up_proj"):
        train(make_job(lacking, tmp_path / "out"), RandomFeed(16), None)
    bare = make_pivot(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (bare / name).unlink()
    with pytest.raises(ModelError, match="bare holds no tokenizer"):
        train(make_job(bare, tmp_path / "out", max_steps=1), RandomFeed(16), None)


def test_an_empty_training_set_and_a_taken_folder(pivot: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="training set is empty"):
        train(make_job(pivot, tmp_path / "out"), RandomFeed(0), None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="not empty"):
        train(make_job(pivot, tmp_path / "out"), RandomFeed(16), None)


def test_adapters_without_peft(
    pivot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"lora_rank needs .*\[fusion\]"):
        train(make_job(pivot, tmp_path / "out", lora_rank=2), RandomFeed(16), None)
