"""A batch of conversations with sparse targets, padded.

Letters: B conversations, n tokens of the longest one, r response tokens of the one that has most, K
target entries of the widest target, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Item = Mapping[str, npt.NDArray[Any]]
"""What a data set yields: input_ids [n], positions [r] (ascending indices of the response tokens),
target_ids [r, K] (-1 unused), target_probs [r, K], rest [r], used [r] and, where bits per byte are
wanted, bytes: the response bytes that the tokens at `positions` cover. r may be 0."""

IGNORED = -100
"""The label of a token that no loss looks at, as in transformers."""


def collate(items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """Pad a batch; every tensor has the batch first, so that accelerate can share it out.

    Gives input_ids, attention_mask and labels [B, n], positions [B, r] (-1 unused), target_ids and
    target_probs [B, r, K], rest and used [B, r], bytes [B]. K is at least 1. Nothing here has the
    size of V. A response token at the very beginning has nothing that predicts it: it is left out.
    """
    kept = [np.flatnonzero(item["positions"] > 0) for item in items]
    size = len(items)
    n = max(len(item["input_ids"]) for item in items)
    r = max(len(rows) for rows in kept)
    k = max(1, *(item["target_ids"].shape[1] for item in items))
    batch = {
        "input_ids": torch.zeros(size, n, dtype=torch.long),
        "attention_mask": torch.zeros(size, n, dtype=torch.long),
        "labels": torch.full((size, n), IGNORED),
        "positions": torch.full((size, r), -1),
        "target_ids": torch.full((size, r, k), -1),
        "target_probs": torch.zeros(size, r, k),
        "rest": torch.zeros(size, r),
        "used": torch.zeros(size, r, dtype=torch.bool),
        "bytes": torch.zeros(size, dtype=torch.long),
    }
    for row, (item, rows) in enumerate(zip(items, kept, strict=True)):
        length, width = len(item["input_ids"]), item["target_ids"].shape[1]
        positions = _tensor(item["positions"][rows])
        batch["input_ids"][row, :length] = _tensor(item["input_ids"])
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, positions] = batch["input_ids"][row, positions]
        batch["positions"][row, : len(rows)] = positions
        for key in ("target_ids", "target_probs"):
            batch[key][row, : len(rows), :width] = torch.from_numpy(item[key][rows])
        for key in ("rest", "used"):
            batch[key][row, : len(rows)] = torch.from_numpy(item[key][rows])
        batch["bytes"][row] = int(item.get("bytes", np.zeros((), np.int64)))
    return batch


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.int64))
