"""A loaded model as the teacher of a batch: its distributions at the response tokens.

Let z be the logits at the position before a response token and V the rows of the output layer.
With temperature T and the K = len(tokenizer) rows that stand for a token, K <= V:

    log p(v) = z_v / T - log sum_{u < V} exp(z_u / T)          for the k largest v < K       (1)
    tail     = 1 - sum of those p(v)                                                         (2)

The partition function runs over all V rows, padding rows (Qwen has 282 of them) included: their
mass belongs to the tail, and no id of theirs is ever kept. All of it is float32.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mergekit_unconstrained.errors import ModelError
from mergekit_unconstrained.fusion.records import Encoded, TopK
from mergekit_unconstrained.fusion.settings import FusionSettings

_LOGITS = 1 << 24
"""Logits computed at a time: 64 MiB in float32."""
_REDUCED = 1 << 18
"""Logits reduced at a time on a CPU: they stay in its cache."""
_BLOCKS = 64
"""Of `top_k`: of each, only the largest entry is ranked at first."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Teacher:
    """A causal language model in inference.

    folder: as from_pretrained takes it. name: for messages. tokens: len(tokenizer). settings:
    top_k, temperature, collect_dtype, device_map. device: where it is put without a device_map.
    """

    def __init__(
        self, folder: Path, name: str, tokens: int, settings: FusionSettings, device: torch.device
    ) -> None:
        self.name = name
        self.forward_seconds = 0.0
        self._tokens = tokens
        self._temperature = settings.temperature
        self._asked = settings.top_k
        self._model = _load(folder, name, settings, device)
        self._body_name = self._model.base_model_prefix
        self._chunked: bool | None = None  # not known yet

    @property
    def limit(self) -> int | None:
        """The longest input it was made for, None when its configuration does not say."""
        config = self._model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @property
    def dtype(self) -> str:
        """What its weights are in: float32, bfloat16, float16."""
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def top_k(self) -> int:
        """Entries of a distribution."""
        return min(self._asked, self._tokens)

    @torch.inference_mode()
    def read(self, batch: Sequence[Encoded]) -> list[tuple[TopK, float]]:
        """Distributions and summed -log p (at temperature 1) of the response of each conversation.

        Right padding under an attention mask: no token sees one that comes later. Whatever is not
        finite is left so, for the caller to report.
        """
        ids, mask = self._padded(batch)
        where = [torch.from_numpy(one.positions.astype(np.int64)) - 1 for one in batch]
        rows = torch.repeat_interleave(torch.tensor([len(w) for w in where]))
        gold = torch.from_numpy(np.concatenate([one.response_ids for one in batch])).long()
        parts = [
            _reduce(logits, gold[piece], self.top_k, self._tokens, self._temperature)
            for piece, logits in self._logits(ids, mask, rows, torch.cat(where))
        ]
        kept, log_probs, tail, tempered, plain = (
            torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)
        )
        found, first = [], 0
        for one in batch:
            part = slice(first, first + len(one.positions))
            topk = TopK(kept[part], log_probs[part], tail[part], tempered[part])
            found.append((topk, -float(plain[part].sum(dtype=np.float64))))
            first = part.stop
        return found

    def _padded(self, batch: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(len(one.ids) for one in batch)
        ids = np.zeros((len(batch), length), dtype=np.int64)  # any id: the mask hides it
        mask = np.zeros((len(batch), length), dtype=np.int64)
        for i, one in enumerate(batch):
            ids[i, : len(one.ids)] = one.ids
            mask[i, : len(one.ids)] = 1
        embedding = self._model.get_input_embeddings().weight
        known = embedding.shape[0]
        if ids.max() >= known:
            raise ModelError(
                f"the tokenizer of {self.name} makes token {ids.max()}, but the model embeds "
                f"{known} tokens only: the tokenizer of another model lies in its folder"
            )
        # an embedding that device_map keeps on disk; its hook moves what comes in
        device = "cpu" if embedding.is_meta else embedding.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

    def _logits(
        self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """The model's logits at (row, column), a chunk at a time."""
        if self._chunked is None:
            self._chunked = self._agrees(ids, mask)
        with self._timed():
            if not self._chunked:
                full = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            else:
                body = getattr(self._model, self._body_name)
                out = body(input_ids=ids, attention_mask=mask, use_cache=False)
                states = out.last_hidden_state
                states = states[rows.to(states.device), columns.to(states.device)]
        step = max(1, _LOGITS // max(1, self._width))
        for start in range(0, len(rows), step):
            piece = slice(start, min(start + step, len(rows)))
            if not self._chunked:
                yield piece, full[rows[piece].to(full.device), columns[piece].to(full.device)]
                continue
            with self._timed():
                logits = self._head(out, states[piece])
            yield piece, logits

    @property
    def _width(self) -> int:
        head = self._model.get_output_embeddings()
        return int(head.weight.shape[0]) if head is not None else self._tokens

    def _head(self, out: Any, states: torch.Tensor) -> torch.Tensor:
        """What the model itself makes of hidden states [N, d]: logits [N, V].

        Its own forward pass runs, with a stand-in for the body: soft caps, scales and whatever else
        an architecture does to its logits are its own code.
        """
        given = copy.copy(out)
        given.last_hidden_state = states[None]
        body = getattr(self._model, self._body_name)
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        try:
            setattr(self._model, self._body_name, _Given(given))
            return self._model(input_ids=ids, use_cache=False).logits[0]
        finally:
            setattr(self._model, self._body_name, body)

    def _agrees(self, ids: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether body and head apart give the model's logits; else they are not taken apart."""
        ids, mask = ids[:1, :8], mask[:1, :8]
        if getattr(self._model, self._body_name, self._model) is self._model:
            return False
        whole = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        try:
            body = getattr(self._model, self._body_name)
            out = body(input_ids=ids, attention_mask=mask, use_cache=False)
            apart = self._head(out, out.last_hidden_state[0])
        except (AttributeError, TypeError, ValueError, KeyError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return False
        close = {torch.float32: 1e-5, torch.float64: 1e-10}.get(whole.dtype, 2e-2)
        scale = float(torch.nan_to_num(whole, 0.0, 0.0, 0.0).abs().max())
        return whole.shape == apart.shape and torch.allclose(
            whole, apart, rtol=close, atol=close * scale, equal_nan=True
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.forward_seconds += time.perf_counter() - started


class _Given(nn.Module):
    """Stands in for a model's body and gives what it gave before."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self._out = out

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._out


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As torch.topk over the last axis of [N, V]; four times as fast on a CPU.

    Entries are dealt to blocks like cards. The k largest lie in the k blocks with the largest
    maxima, so only those are ranked.
    """
    rows, size = values.shape
    width = size // _BLOCKS
    if values.device.type != "cpu" or width < 4 * k:
        return values.topk(k, dim=1)
    dealt = _BLOCKS * width
    maxima = values[:, :dealt].reshape(rows, _BLOCKS, width).amax(dim=1)
    best = maxima.topk(k, dim=1).indices
    offsets = torch.arange(_BLOCKS, device=values.device)[:, None] * width
    candidates = (best[:, None, :] + offsets).reshape(rows, -1)
    rest = torch.arange(dealt, size, device=values.device).expand(rows, -1)
    candidates = torch.cat([candidates, rest], dim=1)
    found, places = values.gather(1, candidates).topk(k, dim=1)
    return found, candidates.gather(1, places)


def _reduce(
    logits: torch.Tensor, gold: torch.Tensor, k: int, tokens: int, temperature: float
) -> tuple[torch.Tensor, ...]:
    """Eqs. (1) and (2) for logits [N, V] and the tokens that came [N].

    Gives ids [N, k], log-probabilities [N, k], tail [N], and the log-probability of the token that
    came [N] at `temperature` and at 1.
    """
    gold = gold.to(logits.device)
    step = len(logits)
    if logits.device.type == "cpu":
        step = max(1, _REDUCED // logits.shape[1])
    parts = []
    for z, came in zip(logits.split(step), gold.split(step), strict=True):
        z = z.float()
        total = torch.logsumexp(z, dim=1, keepdim=True)
        plain = z.gather(1, came[:, None]) - total
        tempered = plain
        if temperature != 1.0:
            z = z / temperature
            total = torch.logsumexp(z, dim=1, keepdim=True)
            tempered = z.gather(1, came[:, None]) - total
        found, ids = top_k(z[:, :tokens], k)
        log_probs = found - total
        tail = (1.0 - log_probs.exp().sum(dim=1)).clamp(min=0.0)
        parts.append((ids.int(), log_probs, tail, tempered[:, 0], plain[:, 0]))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the accelerator or of the machine, ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in text for said in _OUT_OF_MEMORY)


def _load(folder: Path, name: str, settings: FusionSettings, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    half = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = half if settings.collect_dtype == "auto" else getattr(torch, settings.collect_dtype)
    placed: dict[str, Any] = {"device_map": settings.device_map} if settings.device_map else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **placed)
        return (model if placed else model.to(device)).eval()
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelError(
                f"not enough memory to load {name} for its distributions: set `collect_dtype: "
                "bfloat16` or `device_map: auto`"
            ) from error
        told = " ".join(str(error).split())
        how = f" with `device_map: {settings.device_map}`" if placed else ""
        raise ModelError(f"{name} cannot be loaded from {folder}{how}: {told[:300]}") from error
