"""Tiny subjects: random Llamas over bytes, and a model that says what a script tells it to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., Any]:
    """`byte_tokenizer(chat=False, merges=())`: a token a byte, and one a pair of `merges`."""
    return _byte_tokenizer


def _byte_tokenizer(chat: bool = False, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={t: i for i, t in enumerate(entries)}, merges=list(merges))
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(special)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", additional_special_tokens=special[1:]
    )
    if chat:
        fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """`random_model(architecture="llama", seed=0, **config)`: 2 layers, float64, decided words."""

    def make(architecture: str = "llama", seed: int = 0, **settings: Any) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        common = {"vocab_size": 272, "bos_token_id": None, "eos_token_id": 256}
        if architecture == "gpt2":
            own = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
        else:
            own = {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 128,
            }
        # far from 0: a model of the usual tiny weights says the same whatever it is asked
        wide = {"initializer_range": 0.4}
        config = AutoConfig.for_model(architecture, **{**common, **own, **wide, **settings})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config).double().eval()

    return make


@pytest.fixture(scope="session")
def scripted(byte_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    """`scripted({"2+2=": "4"}, batch_size=4)`: a Subject that answers so, then ends its turn.

    An answer may end with `...`: it is said over and over. "NAN" makes the logits NaN, "CRASH"
    raises. `subject.model.calls` counts forward passes.
    """

    def make(script: Mapping[str, str], *, chat: bool = False, batch_size: int = 4) -> Any:
        from mergekit_unconstrained.evaluation.subject import Subject

        tokenizer = byte_tokenizer(chat)
        return Subject("scripted", _scripted(tokenizer, dict(script)), tokenizer, "w", batch_size)

    return make


def _scripted(tokenizer: Any, script: dict[str, str]) -> Any:
    import torch

    class Scripted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(272, 1)
            self.calls = 0
            self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

        def get_input_embeddings(self) -> Any:
            return self.embedding

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            self.calls += 1
            logits = torch.zeros(*input_ids.shape, 272)
            for row, mask, out in zip(input_ids, attention_mask, logits, strict=True):
                text = tokenizer.decode(row[mask.bool()].tolist(), skip_special_tokens=True)
                out[-1] = _next(tokenizer, script, text)
            return SimpleNamespace(logits=logits)

    return Scripted()


def _next(tokenizer: Any, script: dict[str, str], text: str) -> Any:
    import torch

    logits = torch.zeros(272)
    prompt = max((p for p in script if p in text), key=len, default=None)
    answer = "" if prompt is None else script[prompt]
    if answer == "NAN":
        return torch.full((272,), torch.nan)
    if answer == "CRASH":
        raise RuntimeError("the model fell over")
    said = "" if prompt is None else text.rpartition(prompt)[2]
    said = said.removeprefix("\nassistant").removeprefix("\n")  # before an answer
    token = tokenizer.eos_token_id
    if answer.endswith("...") or len(said) < len(answer):
        answer = answer.removesuffix("...")
        token = tokenizer(answer[len(said) % len(answer)])["input_ids"][0]
    logits[token] = 5.0
    return logits


@pytest.fixture
def write_tasks(tmp_path: Path) -> Callable[..., Path]:
    """`write_tasks({"sums": {...}}, sums=[row, ...])`: tasks.yml, and NAME.jsonl beside it."""

    def write(tasks: Mapping[str, Any], **files: list[dict[str, Any]]) -> Path:
        for name, rows in files.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        path = tmp_path / "tasks.yml"
        path.write_text(yaml.safe_dump({"tasks": dict(tasks)}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_task(write_tasks: Callable[..., Path]) -> Callable[..., Any]:
    """`make_task([row, ...], kind=..., ...)`: one task whose test split has these rows."""

    def make(rows: list[dict[str, Any]], **settings: Any) -> Any:
        from mergekit_unconstrained.evaluation.settings import load_tasks

        (task,) = load_tasks(write_tasks({"t": {"data": "t.jsonl", **settings}}, t=rows))
        return task

    return make
