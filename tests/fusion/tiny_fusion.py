"""A tiny fusion for the tests of jobs: two random models of different families, with tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def save_model(
    folder: Path, tokenizer: Any, architecture: str, seed: int = 0, **sizes: Any
) -> Path:
    """A random model of 2 layers that fits a tokenizer, with it, in a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    common = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    if architecture == "gpt2":
        own = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
        common["bos_token_id"] = tokenizer.eos_token_id
    else:
        own = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
        }
        common["bos_token_id"] = None
    config = AutoConfig.for_model(architecture, **{**common, **own, **sizes})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(path: Path, rows: int = 24) -> Path:
    """Sums in words, one conversation a line."""
    lines = [
        json.dumps(
            {
                "instruction": f"What is {a} plus {a + 3}?",
                "response": f"{a} plus {a + 3} makes {2 * a + 3}, so the answer is {2 * a + 3}.",
            }
        )
        for a in range(rows)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_recipe(
    folder: Path,
    pivot: Path,
    sources: list[Path],
    dataset: Path,
    settings: dict[str, Any] | None = None,
    **parameters: Any,
) -> Path:
    """A recipe of distribution_fusion with its settings file."""
    chosen = {"batch_size": 4, "device_batch_size": 4, "eval_share": 0.2, "max_length": 128}
    fuse = folder / "settings.yml"
    fuse.write_text(yaml.safe_dump(chosen | (settings or {})), encoding="utf-8")
    recipe = {
        "merge_method": "distribution_fusion",
        "base_model": str(pivot),
        "models": [{"model": str(s)} for s in sources],
        "parameters": {
            "dataset": str(dataset),
            "max_steps": 3,
            "learning_rate": 1e-3,
            "settings": str(fuse),
            **parameters,
        },
    }
    path = folder / "fuse_recipe.yml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


MakeTokenizer = Callable[..., Any]
