"""A tiny pivot and random training items, also for processes that the tests start."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.fusion.settings import FusionSettings
from mergekit_unconstrained.fusion.training.train import TrainJob

VOCABULARY = 61
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def make_pivot(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A random model with something that looks like a tokenizer beside it."""
    config = transformers.AutoConfig.for_model(kind, **{**CONFIG, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"a": 1}', encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


class RandomFeed(Dataset[dict[str, Any]]):
    """Random conversations with random targets; every eighth has no response."""

    def __init__(self, count: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.items = [self._item(random, i % 8 == 3) for i in range(count)]
        self.pause = 0.0
        self.batches_left = 1 << 30

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        time.sleep(self.pause)
        self.batches_left -= 1
        if self.batches_left < 0:
            raise DataError("the data broke off")
        return [self.items[i] for i in indices]

    @staticmethod
    def _item(random: np.random.Generator, silent: bool) -> dict[str, Any]:
        n, k = int(random.integers(6, 25)), int(random.integers(1, 6))
        r = 0 if silent else int(random.integers(1, n - 2))
        ids = np.stack([random.permutation(VOCABULARY)[:k] for _ in range(r)] or [np.zeros(k)])[:r]
        probs = random.dirichlet(np.ones(k), size=r)
        return {
            "input_ids": random.integers(2, VOCABULARY, n).astype(np.int32),
            "positions": np.sort(random.permutation(np.arange(1, n))[:r]).astype(np.int32),
            "target_ids": ids.astype(np.int32),
            "target_probs": probs.astype(np.float32),
            "rest": np.zeros(r, np.float32),
            "used": random.random(r) < 0.8,
            "bytes": np.asarray(3 * r, np.int64),
        }


class MeasuredFeed(RandomFeed):
    """One that knows the lengths of its items."""

    @property
    def lengths(self) -> list[int]:
        return [len(item["input_ids"]) for item in self.items]


def open_feed(description: Mapping[str, Any]) -> tuple[RandomFeed, RandomFeed]:
    """The feed of a job in another process."""
    feed = RandomFeed(description["count"])
    feed.pause = float(description.get("pause", 0.0))
    feed.batches_left = description.get("batches", feed.batches_left)
    return feed, RandomFeed(10, seed=1)


def make_job(pivot: Path, out: Path, **changes: Any) -> TrainJob:
    """A quiet job of six steps; what TrainJob does not know goes to its settings."""
    known = TrainJob.__dataclass_fields__
    settings = {"batch_size": 8, "device_batch_size": 4, "save_steps": 2, "seed": 3}
    settings |= {key: changes.pop(key) for key in list(changes) if key not in known}
    return TrainJob(
        **{
            "pivot": pivot,
            "tokenizer": pivot,
            "out": out,
            "settings": FusionSettings(**settings),
            "max_steps": 6,
            "epochs": 0.0,
            "learning_rate": 2e-3,
            "quiet": True,
            **changes,
        }
    )
