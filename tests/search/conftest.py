"""A search problem whose best answer is known: data written by a planted layer-wise merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml


class Planted(NamedTuple):
    """Search file, the experts, and the folder that everything lies in."""

    file: Path
    base: Path
    experts: tuple[Path, ...]
    folder: Path


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Base + expert1 in layers 0-1 + expert2 in layers 2-3 wrote the answers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from tests.conftest import _byte_tokenizer

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("planted")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.35,
        bos_token_id=None,
        eos_token_id=1,
    )
    tokenizer = _byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        start = {k: v.detach().clone() for k, v in model.named_parameters()}
        noise = [
            {k: 0.12 * torch.randn(v.shape) for k, v in start.items() if "proj" in k}
            for _ in range(2)
        ]
        parts = {"base": [], "first": [0], "second": [1]}
        for name, used in parts.items():
            for k, p in model.named_parameters():
                p.data.copy_(start[k] + sum(noise[i].get(k, 0.0) for i in used))
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        for k, p in model.named_parameters():
            layer = int(k.split(".")[2]) if ".layers." in k else 0
            p.data.copy_(start[k] + noise[0 if layer < 2 else 1].get(k, torch.zeros(())))
        _write_tasks(folder, model, tokenizer)
    recipe = {
        "merge_method": "layerwise",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in ("first", "second")],
        "parameters": {"operator": "task_arithmetic"},
        "dtype": "float32",
    }
    data = {s: f"{s}.jsonl" for s in ("search", "development", "test")}
    tasks = {
        "likely": {"kind": "likelihood", "data": data, "separator": ""},
    }
    search = {
        "recipe": recipe,
        "genome": {"layers": 2, "kinds": []},
        "tasks": tasks,
        "budget": 40,
        "uniform_first": 30,  # six numbers: two thirds of the way go by the coarse ones
        "finalists": 3,
    }
    (folder / "search.yml").write_text(yaml.safe_dump(search))
    experts = (folder / "first", folder / "second")
    return Planted(folder / "search.yml", folder / "base", experts, folder)


def _write_tasks(folder: Path, model: Any, tokenizer: Any) -> None:
    import torch

    prompts = [f"{chr(97 + i % 26)}{i:03d}?" for i in range(90)]
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    letters = set(tokenizer("".join(map(chr, range(33, 127))))["input_ids"])
    said = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        do_sample=False,
        suppress_tokens=[i for i in range(256) if i not in letters],
        eos_token_id=300,
        pad_token_id=0,
    )[:, ids.shape[1] :]
    rows = [
        {"prompt": p, "target": tokenizer.decode(s)} for p, s in zip(prompts, said, strict=True)
    ]
    for i, split in enumerate(("search", "development", "test")):
        text = "".join(json.dumps(row) + "\n" for row in rows[i::3])
        (folder / f"{split}.jsonl").write_text(text)


@pytest.fixture
def search_file(planted: Planted, tmp_path: Path) -> Callable[..., Path]:
    """`search_file(**changes)`: the planted search file with other settings."""

    def make(**changes: Any) -> Path:
        data = yaml.safe_load(planted.file.read_text())
        for task in data["tasks"].values():
            task["data"] = {k: str(planted.folder / v) for k, v in task["data"].items()}
        path = tmp_path / "search.yml"
        path.write_text(yaml.safe_dump({**data, **changes}))
        return path

    return make
