"""What a teacher thought of each response token, against its own logits in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teachers import make_teacher, some_talks

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.data.encoding import Encoder
from mergekit_unconstrained.fusion.distributions import collect as distributions
from mergekit_unconstrained.fusion.distributions import teacher
from mergekit_unconstrained.fusion.distributions.collect import Collected, collect, header_for
from mergekit_unconstrained.fusion.distributions.store import Store
from mergekit_unconstrained.fusion.distributions.teacher import Teacher
from mergekit_unconstrained.fusion.records import Conversation, Record
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.fusion.vocabulary.tables import ByteTable

TALKS = some_talks()
SETTINGS = FusionSettings(collect_tokens=200)

Tokenizers = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Tokenizers) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"), make_tokenizer("byte_level"))


@pytest.fixture(scope="module")
def encoder(make_tokenizer: Tokenizers) -> Encoder:
    return encoder_of(make_tokenizer("byte_level"))


def encoder_of(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, ByteTable.from_tokenizer(tokenizer), max_length=256)


def run(
    model: Path,
    store: Path,
    encoder: Encoder,
    settings: FusionSettings = SETTINGS,
    talks: Sequence[Conversation] = TALKS,
    rank: int = 0,
    **options: Any,
) -> list[Record]:
    held = Store(store, header_for("tiny", encoder, settings), writer=rank)
    collect(model, talks, encoder, held, settings, rank=rank, name="tiny", **options)
    return held.read(held.rows)


def loaded(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def identical(one: Sequence[Record], other: Sequence[Record]) -> None:
    assert [r.row for r in one] == [r.row for r in other]
    for a, b in zip(one, other, strict=True):
        assert a.nats == b.nats
        assert a.topk.ids.tolist() == b.topk.ids.tolist()
        assert a.topk.log_probs.tolist() == b.topk.log_probs.tolist()


def close(one: Sequence[Record], other: Sequence[Record]) -> None:
    assert [r.row for r in one] == [r.row for r in other]
    for a, b in zip(one, other, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.nats == pytest.approx(b.nats, rel=1e-5)
        np.testing.assert_allclose(a.topk.log_probs, b.topk.log_probs, atol=0.02)


# -- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tokens", "temperature"),
    [
        ("llama", "byte_level", 1.0),
        ("llama", "metaspace", 2.5),
        ("qwen2", "gpt2", 1.0),
        ("gemma2", "metaspace", 0.7),
        ("granite", "byte_level", 1.0),
        ("mixtral", "byte_level", 1.0),
        ("gpt2", "metaspace", 1.0),
    ],
)
def test_distributions_are_the_models_own(
    tmp_path: Path, make_tokenizer: Tokenizers, kind: str, tokens: str, temperature: float
) -> None:
    """Each conversation alone, its whole logits, in float64: no batch, no chunk, no shortcut."""
    tokenizer = make_tokenizer(tokens)
    model = make_teacher(tmp_path / "model", tokenizer, kind)
    coder = encoder_of(tokenizer)
    settings = FusionSettings(collect_tokens=200, temperature=temperature, top_k=6)
    records = run(model, tmp_path / "store", coder, settings)
    own = loaded(model)
    assert [r.row for r in records] == list(range(len(TALKS)))
    for record, talk in zip(records, TALKS, strict=True):
        encoded = coder.encode(talk)
        assert record.tokens.tolist() == encoded.response_ids.tolist()
        assert record.ends.tolist() == encoded.ends.tolist()
        with torch.no_grad():
            logits = own(torch.from_numpy(encoded.ids.astype(np.int64))[None]).logits[0].double()
        assert logits.shape[1] == len(tokenizer) + 7
        # what predicts the token at position p stands at p - 1
        logits = logits[torch.from_numpy(encoded.positions.astype(np.int64)) - 1]
        chances = (logits / temperature).softmax(dim=1).numpy()
        known = chances[:, : len(tokenizer)]
        best = -np.sort(-known, axis=1)[:, :6]
        np.testing.assert_allclose(np.exp(record.topk.log_probs), best, rtol=5e-3, atol=1e-6)
        picked = np.take_along_axis(known, record.topk.ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(picked, best, rtol=1e-4)
        np.testing.assert_allclose(record.topk.tail, 1 - best.sum(axis=1), atol=1e-3)
        came = np.take_along_axis(chances, record.tokens[:, None].astype(np.int64), axis=1)[:, 0]
        np.testing.assert_allclose(record.topk.gold, np.log(came), rtol=1e-3, atol=1e-4)


def test_nats_are_the_loss_that_transformers_computes(
    tmp_path: Path, folder: Path, encoder: Encoder
) -> None:
    """At temperature 1 whatever the distributions' temperature: models are judged as they are."""
    settings = FusionSettings(temperature=3.0)
    own = loaded(folder)
    for record, talk in zip(run(folder, tmp_path, encoder, settings), TALKS, strict=True):
        encoded = encoder.encode(talk)
        ids = torch.from_numpy(encoded.ids.astype(np.int64))[None]
        labels = torch.full_like(ids, -100)
        labels[0, encoded.positions] = ids[0, encoded.positions]
        with torch.no_grad():
            loss = own(ids, labels=labels).loss.item() * len(encoded.positions)
        assert record.nats == pytest.approx(loss, rel=1e-5)


def test_rows_without_a_token_take_mass_but_are_never_kept(
    tmp_path: Path, make_tokenizer: Tokenizers, encoder: Encoder
) -> None:
    from safetensors.torch import load_file, save_file

    tokenizer = make_tokenizer("byte_level")
    model = make_teacher(tmp_path / "model", tokenizer, spare=3)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][-2] = -weights["lm_head.weight"][-1]
    weights["lm_head.weight"][-2:] *= 40  # one of the two is always by far the likeliest
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for record in run(model, tmp_path / "store", encoder):
        assert record.topk.ids.max() < len(tokenizer)
        assert record.topk.tail.min() > 0.8


def test_a_vocabulary_smaller_than_k_gives_all_of_it(
    tmp_path: Path, folder: Path, encoder: Encoder
) -> None:
    settings = FusionSettings(top_k=1000, collect_tokens=300)
    size = len(encoder.table.pieces)
    records = run(folder, tmp_path, encoder, settings, TALKS[:2])
    assert Store(tmp_path).header.top_k == size
    for record in records:
        assert sorted(record.topk.ids[0].tolist()) == list(range(size))


@pytest.mark.parametrize("size", [40, 640, 5001])
@pytest.mark.parametrize("k", [1, 10])
def test_top_k_by_blocks_is_top_k(size: int, k: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(50, size, generator=generator)
    values[:25] = values[:25].mul(3).round()  # many ties
    found, ids = teacher.top_k(values, k)
    torch.testing.assert_close(found, values.topk(k).values, rtol=0, atol=0)
    torch.testing.assert_close(values.gather(1, ids), found, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in ids.tolist())


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batches_and_chunks_change_nothing(
    tmp_path: Path, make_tokenizer: Tokenizers, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tokenizer = make_tokenizer("byte_level")
    model, coder = make_teacher(tmp_path / "m", tokenizer, kind), encoder_of(tokenizer)
    alone = run(model, tmp_path / "a", coder, FusionSettings(collect_tokens=8))
    together = run(model, tmp_path / "b", coder, FusionSettings(collect_tokens=4000))
    monkeypatch.setattr(teacher, "_LOGITS", 2000)
    monkeypatch.setattr(teacher, "_REDUCED", 800)
    close(alone, together)
    close(alone, run(model, tmp_path / "c", coder, FusionSettings(collect_tokens=300)))


def test_batches_keep_to_the_budget(
    tmp_path: Path, folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    read = Teacher.read

    def counted(self: Teacher, batch: Any) -> Any:
        sizes.append((len(batch), len(batch) * max(len(one.ids) for one in batch)))
        return read(self, batch)

    monkeypatch.setattr(Teacher, "read", counted)
    run(folder, tmp_path, encoder, FusionSettings(collect_tokens=150))
    assert sum(count for count, _ in sizes) == len(TALKS)
    assert all(padded <= 150 or count == 1 for count, padded in sizes)
    assert max(count for count, _ in sizes) > 1


def test_a_head_that_cannot_be_taken_off_is_left_on(
    tmp_path: Path, folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(folder, tmp_path / "a", encoder)
    head = Teacher._head

    def wrong(self: Teacher, out: Any, states: Any) -> Any:
        return head(self, out, states) * 1.01

    def impossible(self: Teacher, out: Any, states: Any) -> Any:
        raise AttributeError("no such thing")

    for name, broken in (("b", wrong), ("c", impossible)):
        monkeypatch.setattr(Teacher, "_head", broken)
        close(expected, run(folder, tmp_path / name, encoder))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "mixtral", "gpt2"])
def test_usual_models_are_taken_apart_and_put_together_again(
    tmp_path: Path, make_tokenizer: Tokenizers, encoder: Encoder, kind: str
) -> None:
    model = make_teacher(tmp_path, make_tokenizer("byte_level"), kind)
    tiny = Teacher(model, "tiny", len(encoder.table.pieces), SETTINGS, torch.device("cpu"))
    body = getattr(tiny._model, tiny._model.base_model_prefix)
    tiny.read([encoder.encode(TALKS[0])])
    assert tiny._chunked
    assert getattr(tiny._model, tiny._model.base_model_prefix) is body


# -- going on after a kill, and several processes -------------------------------------------------


def test_a_run_that_was_killed_is_continued_with_the_same_batches(
    tmp_path: Path, folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributions, "WINDOW", 5)
    monkeypatch.setattr(distributions, "PART_TOKENS", 60)
    whole = run(folder, tmp_path / "whole", encoder)
    cut = tmp_path / "cut"
    cut.mkdir()

    def die(done: Collected) -> None:
        if done.conversations > 4:
            raise KeyboardInterrupt

    kills, resumed = 0, []
    while not resumed:
        (cut / ".part-000.partial").write_bytes(b"half a part")
        try:
            resumed = run(folder, cut, encoder, progress=die)
        except KeyboardInterrupt:
            kills += 1
    assert kills > 1
    identical(whole, resumed)
    assert sum(1 for _ in Store(cut)) == len(TALKS)
    assert not list(cut.glob(".*"))


def test_a_finished_store_needs_no_model(tmp_path: Path, folder: Path, encoder: Encoder) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    first = run(model, tmp_path / "s", encoder)
    shutil.rmtree(model)
    told: list[Collected] = []
    identical(first, run(model, tmp_path / "s", encoder, progress=told.append))
    assert (told[-1].already, told[-1].conversations) == (len(TALKS), 0)


def test_more_rows_later_only_add(tmp_path: Path, folder: Path, encoder: Encoder) -> None:
    run(folder, tmp_path, encoder, talks=TALKS[:4])
    told: list[Collected] = []
    records = run(folder, tmp_path, encoder, progress=told.append)
    assert told[-1].conversations == len(TALKS) - 4
    close(records, run(folder, tmp_path / "b", encoder))


def test_processes_share_the_rows(tmp_path: Path, folder: Path, encoder: Encoder) -> None:
    for rank in range(2):
        run(folder, tmp_path / "two", encoder, rank=rank, world=2)
        store = Store(tmp_path / "two")
        assert len(store) == sum(1 for i in range(len(TALKS)) if i % 2 <= rank)
    together = Store(tmp_path / "two")
    close(run(folder, tmp_path / "one", encoder), together.read(together.rows))


def test_progress_counts_what_was_read(tmp_path: Path, folder: Path, encoder: Encoder) -> None:
    told: list[tuple[int, int]] = []
    held = Store(tmp_path, header_for("tiny", encoder, SETTINGS))
    done = collect(
        folder,
        iter(TALKS),
        encoder,
        held,
        SETTINGS,
        progress=lambda now: told.append((now.conversations, now.response_tokens)),
    )
    encoded = encoder.encode_many(TALKS)
    assert told == sorted(told)
    assert told[-1] == (len(TALKS), sum(len(one.positions) for one in encoded))
    assert done.tokens == sum(len(one.ids) for one in encoded)
    assert 0 < done.forward_seconds <= done.seconds
    assert done.tokens_per_second > 0


# -- what can go wrong ----------------------------------------------------------------------------


def spoiled(folder: Path, to: Path, value: float) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    weights["model.norm.weight"][0] = value
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_that_gives_nan_is_named_with_the_row(
    tmp_path: Path, folder: Path, encoder: Encoder, value: float
) -> None:
    told = r"tiny gives NaN or infinity in row \d as (float32: its weights are damaged$|bfloat16)"
    with pytest.raises(ModelError, match=told):  # collect_dtype is auto, which no model runs in
        run(spoiled(folder, tmp_path / "m", value), tmp_path / "s", encoder)
    assert Store(tmp_path / "s").rows == []
    half = SETTINGS.model_copy(update={"collect_dtype": "bfloat16"})
    with pytest.raises(ModelError, match=r"row \d as bfloat16: .*set `collect_dtype: float32`"):
        run(tmp_path / "m", tmp_path / "half", encoder, settings=half)


def run_out(limit: int) -> Callable[..., Any]:
    read = Teacher.read

    def small(self: Teacher, batch: Any) -> Any:
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return read(self, batch)

    return small


def test_out_of_memory_halves_the_batch(
    tmp_path: Path, folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FusionSettings(collect_tokens=4000)
    expected = run(folder, tmp_path / "a", encoder, settings)
    monkeypatch.setattr(distributions, "WINDOW", 6)
    monkeypatch.setattr(Teacher, "read", run_out(2))
    told: list[Collected] = []
    close(expected, run(folder, tmp_path / "b", encoder, settings, progress=told.append))
    assert told[-1].halvings == 3  # 6 to 3 and 3, which are too many yet; then it is known


def test_out_of_memory_with_one_conversation_names_stage_and_batch(
    tmp_path: Path, folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Teacher, "read", run_out(0))
    with pytest.raises(ModelError, match="even a batch of one conversation") as caught:
        run(folder, tmp_path, encoder)
    assert "not enough memory to collect the distributions of tiny" in str(caught.value)


def test_other_errors_of_a_model_are_not_taken_for_memory(
    tmp_path: Path, folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Teacher, batch: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Teacher, "read", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run(folder, tmp_path, encoder)
    assert teacher.is_out_of_memory(MemoryError())
    assert teacher.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 3"))


def test_a_conversation_longer_than_the_model_reads_is_named(
    tmp_path: Path, make_tokenizer: Tokenizers, encoder: Encoder
) -> None:
    model = make_teacher(tmp_path / "m", make_tokenizer("byte_level"), max_position_embeddings=40)
    with pytest.raises(ModelError, match=r"row \d is \d+ tokens long .* set `max_length: 40`"):
        run(model, tmp_path / "s", encoder)


def test_another_models_tokenizer_is_noticed(
    tmp_path: Path, make_tokenizer: Tokenizers, encoder: Encoder
) -> None:
    model = make_teacher(tmp_path / "m", make_tokenizer("byte_level"), spare=-200)
    with pytest.raises(ModelError, match="the tokenizer of another model lies in its folder"):
        run(model, tmp_path / "s", encoder)


def test_a_folder_without_a_model_is_a_sentence(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(ModelError, match="tiny cannot be loaded from"):
        run(tmp_path / "m", tmp_path / "s", encoder)


def test_half_precision_is_widened_before_the_sum(
    tmp_path: Path, folder: Path, encoder: Encoder
) -> None:
    settings = FusionSettings(collect_dtype="bfloat16")
    for record, exact in zip(
        run(folder, tmp_path / "a", encoder, settings),
        run(folder, tmp_path / "b", encoder),
        strict=True,
    ):
        np.testing.assert_allclose(record.nats, exact.nats, rtol=0.05)
        total = np.exp(record.topk.log_probs).sum(axis=1) + record.topk.tail
        np.testing.assert_allclose(total, 1.0, atol=1e-5)
